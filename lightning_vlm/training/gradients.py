"""The norm of a gradient that no single rank holds: sharded in several ways, or in the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor


def gradient_norm(
    parameters: Iterable[Tensor], device: torch.device, stages: dist.ProcessGroup | None = None
) -> Tensor:
    """Euclidean norm of all gradients together.

    Args:
        parameters: Of this rank. Those with shards of gradients are looked at together with the ranks that have the
            others, so every rank of a mesh must call this with the same ones.
        device: Where the sum is taken.
        stages: The ranks that hold other parameters of the same model.

    Returns:
        Float32 scalar, the same on all ranks.
    """
    squares = torch.zeros((), dtype=torch.float32, device=device)
    for own in _by_mesh(parameters):
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in own if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares += norm.to(device, torch.float32).square()
    if stages is not None:
        dist.all_reduce(squares, group=stages)
    return squares.sqrt()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales gradients down, in place, so that all together have at most a norm.

    Args:
        parameters: Of this rank.
        max_norm: The norm.
        norm: What they have, from `gradient_norm`.
    """
    for own in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(own, max_norm, norm)


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters with gradients; PyTorch's functions take those of one mesh at a time."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            groups.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(parameter)
    return list(groups.values())
