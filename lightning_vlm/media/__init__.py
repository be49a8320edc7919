"""Bytes -> pixels: finding media safely, decoding, cutting into patches. Pure functions, no state."""
