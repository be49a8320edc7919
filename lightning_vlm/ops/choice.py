"""A choice among implementations together with its reason, so that `doctor` and the isolation probe can tell both."""

from __future__ import annotations

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
