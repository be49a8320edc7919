"""Document boundaries of a packed row: the only place that converts between their representations.

`cu_seqlens` travels in the batch; everything else is derived from it: lengths, `seq_idx`, `position_ids`, and
the dense mask that tests use as the plain truth. A zero-length document is legal and owns no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cu_seqlens_from_lengths(lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Cumulative document boundaries.

    Args:
        lengths: Tokens per document.
        device: Where the result lives; the device of ``lengths`` if that is a tensor.

    Returns:
        ``(num_documents + 1,)`` int32, starting with 0.

    Raises:
        ValueError: If a length is negative.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"document lengths must not be negative, got {lengths.tolist()}")
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def lengths_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """``(num_documents,)`` int64 tokens per document."""
    return cu_seqlens.long().diff()


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """``(T,)`` int32 index of the document that each token belongs to (what Mamba kernels take)."""
    lengths = lengths_from_cu_seqlens(cu_seqlens)
    documents = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return documents.repeat_interleave(lengths).to(torch.int32)


def position_ids_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """``(T,)`` int64 positions that restart at 0 in each document."""
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths_from_cu_seqlens(cu_seqlens))
    return torch.arange(starts.numel(), device=cu_seqlens.device) - starts


def cu_seqlens_from_seq_idx(seq_idx: Tensor) -> Tensor:
    """Inverse of `seq_idx_from_cu_seqlens` for documents that own at least one token.

    Args:
        seq_idx: ``(T,)``, equal within a document and different between neighbours.
    """
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[1:] = seq_idx[1:] != seq_idx[:-1]
    return _from_starts(starts)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Inverse of `position_ids_from_cu_seqlens` for documents that own at least one token.

    Args:
        position_ids: ``(T,)``, 0 at the start of each document.
    """
    return _from_starts(position_ids == 0)


def document_mask(cu_seqlens: Tensor, causal: bool = True) -> Tensor:
    """``(T, T)`` bool, True where a query (row) may see a key (column).

    The plain truth that tests compare with. It costs memory in the square of the row's length; no training
    path builds it.
    """
    seq_idx = seq_idx_from_cu_seqlens(cu_seqlens)
    mask = seq_idx[:, None] == seq_idx[None, :]
    return mask.tril() if causal else mask


def _from_starts(starts: Tensor) -> Tensor:
    boundaries = starts.nonzero().flatten()
    return torch.cat([boundaries, boundaries.new_tensor([starts.numel()])]).to(torch.int32)
