"""Plain dict samples -> one pack, NeMo AutoModel's way: shifted, one after another, numbered. For those who migrate.

A sample is a dict of 1-D ``input_ids``, ``labels`` and ``attention_mask``, optionally with ``mm_token_type_ids`` and
media. The shift happens here, before packing, so labels of a pack are those of the *next* token: a model that shifts
by itself must not be given them. Our own path (`data.collate`) leaves labels unshifted, carries boundaries as
``cu_seqlens`` alone and takes typed Samples, whose fields cannot be forgotten by a list of keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_vlm.schema import IGNORE_INDEX
from lightning_vlm.segments import cu_seqlens_from_lengths, position_ids_from_cu_seqlens, seq_idx_from_cu_seqlens

MEDIA_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)
"""NeMo AutoModel's media of a sample; a pack holds all of these keys, ``None`` for what it has none of."""

EXTRA_MEDIA_KEYS = (
    "image_flags",
    "imgs_sizes",
    "image_sizes",
    "image_grid_hws",
    "grid_thws",
    "num_patches",
    "patch_pixel_values",
    "patch_newline_mask",
    "image_grid_hw",
    "batch_num_images",
    "pixel_attention_mask",
    "image_pixel_values",
    "image_attention_mask",
    "input_image_embeds",
    "video_position_ids",
    "video_second_per_grid",
    "sound_features",
    "sound_attention_mask",
    "input_features",
    "input_features_mask",
    "feature_attention_mask",
    "audio_input_features",
    "input_audio_embeds",
    "audio_embed_sizes",
    "audio_attention_mask",
)
"""Media of Nemotron Omni, Kimi, LLaVA, Gemma, Step3, Qwen Omni and Phi-4, which NeMo's packing loses: Omni then trains
on text alone. A pack holds those that its samples have."""

_PIXELS = ("pixel_values", "pixel_values_videos")
_ONE_ROW_PER_IMAGE = (
    "image_grid_thw", "image_grid_hws", "image_grid_hw", "grid_thws", "imgs_sizes", "image_sizes", "image_flags",
)  # fmt: skip
_COUNTS = ("n_images", "n_videos")


def _aligned_length(length: int, alignment: int) -> int:
    """Rounds a length up to a multiple of ``alignment``; 0 stays 0.

    Args:
        length: Tokens.
        alignment: At least 1.

    Raises:
        ValueError: If the alignment is less than 1.
    """
    if alignment < 1:
        raise ValueError(f"sequence_alignment is {alignment}; expected at least 1")
    return -(-length // alignment) * alignment


def check_alignment(sequence_alignment: int, has_mrope: bool) -> None:
    """Refuses an alignment below 1, and any other than 1 with mRoPE.

    Args:
        sequence_alignment: Documents are padded to a multiple of it.
        has_mrope: Whether positions have three axes.

    Raises:
        ValueError: If the alignment is less than 1.
        NotImplementedError: If documents are to be padded that have positions of three axes.
    """
    if _aligned_length(1, sequence_alignment) > 1 and has_mrope:
        raise NotImplementedError(
            f"sequence_alignment is {sequence_alignment} and positions have three axes (mRoPE); documents with such "
            "positions cannot be padded: use sequence_alignment=1"
        )


def _compute_mrope_position_ids(sample: dict[str, Any], get_rope_index: Callable[..., Any]) -> Tensor | None:
    """Positions of a sample on the three axes of mRoPE.

    Args:
        sample: Has ``input_ids`` ``(L,)`` or ``(1, L)`` and what else the function asks for by name:
            ``image_grid_thw``, ``video_grid_thw``, ``second_per_grid_ts``, ``attention_mask``, ``mm_token_type_ids``
            (made from the token ids in the config of the function's model where the sample has none).
        get_rope_index: ``model.get_rope_index``.

    Returns:
        ``(3, L)``. ``None`` where the function's signature is unknown, has no ``input_ids``, or it returns ``None``
        for positions (which fails in NeMo AutoModel).
    """
    try:
        names = inspect.signature(get_rope_index).parameters
    except (TypeError, ValueError):
        return None
    if "input_ids" not in names:
        return None
    input_ids = _batched(sample["input_ids"])
    known = {name: sample.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    known |= {"input_ids": input_ids, "attention_mask": _batched(sample.get("attention_mask"))}
    if "mm_token_type_ids" in names:
        types = _batched(sample.get("mm_token_type_ids"))
        if types is None:
            config = getattr(getattr(get_rope_index, "__self__", None), "config", None)
            types = torch.zeros_like(input_ids)
            for number, name in ((1, "image_token_id"), (2, "video_token_id")):
                if (token := getattr(config, name, None)) is not None:
                    types[input_ids == token] = number
        known["mm_token_type_ids"] = types
    with torch.no_grad():
        found = get_rope_index(**{name: value for name, value in known.items() if name in names})
    positions = found[0] if isinstance(found, (tuple, list)) else found
    return positions[:, 0] if positions is not None and positions.ndim == 3 else positions


def _shift_sample(sample: dict[str, Any], has_mrope: bool = False) -> dict[str, Any]:
    """Pairs every token with the label of the next one: tokens without the last, labels without the first.

    Args:
        sample: Has ``input_ids``, ``labels`` and ``attention_mask`` of ``(L,)``.
        has_mrope: Shift its ``position_ids`` ``(3, L)`` too; they are dropped otherwise.

    Returns:
        Tensors of ``(L - 1,)``, and the sample's own media that are not ``None``: `MEDIA_KEYS`, and unlike in NeMo
        AutoModel `EXTRA_MEDIA_KEYS` and the counts ``n_images`` and ``n_videos``. Everything else is left behind.

    Raises:
        KeyError: If one of the three is missing.
    """
    shifted = {
        "input_ids": sample["input_ids"][:-1],
        "labels": sample["labels"][1:],
        "attention_mask": sample["attention_mask"][:-1],
    }
    if sample.get("mm_token_type_ids") is not None:
        shifted["mm_token_type_ids"] = token_types(sample)[:-1]
    if has_mrope and sample.get("position_ids") is not None:
        shifted["position_ids"] = sample["position_ids"][..., :-1]
    kept = (*MEDIA_KEYS, *EXTRA_MEDIA_KEYS, *_COUNTS)
    return shifted | {key: sample[key] for key in kept if sample.get(key) is not None}


def token_types(sample: dict[str, Any]) -> Tensor:
    """``(L,)`` int64 ``mm_token_type_ids`` of a sample, row 0 where they come with a batch axis, 0 where it has none.

    Args:
        sample: The sample.
    """
    if (types := sample.get("mm_token_type_ids")) is None:
        return torch.zeros(len(sample["input_ids"]), dtype=torch.int64)
    types = torch.as_tensor(types, dtype=torch.int64)
    return types[0] if types.ndim == 2 else types


def _build_packed_vlm_sample(
    samples: list[dict[str, Any]],
    pack_size: int,
    padding_idx: int,
    has_mrope: bool = False,
    sequence_alignment: int = 1,
) -> dict[str, Any]:
    """Concatenates shifted samples. Nothing is cut, and nothing is padded to ``pack_size``.

    Three things differ from NeMo AutoModel. Tokens that a sample's own mask hides (those of a fake image) stay hidden:
    their number is 0. A document without mRoPE positions among others that have them gets those of text, so positions
    always cover the pack. Images as a tensor and as a list of sizes may meet in one pack.

    Args:
        samples: What `_shift_sample` returned; ``attention_mask`` may be missing.
        pack_size: Not used; it is NeMo's.
        padding_idx: Token that pads documents to the alignment.
        has_mrope: Positions have three axes.
        sequence_alignment: Each document is padded to a multiple of this many tokens.

    Returns:
        ``input_ids``, ``labels``, ``mm_token_type_ids`` and ``attention_mask`` ``(T,)`` int64, the last being the
        document's number from 1 (empty documents count, padding of the alignment has it too); ``position_ids``
        ``(T,)``, from 0 in each document, or ``(3, T)`` with mRoPE; lists ``seq_lens`` and ``seq_lens_padded``;
        numbers ``n_images`` and ``n_videos``; all `MEDIA_KEYS`, and the `EXTRA_MEDIA_KEYS` that there are.

    Raises:
        ValueError: If the alignment is less than 1, or with mRoPE a document's positions are not one per token or are
            missing although it has media.
        NotImplementedError: If the alignment is more than 1 with mRoPE.
        TypeError: If images are a list in one sample and flat patches in another.
    """
    check_alignment(sequence_alignment, has_mrope)
    lengths = [len(sample["input_ids"]) for sample in samples]
    padded = [_aligned_length(length, sequence_alignment) for length in lengths]

    def joined(rows: Sequence[Tensor], value: int) -> Tensor:
        parts = [pad(row.long(), (0, total - len(row)), value=value) for row, total in zip(rows, padded)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    visible = [
        torch.ones(length) if sample.get("attention_mask") is None else sample["attention_mask"] != 0
        for sample, length in zip(samples, lengths)
    ]
    cu_seqlens = cu_seqlens_from_lengths(padded)
    position_ids = position_ids_from_cu_seqlens(cu_seqlens)
    if has_mrope:
        blocks = [_mrope_block(sample, number) for number, sample in enumerate(samples)]
        position_ids = torch.cat([position_ids.new_zeros(3, 0), *blocks], dim=1)
    media = {
        key: merge_media(key, [sample[key] for sample in samples if sample.get(key) is not None])
        for key in (*MEDIA_KEYS, *EXTRA_MEDIA_KEYS)
    }
    images = next((media[key] for key in _ONE_ROW_PER_IMAGE if media[key] is not None), ())
    videos = media["video_grid_thw"]
    rows = {"n_images": len(images), "n_videos": 0 if videos is None else len(videos)}
    # An encoder counted what was in the conversation; not every processor has a row per image.
    counted = {name: sum(sample.get(name, 0) for sample in samples) for name in _COUNTS}
    return {
        "input_ids": joined([sample["input_ids"] for sample in samples], padding_idx),
        "labels": joined([sample["labels"] for sample in samples], IGNORE_INDEX),
        "attention_mask": (seq_idx_from_cu_seqlens(cu_seqlens).long() + 1) * joined(visible, 1),
        "mm_token_type_ids": joined([token_types(sample) for sample in samples], 0),
        "position_ids": position_ids,
        "seq_lens": lengths,
        "seq_lens_padded": padded,
        **{name: counted[name] or rows[name] for name in _COUNTS},
        **{key: value for key, value in media.items() if key in MEDIA_KEYS or value is not None},
    }


def merge_media(key: str, values: Sequence[Any]) -> Any:
    """The media of several samples, or of several packs, as one.

    Args:
        key: Which of `MEDIA_KEYS` or `EXTRA_MEDIA_KEYS`.
        values: Tensors whose first axis is concatenated; where others differ, e.g. the duration of sounds or the number
            of tiles, they are filled up. Pixels may also be lists of images, which are joined; and if only some are
            lists, or images differ in size, so are the rows of tensors that hold an image each.

    Returns:
        A tensor, a list of images, or ``None`` for no values.

    Raises:
        TypeError: If pixels of which only some are a list, or that differ in width, are not one image per row.
    """
    if not values:
        return None
    if key in _PIXELS and not _go_together(values):
        return _as_images(key, values)
    tensors = [torch.as_tensor(value) for value in values]
    if len({tensor.ndim for tensor in tensors}) == 1:  # sounds of several durations, images of several tiles
        widths = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
        fill = -1 if key.endswith("position_ids") else 0
        tensors = [_widened(tensor, widths, fill) for tensor in tensors]
    return torch.cat(tensors)


def _go_together(pixels: Sequence[Any]) -> bool:
    """Whether pixels are tensors of one shape, or of images that differ in their number of tiles alone (5 axes)."""
    if not _all_tensors(pixels):
        return False
    return len({value.shape[2 if value.ndim == 5 else 1 :] for value in pixels}) == 1


def _as_images(key: str, values: Sequence[Any]) -> list[Tensor]:
    if any(isinstance(value, Tensor) and value.ndim < 4 for value in values):
        kinds = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
        raise TypeError(f"{key} of the samples do not go together: {kinds}; expected the same kind of all")
    return [image for value in values for image in value]


def _widened(tensor: Tensor, widths: Sequence[int], fill: int) -> Tensor:
    """A tensor whose axes but the first are filled up at their end: silence, or tiles that masks or sizes hide."""
    missing = [width - size for width, size in zip(widths, tensor.shape[1:])]
    return (
        pad(tensor, [number for size in reversed(missing) for number in (0, size)], value=fill)
        if any(missing)
        else tensor
    )


def _all_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _mrope_block(sample: dict[str, Any], number: int) -> Tensor:
    """``(3, n)`` positions of a document."""
    length, block = len(sample["input_ids"]), sample.get("position_ids")
    if block is None:
        if any(sample.get(key) is not None for key in _PIXELS):
            raise ValueError(f"document {number} has media but no position_ids, and mRoPE needs those of its grid")
        block = position_ids_from_cu_seqlens(cu_seqlens_from_lengths([length]))
    if block.shape[-1] != length:
        raise ValueError(f"document {number} has {block.shape[-1]} positions for {length} tokens")
    return block.expand(3, length)


def _batched(value: Any) -> Any:
    """A tensor with a batch axis; ``None`` stays."""
    if value is None:
        return None
    value = torch.as_tensor(value)
    return value[None] if value.ndim == 1 else value
