"""Fixtures of this room."""

from tests.fixtures.twins import as_floats, make_batch, make_theirs, shake

__all__ = ["as_floats", "make_batch", "make_theirs", "shake"]
