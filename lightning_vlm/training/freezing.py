"""Freezing parts of a model.

A frozen part needs no gradient and stays in eval mode; since pixels and spectrograms need no gradient either, a frozen
tower keeps no activations.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import part, parts_of

# RADIO has none: transformers adds one that is the identity, for which the released layout has no place.
_NEVER_TRAINED = "layer_scale"


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
    if frozen == set(parts_of(model)):
        raise ValueError(f"freeze={sorted(frozen)} leaves nothing to train; leave out at least one part")
    for module in modules:
        module.requires_grad_(False).eval()
    for name, parameter in model.vision_model.named_parameters():
        if _NEVER_TRAINED in name:
            parameter.requires_grad_(False)
