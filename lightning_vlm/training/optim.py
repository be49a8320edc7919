"""Optimizer groups by part, and the schedule from our own step count.

Each part (see `lightning_vlm.models.parts`) has its own learning rate, split by whether weight decay applies; that of
the vision tower may fall from layer to layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import PARTS, parts_of

OptimizerName = Literal["adamw", "adamw8bit", "muon"]

# Learned positions and attention's position biases are matrices by shape only. (Mamba's scalars, norms and other biases
# have one dimension: never decayed.)
_NEVER_DECAYED = ("position_embedding", "cls_register_token", "bias_u", "bias_v")
_TOWER_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")
_TOWER_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")


def parameter_groups(
    model: NemotronVL,
    lr: float | dict[str, float],
    weight_decay: float,
    layer_decay: float = 1.0,
    no_decay: Sequence[str] = (),
    muon: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Trainable parameters in named groups.

    Layer-wise decay of the learning rate is that of BEiT (arXiv:2106.08254) and MAE (``util/lr_decay.py`` of
    facebookresearch/mae): of ``L`` layers, layer ``i`` (from 0) has ``lr * layer_decay ** (L - i)``, the embeddings
    before them ``lr * layer_decay ** (L + 1)``. What comes after the layers has the whole rate, here the projector.

    Args:
        model: The model, already frozen as wanted.
        lr: One learning rate, or one per part.
        weight_decay: Of matrices; biases, norms, Mamba's scalars and learned positions have none.
        layer_decay: Of the vision tower's learning rate, per layer from the top; 1 for one rate.
        no_decay: Further parameters without weight decay: patterns of names such as
            ``language.model.embeddings.weight`` or ``vision.encoder.layer.*.attention.*``.
        muon: ``id`` of parameters that get groups of their own, with ``algorithm`` ``muon`` instead of ``adamw``.

    Returns:
        Groups named as the parts, ``<part>/no_decay``, and where asked for ``vision/embeddings``, ``vision/layer_00``,
        ``<part>/muon``; without empty ones.

    Raises:
        ValueError: If ``lr`` names an unknown part or leaves out a trainable one.
    """
    check_rates(model, lr)
    rates = lr if isinstance(lr, dict) else dict.fromkeys(PARTS, lr)
    num_layers = model.config.vision_config.num_hidden_layers
    groups = []
    for part, module in parts_of(model).items():
        found: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                depth = _depth(key, num_layers) if part == "vision" and layer_decay != 1 else num_layers + 1
                spared = not _is_decayed(key, parameter) or _matches(f"{part}.{key}", no_decay)
                found.setdefault((depth, id(parameter) in muon, spared), []).append(parameter)
        for (depth, by_muon, spared), parameters in sorted(found.items(), key=lambda item: item[0]):
            labels = (_layer_name(depth, num_layers), "muon" if by_muon else "", "no_decay" if spared else "")
            group = {
                "name": "/".join((part, *filter(None, labels))),
                "params": parameters,
                "lr": rates[part] * layer_decay ** (num_layers + 1 - depth),
                "weight_decay": 0.0 if spared else weight_decay,
            }
            groups.append({**group, "algorithm": "muon" if by_muon else "adamw"} if muon else group)
    return groups


def check_rates(model: NemotronVL, lr: float | dict[str, float]) -> None:
    """Checks that whatever is trained has a learning rate.

    Args:
        model: Frozen as wanted.
        lr: See `parameter_groups`.

    Raises:
        ValueError: If ``lr`` names an unknown part or leaves out a trainable one.
    """
    if not isinstance(lr, dict):
        return
    if unknown := set(lr) - set(PARTS):
        raise ValueError(f"lr names {sorted(unknown)}; expected parts among {', '.join(PARTS)}")
    for part, module in parts_of(model).items():
        if part not in lr and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"lr has no rate for {part!r}, which is trainable; add it or freeze that part")


def check_no_decay(model: NemotronVL, patterns: Sequence[str]) -> None:
    """Checks patterns of parameters without weight decay.

    Args:
        model: Whole.
        patterns: See `parameter_groups`.

    Raises:
        ValueError: If one matches no parameter.
    """
    names = [f"{part}.{key}" for part, module in parts_of(model).items() for key, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"no_decay names {pattern!r}, which matches none of the model's {len(names)} parameters; expected a "
                f"name, or a pattern with *, that begins with its part, such as {names[0]} or {names[-1]}"
            )


def count_steps(trainer: Any, batches: int | None) -> int:
    """Optimizer steps of a run.

    Args:
        trainer: The Trainer.
        batches: Of an epoch on each rank, before the Trainer's limit; ``None`` where no plan tells.

    Raises:
        ValueError: If the run has no end, or nothing tells how long an epoch is and ``max_steps`` is not set.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and batches is not None:
        limit = trainer.limit_train_batches  # Lightning has copied overfit_batches into it
        if limit is not None:  # its rule: an int is a number of batches, a float a fraction
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    if not limits:
        raise ValueError(
            "the schedule needs to know the number of steps; set trainer.max_steps or max_epochs (besides max_time)"
        )
    return min(limits)


def check_accumulation(trainer: Any) -> None:
    """Refuses steps of changing numbers of batches.

    Args:
        trainer: The Trainer.

    Raises:
        NotImplementedError: If a callback changes ``accumulate_grad_batches`` during the run.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise NotImplementedError(
            "GradientAccumulationScheduler is not supported: the number of steps and an exact resume would not follow "
            "it; set trainer.accumulate_grad_batches"
        )


class GroupSchedule(LambdaLR):
    """A schedule whose rates are those of the optimizer's groups, also where a checkpoint comes from other groups.

    A stage of a pipeline has groups of its own. What is loaded is the step; the rates came with the optimizer.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state, after the optimizer has taken its own.

        Args:
            state_dict: Of such a schedule.
        """
        groups = self.optimizer.param_groups
        rates = {"base_lrs": [group["initial_lr"] for group in groups], "_last_lr": [group["lr"] for group in groups]}
        super().load_state_dict({**state_dict, **rates, "lr_lambdas": [{} for _ in groups]})


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: int | float, min_lr_ratio: float) -> LambdaLR:
    """Linear warm-up, then a cosine down to a fraction of each group's learning rate.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps, or a fraction of ``total_steps`` if below 1.
        min_lr_ratio: Learning rate at the end, relative to the peak.
    """
    warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup_steps, total_steps, min_lr_rate=min_lr_ratio
    )
    schedule.__class__ = GroupSchedule  # adds no state
    return schedule


def _is_decayed(key: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(key.endswith(name) for name in _NEVER_DECAYED)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _depth(key: str, num_layers: int) -> int:
    """0 for the embeddings, then one for each layer, then what is after them."""
    if (layer := _TOWER_LAYER.search(key)) is not None:
        return int(layer[1]) + 1
    return 0 if _TOWER_EMBEDDINGS.search(key) else num_layers + 1


def _layer_name(depth: int, num_layers: int) -> str:
    if depth > num_layers:
        return ""
    return "embeddings" if depth == 0 else f"layer_{depth - 1:02d}"
