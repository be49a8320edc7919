"""Passes without recomputation, for those who look at what layers do while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_recomputation(*parts: nn.Module) -> Iterator[None]:
    """Switches recomputation off, and on again where it was.

    Args:
        *parts: Whose layers are meant.
    """
    modules: list[Any] = [module for part in parts for module in part.modules()]
    layers = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
