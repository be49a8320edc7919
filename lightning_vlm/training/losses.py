"""Where the loss is divided: by the label tokens of the whole step, over all micro-batches and ranks.

A mean per micro-batch would weigh a short answer in a small batch more than one in a large batch, and the
gradient would change with ``accumulate_grad_batches``. Here 8 x 1, 4 x 2 and 1 x 8 give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def step_label_tokens(local: int, device: torch.device, reduce: Callable[..., Tensor] | None = None) -> Tensor:
    """Label tokens of the whole step over all ranks.

    Args:
        local: Label tokens of this rank's micro-batches, see `VLMBatch.step_label_tokens`.
        device: Where the sum is taken.
        reduce: Of the strategy: sums up over the ranks with different samples.

    Returns:
        Float64 scalar, at least 1.
    """
    total = torch.tensor(float(local), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    if reduce is not None:
        total = reduce(total, reduce_op="sum")
    return total.clamp(min=1.0)


def divide_loss(loss_sum: Tensor, label_tokens: Tensor, accumulate_grad_batches: int, world_size: int) -> Tensor:
    """Makes the loss that Lightning expects from a sum.

    Lightning divides by ``accumulate_grad_batches`` and data-parallel strategies average over ranks; both are
    undone here, so that what remains is ``sum / label_tokens``.

    Args:
        loss_sum: Sum of this micro-batch's token losses.
        label_tokens: Of the whole step, see `step_label_tokens`.
        accumulate_grad_batches: The Trainer's.
        world_size: Number of data-parallel ranks.

    Returns:
        Scalar of ``loss_sum``'s dtype.
    """
    scale = accumulate_grad_batches * world_size / label_tokens
    return loss_sum * scale.to(loss_sum.dtype).to(loss_sum.device)  # in this order: MPS has no float64
