"""Next-token cross entropy that never holds vocabulary-sized logits for tokens without a label.

`linear_cross_entropy` drops unlabelled tokens before the head and takes the rest in chunks, each recomputed
in the backward pass: memory is one chunk of logits instead of all of them, for one extra head matmul.
`naive_cross_entropy` is the plain truth that tests compare it with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_vlm.schema import IGNORE_INDEX

CHUNK_TOKENS = 1024
"""Labelled tokens per chunk: 1024 x 131072 float32 logits are 512 MiB."""


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Labels of the token that each position predicts.

    Args:
        labels: ``(B, T)``, aligned with the input.
        cu_seqlens: Document boundaries of a packed row; the last token of a document predicts nothing.

    Returns:
        ``(B, T)``; -100 where nothing is predicted.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        last = cu_seqlens[1:].long() - 1
        shifted = shifted.index_fill(1, last[last >= 0], IGNORE_INDEX)
    return shifted


def linear_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of cross entropies of the labelled positions.

    Args:
        hidden: ``(B, T, D)`` last hidden states.
        head: The language-model head, ``(N, D) -> (N, V)``.
        targets: ``(B, T)`` shifted labels, see `shift_labels`.
        chunk_tokens: Labelled tokens whose logits exist at a time.

    Returns:
        Float32 scalar; 0, connected to ``hidden`` and the head, when nothing is labelled.
    """
    labelled = targets != IGNORE_INDEX
    hidden, targets = hidden[labelled], targets[labelled]
    if not targets.numel():
        # Runs the head on no rows: a constant would leave parameters without a gradient, on which distributed
        # training hangs.
        return head(hidden).float().sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, targets.numel(), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        total = total + checkpoint(_chunk_loss, hidden[chunk], targets[chunk], head, use_reentrant=False)
    return total


def naive_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross entropies from full logits ``(B, T, V)`` and shifted labels ``(B, T)``, in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _chunk_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
