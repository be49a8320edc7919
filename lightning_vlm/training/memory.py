"""Bytes of weights, gradients and optimizer states that one rank holds, from shapes alone; pure functions.

All numbers are of the rank that holds most. They are peaks added up, which do not all fall together (gradients grow
while activations shrink), so a sum is an upper bound of what is in use at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.training.optimizers import state_bytes


@dataclass(frozen=True, slots=True)
class Gathering:
    """How FSDP2 gathers units of a model; see `gathered_bytes`.

    Attributes:
        param_dtype: What they are gathered in; their own by default.
        reduce_dtype: What gradients are summed up in.
        frees_layers: Whether a layer is freed behind its forward pass.
        keeps_gradients: Whether all gradients stay whole until the end of a step, as in a pipeline.
    """

    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype
    frees_layers: bool = True
    keeps_gradients: bool = False


def shard_numel(tensor: Tensor, shards: int) -> int:
    """Numbers in the largest shard of a tensor: ``ceil(rows / shards)`` rows, as ``torch.chunk`` cuts it for FSDP2.

    Args:
        tensor: Whole.
        shards: Ranks that share it; 1 for all of it.
    """
    if shards == 1 or not tensor.dim():
        return tensor.numel()
    return -(-tensor.shape[0] // shards) * (tensor.numel() // max(tensor.shape[0], 1))


def weight_bytes(model: nn.Module, shards: int = 1) -> int:
    """Parameters, each in its dtype, and buffers, which are not sharded.

    Args:
        model: What the rank has of the model.
        shards: Ranks that share it.
    """
    parameters = sum(shard_numel(p, shards) * p.element_size() for p in model.parameters())
    return parameters + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def gradient_bytes(model: nn.Module, shards: int = 1) -> int:
    """One gradient for each trainable parameter, in its dtype.

    Args:
        model: What the rank has of the model.
        shards: Ranks that share it.
    """
    return sum(shard_numel(p, shards) * p.element_size() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: NemotronVL, optimizer: str, shards: int = 1) -> int:
    """Optimizer states.

    Args:
        model: What the rank has of the model.
        optimizer: Its name, see `lightning_vlm.training.optimizers.state_bytes`.
        shards: Ranks that share the model; states of shards are shards.
    """
    return state_bytes(model, optimizer, lambda parameter: shard_numel(parameter, shards))


def gathered_bytes(model: nn.Module, units: Sequence[nn.Module], gathering: Gathering) -> tuple[int, int]:
    """What FSDP2 holds beside the shards, at its peak: whole weights, and whole gradients.

    Gathered weights: the root (what is in no unit) all the time, and two units: one that is computed, and the next one,
    which is fetched meanwhile. All of them where layers are not freed behind the forward pass. Gradients: those of the
    root until the end of the backward pass, those of one unit, and their copy that is summed up over ranks; or, in a
    pipeline, all of them in ``reduce_dtype``, in which they are added up over the micro-batches of a step, and a unit's
    own. (PyTorch: ``_fsdp_param_group.post_backward``, ``_fsdp_param.to_accumulated_grad_if_needed``.)

    Args:
        model: What the rank has of the model.
        units: Of `lightning_vlm.strategies.parallelize.units`.
        gathering: How.
    """
    taken: set[int] = set()
    sizes = []
    for module in [*units, model]:
        own = [p for p in module.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        sizes.append(own)
    *inner, root = sizes

    def weights(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() * (gathering.param_dtype or p.dtype).itemsize for p in parameters)

    def gradients(parameters: Iterable[Tensor]) -> int:
        return weights(p for p in parameters if p.requires_grad)

    def copies(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad) * gathering.reduce_dtype.itemsize

    largest = max(map(weights, inner), default=0)
    at_once = 2 * largest if gathering.frees_layers else sum(map(weights, inner))
    unit = max(map(gradients, inner), default=0)
    if gathering.keeps_gradients:
        return weights(root) + at_once, copies(root) + sum(map(copies, inner)) + max(unit, gradients(root))
    whole = gradients(root) + max(unit + max(map(copies, inner), default=0), copies(root))
    return weights(root) + at_once, whole
