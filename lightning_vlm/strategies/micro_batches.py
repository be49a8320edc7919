"""Micro-batches of one shape: what a pipeline sends from stage to stage is as large in each of a step's.

Rows are filled up with tokens that carry no label: a padded batch with padding and with rows of it, a packed row with
one more document. What is filled up changes no number of what was there, and no medium moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from lightning_vlm.schema import IGNORE_INDEX, MEDIA_FIELDS, VLMBatch


def equal_shapes(batches: Sequence[VLMBatch], pad_token_id: int, multiple: int = 1) -> list[VLMBatch]:
    """Fills micro-batches up to the largest.

    Args:
        batches: All padded, or all packed.
        pad_token_id: Token to fill up with.
        multiple: Their length becomes a multiple of this.

    Returns:
        New batches; tensors that are long enough are shared.

    Raises:
        ValueError: If some are padded and some packed.
    """
    if len({batch.cu_seqlens is None for batch in batches}) > 1:
        raise ValueError("micro-batches of one step are padded rows and packed rows; expected one kind in all of them")
    rows = max(batch.input_ids.shape[0] for batch in batches)
    length = max(batch.input_ids.shape[1] for batch in batches)
    length = -(-length // multiple) * multiple
    return [_filled(batch, rows, length, pad_token_id) for batch in batches]


def blank_like(batch: VLMBatch, pad_token_id: int) -> VLMBatch:
    """A micro-batch of a shape, without labels and media: it has no gradient.

    Args:
        batch: Gives the shape.
        pad_token_id: What it consists of.
    """
    rows, length = batch.input_ids.shape
    nothing: dict[str, Any] = dict.fromkeys(MEDIA_FIELDS)
    types = None if batch.mm_token_type_ids is None else torch.zeros_like(batch.mm_token_type_ids)
    ends = None if batch.cu_seqlens is None else batch.cu_seqlens.new_tensor([0, length])
    documents = rows if ends is None else 1
    none = batch.num_images.new_zeros(documents)
    return replace(
        batch,
        **nothing,
        input_ids=torch.full_like(batch.input_ids, pad_token_id),
        labels=torch.full_like(batch.labels, IGNORE_INDEX),
        attention_mask=None if batch.attention_mask is None else torch.ones_like(batch.attention_mask),
        cu_seqlens=ends,
        mm_token_type_ids=types,
        num_images=none,
        num_videos=None if batch.num_videos is None else none,
        num_clips=None if batch.num_clips is None else none,
        num_label_tokens=0,
    )


def _filled(batch: VLMBatch, rows: int, length: int, pad_token_id: int) -> VLMBatch:
    more_rows, more = rows - batch.input_ids.shape[0], length - batch.input_ids.shape[1]
    if not more_rows and not more:
        return batch

    def fill(tensor: Any, value: int) -> Any:
        return None if tensor is None else F.pad(tensor, (0, more, 0, more_rows), value=value)

    cu_seqlens, mask = batch.cu_seqlens, fill(batch.attention_mask, 0)
    new = more_rows
    if cu_seqlens is not None:
        cu_seqlens, new = torch.cat([cu_seqlens, cu_seqlens.new_tensor([length])]), 1
    elif mask is not None and more_rows:
        mask[-more_rows:] = 1  # attention over nothing would be no number
    names = ("num_images", "num_videos", "num_clips")
    known = {name: count for name in names if (count := getattr(batch, name)) is not None}
    counts: dict[str, Any] = {name: F.pad(count, (0, new)) for name, count in known.items()}
    return replace(
        batch,
        input_ids=fill(batch.input_ids, pad_token_id),
        labels=fill(batch.labels, IGNORE_INDEX),
        attention_mask=mask,
        mm_token_type_ids=fill(batch.mm_token_type_ids, 0),
        cu_seqlens=cu_seqlens,
        **counts,
    )
