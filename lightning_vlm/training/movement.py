"""What a step moved, without a copy of the model: a fingerprint of each parameter, and which got a gradient.

A fingerprint is the bits of all elements times fixed random numbers, added up in 64 bits: one changed element changes
it. It reads each weight once and keeps eight bytes per parameter. Of a shard it is the shard's; ranks then compare
what moved, not what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_PIECE = 1 << 20  # elements at a time: the largest thing that is allocated is 8 MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Effect:
    """What a step did to a parameter.

    Attributes:
        moved: Whether any of its elements changed.
        in_graph: Whether it got a gradient at all.
        driven: Whether that is not zero everywhere.
    """

    moved: bool
    in_graph: bool
    driven: bool


def parameters_at_rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, as the optimizer has them: FSDP2's as shards, also where a forward has gathered them.

    Args:
        model: The model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


@torch.no_grad()
def fingerprints(parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    """One number for each parameter, or for this rank's shard of it.

    Args:
        parameters: The parameters.
        device: Where the result is wanted.

    Returns:
        ``(len(parameters),)`` int64.
    """
    factors: dict[torch.device, Tensor] = {}
    found = []
    for parameter in parameters:
        local = _local(parameter.detach())
        bits = local.contiguous().view(-1).view(_BITS[local.element_size()])
        if bits.device not in factors:
            generator = torch.Generator().manual_seed(0)
            numbers = torch.randint(-(2**63), 2**63 - 1, (_PIECE,), generator=generator)
            factors[bits.device] = numbers.to(bits.device)
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for piece in bits.split(_PIECE):
            total += (piece * factors[bits.device][: len(piece)]).sum()
        found.append(total.to(device))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64, device=device)


def effects_of_step(
    parameters: Sequence[Tensor], before: Tensor, group: dist.ProcessGroup | None = None
) -> list[Effect]:
    """What a step did to parameters, on any rank; the same answer on every rank.

    Args:
        parameters: The parameters, the same ones on every rank.
        before: Their `fingerprints`.
        group: Those ranks; all by default.
    """
    if not parameters:
        return []
    moved = fingerprints(parameters, before.device) != before
    in_graph = torch.tensor([parameter.grad is not None for parameter in parameters], device=before.device)
    flags = _on_any_rank(torch.stack([moved, in_graph, _driven(parameters, before.device)]), group)
    return [Effect(*column) for column in flags.T.tolist()]


def have_gradients(
    parameters: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[bool]:
    """Which parameters have a gradient that is not zero everywhere, on any rank; the same answer on every rank.

    Args:
        parameters: The parameters, the same ones on every rank.
        device: Where ranks compare.
        group: Those ranks; all by default.
    """
    return _on_any_rank(_driven(parameters, device), group).tolist() if parameters else []


def _driven(parameters: Sequence[Tensor], device: torch.device) -> Tensor:
    gradients = [parameter.grad for parameter in parameters]
    flags = [torch.zeros(()) if gradient is None else _local(gradient).any() for gradient in gradients]
    return torch.stack([flag.to(device).bool() for flag in flags])


def _on_any_rank(flags: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    flags = flags.to(torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags.bool()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
