"""Document boundaries of a packed row: the only place that converts between their representations.

`cu_seqlens` travels in the batch; everything else is derived from it: lengths, `seq_idx`, `position_ids`, and
the dense mask that tests use as the plain truth. A zero-length document is legal and owns no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """The documents of a row in every form that a layer asks for, derived once per forward.

    Attributes:
        cu_seqlens: ``(num_documents + 1,)`` int32, on the row's device.
        seq_idx: ``(T,)`` int32, on the row's device.
        lengths: Tokens per document, on the host: layers that split need no transfer each.
    """

    cu_seqlens: Tensor
    seq_idx: Tensor
    lengths: tuple[int, ...]

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)


def documents_from_lengths(lengths: Sequence[int], device: torch.device | str | None = None) -> Documents:
    """Documents of known lengths, e.g. the images of a vision tower's row.

    Args:
        lengths: Tokens per document.
        device: Where the tensors live.
    """
    cu_seqlens = cu_seqlens_from_lengths(lengths, device)
    return Documents(cu_seqlens, seq_idx_from_cu_seqlens(cu_seqlens), tuple(lengths))


def documents_from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Documents:
    """Checks the boundaries of a row and derives the rest.

    Args:
        cu_seqlens: ``(num_documents + 1,)``.
        num_tokens: Tokens of the row.

    Raises:
        ValueError: If the boundaries do not start at 0, decrease, or do not end at ``num_tokens``.
    """
    boundaries = cu_seqlens.tolist()
    if boundaries[:1] != [0] or boundaries[-1:] != [num_tokens] or boundaries != sorted(boundaries):
        shown = str(boundaries if len(boundaries) <= 12 else [*boundaries[:6], "...", *boundaries[-3:]])
        raise ValueError(
            f"cu_seqlens is {shown} for a row of {num_tokens} tokens; expected boundaries that start at 0, never "
            "decrease, and end at the row's length"
        )
    cu_seqlens = cu_seqlens.to(torch.int32)
    lengths = tuple(end - start for start, end in pairwise(boundaries))
    return Documents(cu_seqlens, seq_idx_from_cu_seqlens(cu_seqlens), lengths)


def documents_from_rows(rows: int, columns: int, device: torch.device) -> Documents:
    """A padded batch ``(rows, columns)``, read row after row: each row is a document."""
    cu_seqlens = torch.arange(rows + 1, device=device, dtype=torch.int32) * columns
    seq_idx = torch.arange(rows, device=device, dtype=torch.int32).repeat_interleave(columns)
    return Documents(cu_seqlens, seq_idx, (columns,) * rows)


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

    The plain truth that tests compare with. It costs memory in the square of the row's length, so it is built for
    users who chose an attention implementation that knows nothing else, and for no one else.
    """
    seq_idx = seq_idx_from_cu_seqlens(cu_seqlens)
    mask = seq_idx[:, None] == seq_idx[None, :]
    return mask.tril() if causal else mask


def _from_starts(starts: Tensor) -> Tensor:
    boundaries = starts.nonzero().flatten()
    return torch.cat([boundaries, boundaries.new_tensor([starts.numel()])]).to(torch.int32)
