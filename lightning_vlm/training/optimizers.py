"""The optimizers of a run by name: AdamW, AdamW with 8-bit states, Muon with AdamW; each one object with plain state.

AdamW runs as one fused kernel per group where PyTorch has one. Whether it does is written in the group, hence in the
checkpoint: a run that is continued, also on another device, goes on with the kernel that it began with. To declare it
for the whole optimizer would make Lightning refuse gradient clipping in mixed precision, and leave gradients scaled
when their norm is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.training.muon import MuonAdamW, hidden_matrices
from lightning_vlm.training.optim import OptimizerName, parameter_groups

_FUSED_ON = ("cpu", "cuda")
_BLOCK, _SMALLEST_8BIT, _CODE_TABLE = 256, 4096, 1024  # torchao's: elements of a scale, elements, bytes per state


def check_optimizer(name: str, layer_decay: float = 1.0) -> None:
    """Checks arguments before there is a model.

    Args:
        name: Of an optimizer.
        layer_decay: Of `parameter_groups`.

    Raises:
        ValueError: If there is no such optimizer, or the factor is not above 0 and at most 1.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer is {name!r}; expected one of {', '.join(get_args(OptimizerName))}")
    if not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay is {layer_decay}; expected a factor above 0 and at most 1 (0.75 is usual), or 1 for one "
            "learning rate in the whole tower"
        )


def require_optimizer(name: str) -> None:
    """Makes sure that an optimizer is installed, before the weights are read that it would train.

    Args:
        name: One of `OptimizerName`.

    Raises:
        ImportError: If its package is missing.
    """
    if name == "adamw8bit":
        _adamw8bit()


def make_optimizer(
    model: NemotronVL,
    optimizer: str,
    lr: float | dict[str, float],
    betas: Sequence[float],
    weight_decay: float,
    layer_decay: float = 1.0,
    no_decay: Sequence[str] | None = None,
) -> Optimizer:
    """The optimizer of a model's trainable parameters.

    Args:
        model: The model, already frozen as wanted, on its device.
        optimizer: One of `OptimizerName`.
        lr: See `parameter_groups`.
        betas: Of AdamW.
        weight_decay: See `parameter_groups`.
        layer_decay: See `parameter_groups`.
        no_decay: See `parameter_groups`.

    Raises:
        ValueError: See `parameter_groups`.
        NotImplementedError: If 8-bit states would be sharded.
    """
    beta1, beta2 = betas
    muon = hidden_matrices(model) if optimizer == "muon" else ()
    groups = parameter_groups(model, lr, weight_decay, layer_decay, no_decay or (), muon)
    if not groups:  # a stage of a pipeline with nothing to train: PyTorch refuses to have no parameters
        groups = [{"name": "none", "params": [torch.zeros(0, requires_grad=True)], "algorithm": "adamw"}]
    if optimizer == "adamw8bit":
        return _adamw8bit()(groups, betas=(beta1, beta2))
    groups = [group if group.get("algorithm") == "muon" else _fused(group) for group in groups]
    return (MuonAdamW if muon else AdamW)(groups, betas=(beta1, beta2))


def state_bytes(
    model: NemotronVL, optimizer: str, numel: Callable[[Tensor], int] = lambda parameter: parameter.numel()
) -> int:
    """Memory of an optimizer's states, its counters of steps left out; on the meta device too.

    Args:
        model: The model, frozen as wanted.
        optimizer: One of `OptimizerName`.
        numel: Numbers of a parameter that are held here; all of them by default.
    """
    muon = hidden_matrices(model) if optimizer == "muon" else ()
    total = 0
    for parameter in (one for one in model.parameters() if one.requires_grad):
        held = numel(parameter)
        if optimizer == "adamw8bit" and held >= _SMALLEST_8BIT and held % _BLOCK == 0:
            total += 2 * (held + 4 * held // _BLOCK + _CODE_TABLE)
        else:
            total += held * parameter.element_size() * (1 if id(parameter) in muon else 2)
    return total


def _fused(group: dict[str, Any]) -> dict[str, Any]:
    if _can_fuse(group["params"]):
        return {**group, "fused": True}
    return {**group, "foreach": False} if len(_meshes(group["params"])) > 1 else group


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether one kernel can take them all: shards do not mix with whole tensors, nor with those of another mesh."""
    return len(_meshes(parameters)) == 1 and all(
        parameter.device.type in _FUSED_ON and parameter.is_floating_point() for parameter in parameters
    )


def _meshes(parameters: Sequence[Tensor]) -> set[object]:
    return {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in parameters}


def _adamw8bit() -> Any:
    try:
        from lightning_vlm.training.adamw8bit import AdamW8bit
    except ImportError as error:
        raise ImportError(
            f"optimizer 'adamw8bit' needs torchao, which cannot be imported ({error}); install it with "
            "pip install 'lightning-vlm[optim]', or set optimizer to adamw"
        ) from error
    return AdamW8bit
