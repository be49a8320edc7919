"""The three parts of a model by name, and freezing them.

A frozen part needs no gradient and stays in eval mode; since pixels need no gradient either, a frozen tower
keeps no activations.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_vlm.models.nemotron_vl import NemotronVL

# RADIO has no layer scale: transformers adds one that is the identity, for which the released layout has no
# place. And no batch carries videos yet: a trainable weight without a gradient would stop data-parallel
# training.
_NEVER_TRAINED = ("layer_scale", "video_patch_projection")

PARTS: dict[str, str] = {
    "vision": "vision_model",
    "projector": "multi_modal_projector",
    "language": "language_model",
}
"""Parts by the names that users write, and the attribute of `NemotronVL` that each is."""


def check_parts(names: Iterable[str]) -> None:
    """Checks names of parts.

    Args:
        names: The names.

    Raises:
        ValueError: If one is not a part.
    """
    for name in names:
        if name not in PARTS:
            raise ValueError(f"the model has no part {name!r}; expected one of {', '.join(PARTS)}")


def part(model: NemotronVL, name: str) -> nn.Module:
    """The module of a part.

    Args:
        model: The model.
        name: ``vision``, ``projector`` or ``language``.

    Raises:
        ValueError: If there is no such part.
    """
    check_parts([name])
    return getattr(model, PARTS[name])


def freeze(model: NemotronVL, names: Iterable[str]) -> None:
    """Freezes parts in place.

    Args:
        model: The model.
        names: Parts.

    Raises:
        ValueError: If a part is unknown, or nothing would be left to train; the model is unchanged.
    """
    frozen = set(names)
    modules = [part(model, name) for name in sorted(frozen)]
    if frozen == set(PARTS):
        raise ValueError(f"freeze={sorted(frozen)} leaves nothing to train; leave out at least one part")
    for module in modules:
        module.requires_grad_(False).eval()
    for name, parameter in model.vision_model.named_parameters():
        if any(never in name for never in _NEVER_TRAINED):
            parameter.requires_grad_(False)
