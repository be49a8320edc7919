"""Where tokens stand in a row of tokens: the one place that searches, by comparing tensors and not token by token.

Candidates are the places of a pattern's first token; their windows are compared at once. A pattern that begins with a
very frequent token costs memory of (its places) x (its length), which for an answer in a row is little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pattern_starts(row: Tensor, pattern: Sequence[int] | Tensor) -> Tensor:
    """``(N,)`` int64 first positions of every occurrence of a pattern, in order; none of an empty one.

    Args:
        row: ``(L,)`` token ids.
        pattern: Token ids.
    """
    pattern = torch.as_tensor(pattern, dtype=row.dtype, device=row.device)
    length = len(pattern)
    if not 0 < length <= len(row):
        return row.new_zeros(0, dtype=torch.int64)
    windows = row.unfold(0, length, 1)
    starts = (windows[:, 0] == pattern[0]).nonzero().flatten()
    return starts[(windows[starts] == pattern).all(1)]


def _find_pattern_indices(
    template: Sequence[int] | Tensor,
    pattern: Sequence[int] | Tensor,
    search_start_index: int = 0,
    allow_first_token_mismatch: bool = False,
) -> tuple[int, int]:
    """First place of a pattern at or after an index.

    Args:
        template: ``(L,)`` token ids in which is searched.
        pattern: Token ids that are searched.
        search_start_index: First position that counts.
        allow_first_token_mismatch: The pattern's first token may be any.

    Returns:
        (start, end); (-1, -1) if there is none, as for an empty pattern.
    """
    row = torch.as_tensor(template)
    skipped = int(allow_first_token_mismatch and len(pattern) > 1)
    starts = pattern_starts(row, torch.as_tensor(pattern)[skipped:]) - skipped
    starts = starts[starts >= search_start_index]
    return (int(starts[0]), int(starts[0]) + len(pattern)) if len(starts) else (-1, -1)


def content_end(row: Tensor, mask: Tensor | None, pad_token_id: int | None, keep: int | None = None) -> int:
    """Number of tokens of a row without the padding at its end.

    Args:
        row: ``(L,)`` token ids.
        mask: ``(L,)``, 0 for padding; what it says counts.
        pad_token_id: Without a mask, this token at the row's end is padding.
        keep: A token that ends turns. Where it pads as well, one of them stays.
    """
    if mask is None and pad_token_id is None:
        return len(row)
    real = (mask if mask is not None else row - (pad_token_id or 0)).nonzero().flatten()
    end = int(real[-1]) + 1 if len(real) else 0
    return min(end + int(mask is None and keep == pad_token_id), len(row))


def _decode_single_token(tokenizer: Any, token_id: int) -> str:
    """Text of one token, whatever its tokenizer takes: a number, a list, or a tensor; its id as text if it takes none.

    Args:
        tokenizer: The tokenizer.
        token_id: The token.
    """
    for form in (token_id, [token_id], torch.tensor([token_id])):
        try:
            return str(tokenizer.decode(form))
        except Exception:  # tokenizers refuse what they do not take in their own ways
            continue
    return str(token_id)
