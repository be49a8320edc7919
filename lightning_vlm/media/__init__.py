"""Bytes -> pixels: finding media safely, decoding them, cutting them into patches. Pure functions, no state."""
