"""A choice among implementations together with its reason, so that `doctor` and the isolation probe can tell both."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation that will run.

    Attributes:
        name: Short name, e.g. ``torch``.
        reason: Why this one.
    """

    name: str
    reason: str


@functools.cache
def is_installed(package: str) -> bool:
    """Whether a package or module can be imported; looked up once, because layers ask in every forward."""
    return importlib.util.find_spec(package) is not None
