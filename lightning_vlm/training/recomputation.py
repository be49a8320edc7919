"""Gradient checkpointing by part: a tower and the language model need it at different sizes."""

from __future__ import annotations

from typing import Any

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import parts_of

_RECOMPUTED = ("vision", "audio", "language")


def check_recomputed(parts: bool | list[str]) -> None:
    """Checks names of parts.

    Args:
        parts: The names; or all or none.

    Raises:
        ValueError: If one names no part with layers to recompute.
    """
    for name in [] if isinstance(parts, bool) else parts:
        if name not in _RECOMPUTED:
            raise ValueError(
                f"gradient_checkpointing names {name!r}; expected true, false or a list of {', '.join(_RECOMPUTED)}"
            )


def recompute_activations(model: NemotronVL, parts: bool | list[str]) -> None:
    """Makes the layers of parts recompute their activations in the backward pass.

    Args:
        model: The model.
        parts: Names of parts; or all or none. A part that the model does not have is passed over.
    """
    wanted = _RECOMPUTED if parts is True else parts or ()
    for name, module in parts_of(model).items():
        if name in wanted:
            network: Any = module
            network.activation_checkpointing_enable({"use_reentrant": False})
