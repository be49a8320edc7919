"""Packs of plain dicts -> a batch: NeMo AutoModel's collaters of neat packs, for those who migrate from it.

Rows are padded to one width and documents are told apart by numbers. That suits models that take padded batches, and
costs padding and, where a dense mask is asked for, memory in the square of the width (4 rows of 16,384 tokens: 1 GiB).
Our own path (`data.collate`) has one row without padding and its ``cu_seqlens``, and never makes such a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_vlm.automodel.neat_samples import EXTRA_MEDIA_KEYS, MEDIA_KEYS, merge_media, token_types
from lightning_vlm.automodel.padding import to_bfloat16
from lightning_vlm.schema import IGNORE_INDEX
from lightning_vlm.segments import (
    cu_seqlens_from_lengths,
    cu_seqlens_from_seq_idx,
    document_mask,
    seq_idx_from_cu_seqlens,
)


def neat_packed_vlm_collater(
    batch: list[dict[str, Any]],
    padding_idx: int = 0,
    max_length: int | None = None,
    attn_implementation: str = "sdpa",
    materialize_4d_mask: bool = True,
) -> dict[str, Any]:
    """Stacks packs. Labels are not shifted: `_shift_sample` did that.

    Unlike in NeMo AutoModel, ``_packed_seq_ids`` is in every batch (there a batch of single-document packs lacks it,
    and Nemotron-H fails), every flash attention gets the compact mask, a pack that is too long is a clear error, hidden
    tokens of a document (a fake image) keep their document's number in ``_packed_seq_ids``, and media of all
    `EXTRA_MEDIA_KEYS` come along.

    Args:
        batch: Packs that `_build_packed_vlm_sample` made; at least ``input_ids``, ``labels``, ``attention_mask`` and
            ``position_ids`` of each.
        padding_idx: Token that pads rows.
        max_length: Width of the batch; that of the longest pack when ``None``.
        attn_implementation: ``flash_attention_*`` takes document numbers; any other takes a dense mask. transformers
            by itself does not read such numbers (NeMo patches it to); its flash attention takes ``cu_seq_lens``.
        materialize_4d_mask: False returns document numbers whatever the attention.

    Returns:
        Nothing for no packs, otherwise ``input_ids``, ``labels``, ``mm_token_type_ids`` ``(B, S)``; ``position_ids``
        ``(B, S)``, or ``(3, B, S)`` if any pack has three axes; ``attention_mask``, document numbers ``(B, S)`` with 0
        for what is hidden, or bool ``(B, 1, S, S)``, True where a query (row) sees a key (column);
        ``_packed_seq_ids`` ``(B, S)`` with 0 for padding alone; media, pixels in bfloat16; ``n_images_per_sample`` and
        ``n_videos_per_sample`` ``(B,)`` where there are any.

    Raises:
        ValueError: If a pack is longer than ``max_length``.
        TypeError: If pixels of the packs do not go together, see `merge_media`.
    """
    if not batch:
        return {}
    longest = max(len(pack["input_ids"]) for pack in batch)
    width = longest if max_length is None else max_length
    if longest > width:
        raise ValueError(f"a pack has {longest} tokens, more than max_length {width}; raise it or lower pack_size")

    def rows(values: list[Tensor], value: int = 0) -> Tensor:
        return torch.stack([pad(row, (0, width - row.shape[-1]), value=value) for row in values], dim=-2)

    positions = [pack["position_ids"] for pack in batch]
    if any(row.ndim == 2 for row in positions):  # text packs among them: the same position on every axis
        positions = [row.expand(3, -1) for row in positions]
    numbers = rows([pack["attention_mask"] for pack in batch])
    documents = rows([_documents(pack) for pack in batch])
    compact = (attn_implementation or "sdpa").startswith("flash_attention") or not materialize_4d_mask
    collated = {
        "input_ids": rows([pack["input_ids"] for pack in batch], padding_idx),
        "labels": rows([pack["labels"] for pack in batch], IGNORE_INDEX),
        "position_ids": rows(positions),
        "attention_mask": numbers if compact else _dense_mask(documents, numbers != 0),
        "mm_token_type_ids": rows([token_types(pack) for pack in batch]),
        "_packed_seq_ids": documents,
    }
    collated |= _joined_media(batch)
    for kind in ("images", "videos"):
        counts = torch.tensor([pack.get(f"n_{kind}", 0) for pack in batch])
        if counts.any():
            collated[f"n_{kind}_per_sample"] = counts
    return collated


def _documents(pack: dict[str, Any]) -> Tensor:
    """Number of the document of every token, from 1, hidden ones included; padding at a pack's end may be left off."""
    if (lengths := pack.get("seq_lens_padded")) is not None:
        return seq_idx_from_cu_seqlens(cu_seqlens_from_lengths(lengths)).long() + 1
    # A pack from elsewhere: numbers only grow, so a hidden token is of the last document before it.
    numbers = pack["attention_mask"]
    end = int(numbers.nonzero().max()) + 1 if numbers.any() else 0
    return numbers[:end].cummax(0).values


def _dense_mask(documents: Tensor, visible: Tensor) -> Tensor:
    """``(B, 1, S, S)`` bool: causal, within a document, and only between visible tokens."""
    masks = [
        document_mask(cu_seqlens_from_seq_idx(row)) & seen[:, None] & seen[None, :]
        for row, seen in zip(documents, visible)
    ]
    return torch.stack(masks)[:, None]


def _joined_media(batch: list[dict[str, Any]]) -> dict[str, Any]:
    joined = {}
    for key in (*MEDIA_KEYS, *EXTRA_MEDIA_KEYS):
        media = merge_media(key, [pack[key] for pack in batch if pack.get(key) is not None])
        if media is not None:
            joined[key] = to_bfloat16(media) if key in ("pixel_values", "pixel_values_videos") else media
    return joined


def packed_sequence_thd_vlm_collater(
    batch: list[dict[str, Any]],
    padding_idx: int = 0,
    max_length: int | None = None,
    seq_lens_padding_value: int = -1000,
) -> dict[str, Any]:
    """Stacks packs for attention that takes the lengths of documents (``thd``), without any mask.

    Counts of images and videos come along; NeMo AutoModel leaves them out and cannot split such a batch (2B.9).

    Args:
        batch: Packs that `_build_packed_vlm_sample` made. Without ``seq_lens`` documents are those that their
            ``attention_mask`` numbers; a pack of which nothing is visible is one document.
        padding_idx: Token that pads rows.
        max_length: Width of the batch; that of the longest pack when ``None``.
        seq_lens_padding_value: Fills up the rows of lengths.

    Returns:
        Nothing for no packs, otherwise ``input_ids``, ``labels`` ``(B, S)``; ``position_ids`` ``(B, S)`` or
        ``(3, B, S)``; ``seq_lens`` and ``seq_lens_padded`` ``(B, most documents)``, real tokens and slots of each, a
        row's padding being in its last slot; ``qkv_format`` ``"thd"``; media as in `neat_packed_vlm_collater`.

    Raises:
        ValueError: If a pack is longer than ``max_length``, or its lengths cannot be those of its tokens.
    """
    if not batch:
        return {}
    longest = max(len(pack["input_ids"]) for pack in batch)
    width = longest if max_length is None else max_length
    if longest > width:
        raise ValueError(f"a pack has {longest} tokens, more than max_length {width}; raise it or lower pack_size")

    def rows(values: Sequence[Tensor], value: int = 0) -> Tensor:
        return torch.stack([pad(row, (0, width - row.shape[-1]), value=value) for row in values], dim=-2)

    positions = [pack["position_ids"] for pack in batch]
    if any(row.ndim == 2 for row in positions):
        positions = [row.expand(3, -1) for row in positions]
    lengths, slots = zip(*(_lengths_and_slots(pack, width) for pack in batch))
    collated = {
        "input_ids": rows([pack["input_ids"] for pack in batch], padding_idx),
        "labels": rows([pack["labels"] for pack in batch], IGNORE_INDEX),
        "position_ids": rows(positions),
        "seq_lens": _ragged(lengths, seq_lens_padding_value),
        "seq_lens_padded": _ragged(slots, seq_lens_padding_value),
        "qkv_format": "thd",
        **_joined_media(batch),
    }
    for kind in ("images", "videos"):
        counts = torch.tensor([pack.get(f"n_{kind}", 0) for pack in batch])
        if counts.any():
            collated[f"n_{kind}_per_sample"] = counts
    return collated


def _lengths_and_slots(pack: dict[str, Any], width: int) -> tuple[list[int], list[int]]:
    """Tokens of each document of a pack, and the room that it has; the last one's reaches to the row's end."""
    total = len(pack["input_ids"])
    lengths, slots = pack.get("seq_lens"), pack.get("seq_lens_padded")
    if (lengths is None) != (slots is None):
        raise ValueError("a pack has one of seq_lens and seq_lens_padded; expected both or neither")
    if lengths is None or slots is None:
        numbers = _documents(pack) if pack.get("attention_mask") is not None else torch.zeros(0, dtype=torch.int64)
        lengths = [count for count in torch.bincount(numbers).tolist()[1:] if count] or [total]
        slots = [*lengths[:-1], total - sum(lengths[:-1])]
    lengths, slots = [int(length) for length in lengths], [int(slot) for slot in slots]
    fits = len(lengths) == len(slots) and all(0 <= length <= slot for length, slot in zip(lengths, slots))
    if not fits or sum(slots) != total:
        raise ValueError(f"seq_lens {lengths} and seq_lens_padded {slots} are not those of a pack of {total} tokens")
    return lengths, [*slots[:-1], slots[-1] + width - total] if slots else []


def _ragged(rows: Sequence[list[int]], value: int) -> Tensor:
    most = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (most - len(row))] for row in rows])
