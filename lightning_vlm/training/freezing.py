"""Freezing parts of a model.

A frozen part needs no gradient and stays in eval mode; since pixels and spectrograms need no gradient either, a frozen
tower keeps no activations. A frozen language model does: the gradient goes through it to what is trained before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_vlm.models.lora import Lora
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import check_parts, part, parts_of

# RADIO has none: transformers adds one that is the identity, for which the released layout has no place.
_NEVER_TRAINED = "layer_scale"


def freeze(model: NemotronVL, names: Iterable[str]) -> None:
    """Freezes parts in place, and makes frozen layers through which gradients go recompute if they are to.

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
    if not model.language_model.training:
        # transformers recomputes layers in training mode only. Theirs alone, not that of what they hold, is that mode.
        for layer in model.language_model.modules():
            if getattr(layer, "gradient_checkpointing", False) and isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
    for name, parameter in model.vision_model.named_parameters():
        if never_trained(name):
            parameter.requires_grad_(False)


def check_new_is_trained(new: Iterable[str], frozen: Collection[str], lora: Lora | None) -> None:
    """Refuses parts that begin with random weights and would keep them.

    Args:
        new: Parts, or modules of parts, that are made from scratch.
        frozen: Parts that are not trained.
        lora: What is trained instead of them.

    Raises:
        ValueError: If there is one, or a part is unknown.
    """
    for entry in new:
        name = entry.partition(".")[0]
        check_parts([name])
        if name in frozen:
            raise ValueError(
                f"from_scratch names {entry!r}, but freeze keeps it random; take {name} out of one of them"
            )
        if lora is not None and lora.how(name) != "full":
            raise ValueError(
                f"from_scratch names {entry!r}, but lora.{name} is {lora.how(name)}, which keeps it random; set "
                f"lora.{name} to full"
            )


def never_trained(name: str) -> bool:
    """Whether a parameter is one that no run trains.

    Args:
        name: Of the parameter.
    """
    return _NEVER_TRAINED in name
