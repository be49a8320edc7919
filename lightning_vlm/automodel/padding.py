"""Encoded samples -> a padded batch, shifted: the one batcher behind NeMo AutoModel's collate functions.

Labels of the result are those of the *next* token, as in NeMo: a model that shifts by itself must not be given them. A
packed batch is the same samples through `neat_samples` and `packed_batches`. Our own path (`data.collate`) takes typed
Samples, leaves labels alone and can do without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_vlm.automodel.neat_samples import merge_media
from lightning_vlm.processing.encoded import COUNT_KEYS, SEQUENCE_KEYS, EncodedSample, pad_token_of, placeholder_mask
from lightning_vlm.schema import IGNORE_INDEX

_PIXELS = ("pixel_values", "pixel_values_videos")


def pad_samples(
    samples: Sequence[EncodedSample],
    processor: Any,
    *,
    max_length: int | None = None,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Pads samples on the right, joins their media, and shifts.

    A last token that is part of an image is kept: such a batch gets one more column of padding, which the shift drops
    (NeMo AutoModel drops the token, and a feature is left without a place: defect 2B.19). A batch of one column more
    than the others is still at most ``max_length`` wide.

    Args:
        samples: What the encoders return; text alone, images, videos and sounds may be mixed.
        processor: Tells the padding token and the placeholders.
        max_length: Width before the shift; that of the longest sample when ``None``.
        bfloat16: Cast pixels. Those in uint8 stay: models take them for not yet normalised.

    Returns:
        `SEQUENCE_KEYS` as ``(B, L - 1)``, with 0 for a sample that lacks one; media joined, see `merge_media`;
        ``n_images_per_sample`` and ``n_videos_per_sample`` ``(B,)`` int64 where there are any.

    Raises:
        ValueError: If there are no samples, or one is longer than ``max_length``.
        TypeError: If pixels of the samples do not go together.
    """
    if not samples:
        raise ValueError("there are no samples; expected at least one")
    lengths = [len(sample["input_ids"]) for sample in samples]
    width = max(lengths) if max_length is None else max_length
    if max(lengths) > width:
        raise ValueError(
            f"a sample has {max(lengths)} tokens, more than max_length {width}; raise it or cut the sample"
        )
    width += any(
        length == width and bool(length) and bool(placeholder_mask(sample, processor)[-1])
        for sample, length in zip(samples, lengths)
    )
    fills = {"input_ids": pad_token_of(processor), "labels": IGNORE_INDEX}
    batch: dict[str, Any] = {}
    for key in SEQUENCE_KEYS:
        if any(sample.get(key) is not None for sample in samples):
            rows = [sample_row(sample, key) for sample in samples]
            full = torch.stack([pad(row, (0, width - len(row)), value=fills.get(key, 0)) for row in rows])
            batch[key] = full[:, 1:] if key == "labels" else full[:, :-1]
    media_keys = dict.fromkeys(key for sample in samples for key in sample if key not in (*SEQUENCE_KEYS, *COUNT_KEYS))
    for key in media_keys:
        media = merge_media(key, [sample[key] for sample in samples if sample.get(key) is not None])
        if media is not None:
            batch[key] = to_bfloat16(media) if bfloat16 and key in _PIXELS else media
    for key in COUNT_KEYS:
        counts = torch.tensor([sample.get(key, 0) for sample in samples])
        if counts.any():
            batch[f"{key}_per_sample"] = counts
    return batch


def to_bfloat16(pixels: Any) -> Any:
    """Pixels in bfloat16; those in uint8, which are not yet normalised, stay.

    Args:
        pixels: A tensor or a list of them.
    """
    if isinstance(pixels, Tensor):
        return pixels.to(torch.bfloat16) if pixels.dtype != torch.uint8 else pixels
    return [to_bfloat16(image) for image in pixels]


def sample_row(sample: Mapping[str, Any], key: str) -> Tensor:
    """``(L,)`` row of a sample, the first where it comes with a batch axis; zeros where it has none (ones for a mask).

    Args:
        sample: The sample.
        key: One of `SEQUENCE_KEYS`.
    """
    if (value := sample.get(key)) is None:
        make = torch.ones_like if key == "attention_mask" else torch.zeros_like
        return make(torch.as_tensor(sample["input_ids"]))
    row = torch.as_tensor(value)
    return row[0] if row.ndim == 2 else row


def _truncate_token_axis(batch: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """Cuts the rows of a batch, and nothing else, in place.

    Args:
        batch: A batch, before the shift.
        max_length: Columns that stay; all when ``None``.

    Raises:
        ValueError: If ``mm_token_type_ids`` say that a media token would be cut.
    """
    if max_length is None:
        return batch
    types = batch.get("mm_token_type_ids")
    if isinstance(types, Tensor) and types.ndim >= 2 and types[:, max_length:].any():
        raise ValueError(f"max_length {max_length} would cut through media tokens; raise it or make the media smaller")
    for key in SEQUENCE_KEYS:
        value = batch.get(key)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] > max_length:
            batch[key] = value[:, :max_length]
    return batch
