"""Optimizer groups by part, and the schedule from our own step count.

Each part (see `lightning_vlm.models.parts`) has its own learning rate, split by whether weight decay applies.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import PARTS, parts_of

# Learned positions are matrices by shape only. (Mamba's scalars, norms and biases have one dimension: never decayed.)
_NEVER_DECAYED = ("position_embedding", "cls_register_token")


def parameter_groups(model: NemotronVL, lr: float | dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in named groups.

    Args:
        model: The model, already frozen as wanted.
        lr: One learning rate, or one per part.
        weight_decay: Of matrices; biases, norms, Mamba's scalars and learned positions have none.

    Returns:
        Groups named as the parts, and ``<part>/no_decay``, without empty ones.

    Raises:
        ValueError: If ``lr`` names an unknown part or leaves out a trainable one.
    """
    rates = lr if isinstance(lr, dict) else dict.fromkeys(PARTS, lr)
    if unknown := set(rates) - set(PARTS):
        raise ValueError(f"lr names {sorted(unknown)}; expected parts among {', '.join(PARTS)}")
    groups = []
    for name, module in parts_of(model).items():
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                (decayed if _is_decayed(key, parameter) else spared).append(parameter)
        for suffix, parameters, decay in (("", decayed, weight_decay), ("/no_decay", spared, 0.0)):
            if parameters:
                if name not in rates:
                    raise ValueError(f"lr has no rate for {name!r}, which is trainable; add it or freeze that part")
                groups.append({"name": name + suffix, "params": parameters, "lr": rates[name], "weight_decay": decay})
    return groups


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: int | float, min_lr_ratio: float) -> LambdaLR:
    """Linear warm-up, then a cosine down to a fraction of each group's learning rate.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps, or a fraction of ``total_steps`` if below 1.
        min_lr_ratio: Learning rate at the end, relative to the peak.
    """
    warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, total_steps, min_lr_rate=min_lr_ratio)


def _is_decayed(key: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(key.endswith(name) for name in _NEVER_DECAYED)
