"""Packs of plain dicts -> a batch: NeMo AutoModel's collater of neat packs, for those who migrate from it.

Rows are padded to one width and documents are told apart by numbers. That suits models that take padded batches, and
costs padding and, where a dense mask is asked for, memory in the square of the width (4 rows of 16,384 tokens: 1 GiB).
Our own path (`data.collate`) has one row without padding and its ``cu_seqlens``, and never makes such a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_vlm.automodel.neat_samples import EXTRA_MEDIA_KEYS, MEDIA_KEYS, merge_media, token_types
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
    for key in (*MEDIA_KEYS, *EXTRA_MEDIA_KEYS):
        media = merge_media(key, [pack[key] for pack in batch if pack.get(key) is not None])
        if media is not None:
            collated[key] = _bfloat16(media) if key in ("pixel_values", "pixel_values_videos") else media
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


def _bfloat16(pixels: Any) -> Any:
    if isinstance(pixels, Tensor):
        return pixels.to(torch.bfloat16)
    return [image.to(torch.bfloat16) for image in pixels]
