"""Fixtures of this room."""

from tests.fixtures.twins import as_floats, make_batch, make_theirs, make_twins, shake

__all__ = ["as_floats", "make_batch", "make_theirs", "make_twins", "shake"]
