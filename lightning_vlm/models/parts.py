"""The map of a model: its parts by the names that users write, where each is, and what it is to the others.

Freezing, learning rates, adapters, reports and strategies all read it here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True, slots=True)
class Part:
    """One part of `NemotronVL`.

    Attributes:
        attribute: Of the model.
        role: A ``tower`` turns media into features, a ``connector`` features into embeddings, the ``language_model``
            embeddings into text.
        component: What reports count it as.
    """

    attribute: str
    role: Literal["tower", "connector", "language_model"]
    component: Literal["language_model", "vision_model", "projector", "audio"]


PARTS: dict[str, Part] = {
    "vision": Part("vision_model", "tower", "vision_model"),
    "projector": Part("multi_modal_projector", "connector", "projector"),
    "audio": Part("audio_tower", "tower", "audio"),
    "audio_projector": Part("embed_audio", "connector", "audio"),
    "language": Part("language_model", "language_model", "language_model"),
}
"""In the order of the flow; a model that hears nothing has no ``audio`` and no ``audio_projector``."""


def check_parts(names: Iterable[str]) -> None:
    """Checks names of parts.

    Args:
        names: The names.

    Raises:
        ValueError: If one is not a part of any model.
    """
    for name in names:
        if name not in PARTS:
            raise ValueError(f"the model has no part {name!r}; expected one of {', '.join(PARTS)}")


def part(model: nn.Module, name: str) -> nn.Module:
    """The module of a part.

    Args:
        model: The `NemotronVL`.
        name: One of `PARTS`.

    Raises:
        ValueError: If there is no such part.
    """
    check_parts([name])
    if (module := getattr(model, PARTS[name].attribute)) is None:
        raise ValueError(f"the model has no part {name!r}: its config has no audio_config")
    return module


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """All parts that a model has, by name.

    Args:
        model: The `NemotronVL`.
    """
    found = {name: getattr(model, part.attribute) for name, part in PARTS.items()}
    return {name: module for name, module in found.items() if module is not None}
