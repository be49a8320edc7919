"""What an encoder returns: one sample as a dict of unpadded tensors, whatever a processor calls its media.

A processor is asked for one sample at a time, so what a sample becomes does not depend on its neighbours in a batch,
and padding, packing and dropping are one place's work instead of ten. The price is one call per sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.processing.conversation_media import Conversation, Media, media_of
from lightning_vlm.processing.turn_labels import build_labels_from_template

SEQUENCE_KEYS = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
"""Rows of one number per token. Every other tensor of a sample is media."""
COUNT_KEYS = ("n_images", "n_videos")

_PLACEHOLDER_IDS = ("image_token_id", "video_token_id", "audio_token_id", "media_placeholder_token_id")
_PLACEHOLDER_NAMES = ("image_token", "video_token", "audio_token")
_PLACEHOLDERS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_pad|>",
    "<|media_pad|>",
    "<|endoftext10|>",
    "<|endoftext11|>",
)

EncodedSample = dict[str, Any]


def to_sample(
    output: Mapping[str, Any], conversation: Conversation, processor: Any, media: Media | None = None
) -> EncodedSample:
    """A processor's output for one conversation as a sample, labelled by its template.

    Args:
        output: ``input_ids`` ``(1, L)`` and what else the processor returned.
        conversation: The messages.
        processor: The processor.
        media: What the processor was given; that of the conversation when ``None``.

    Returns:
        `SEQUENCE_KEYS` as ``(L,)``; media as they come, without what is ``None`` or empty; numbers ``n_images`` and
        ``n_videos``.
    """
    media = media_of(conversation) if media is None else media
    sample: EncodedSample = {}
    for key, value in output.items():
        if key in SEQUENCE_KEYS:
            sample[key] = torch.as_tensor(value)[0]
        elif (tensors := as_media(value)) is not None:
            sample[key] = tensors
    if "attention_mask" not in sample:
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    if "labels" not in sample:
        sample["labels"] = build_labels_from_template(
            sample["input_ids"][None], [conversation], processor, attention_mask=sample["attention_mask"][None]
        )[0]
    return {**sample, "n_images": len(media.images), "n_videos": len(media.videos)}


def as_media(value: Any) -> Any:
    """A tensor of at least one axis, or a list of them; ``None`` for what holds nothing, no rows or no numbers.

    Args:
        value: What a processor returned under one name.
    """
    if isinstance(value, Tensor):
        return value if value.numel() and value.ndim else None
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return list(value)
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # metadata objects, names
        return None
    return found if found.numel() and found.ndim else None


def placeholder_mask(sample: Mapping[str, Any], processor: Any) -> Tensor:
    """``(L,)`` bool: True on tokens that a feature of an image, a video or a sound takes the place of.

    Args:
        sample: Has ``input_ids`` and, from some processors, ``mm_token_type_ids``.
        processor: The processor.
    """
    input_ids = sample["input_ids"]
    tokenizer = getattr(processor, "tokenizer", processor)
    owners = (processor, tokenizer)
    found = {getattr(owner, name, None) for owner in owners for name in _PLACEHOLDER_IDS}
    if (convert := getattr(tokenizer, "convert_tokens_to_ids", None)) is not None:
        names = {getattr(owner, name, None) for owner in owners for name in _PLACEHOLDER_NAMES}
        tokens = {convert(name) for name in (*_PLACEHOLDERS, *names) if isinstance(name, str)}
        found |= tokens - {getattr(tokenizer, "unk_token_id", None)}
    ids = torch.tensor([token for token in found if isinstance(token, int)], dtype=input_ids.dtype)
    mask = torch.isin(input_ids, ids)
    types = sample.get("mm_token_type_ids")
    return mask if types is None else mask | (types != 0)


def cut_sample(sample: EncodedSample, max_length: int | None, processor: Any) -> EncodedSample:
    """The first tokens of a sample; the same sample where it is short enough.

    Args:
        sample: The sample.
        max_length: Most tokens; ``None`` cuts nothing.
        processor: The processor.

    Raises:
        ValueError: If a media token would be cut: its feature would be left without a place (NeMo AutoModel's Kimi-K2.5
            collate then drops all images of the sample, defect 2A.12).
    """
    length = len(sample["input_ids"])
    if max_length is None or length <= max_length:
        return sample
    if placeholder_mask(sample, processor)[max_length:].any():
        raise ValueError(
            f"the sample has {length} tokens and max_length {max_length} would cut through its media; "
            "raise max_length, drop overlong samples, or make the media smaller"
        )
    return {key: value[:max_length] if key in SEQUENCE_KEYS else value for key, value in sample.items()}


def sampling_rate_of(processor: Any, default: int = 16_000) -> int:
    """Rate in Hz at which a processor wants sounds.

    Args:
        processor: The processor.
        default: Where it does not say.
    """
    if (rate := getattr(processor, "audio_sampling_rate", None)) is not None:
        return int(rate)
    for name in ("feature_extractor", "audio_processor"):
        if (rate := getattr(getattr(processor, name, None), "sampling_rate", None)) is not None:
            return int(rate)
    return default


def pad_token_of(processor: Any) -> int:
    """The token that pads batches: the tokenizer's, or 0 where it has none (it is masked anyway).

    Args:
        processor: A processor, or a tokenizer.
    """
    return getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None) or 0


def require_part(processor: Any, kind: str, names: tuple[str, ...]) -> None:
    """Refuses media that a processor has no part for.

    Args:
        processor: The processor.
        kind: What the media are, for the error.
        names: Attributes of which one is the part.

    Raises:
        ValueError: If the processor has none of them.
    """
    if all(getattr(processor, name, None) is None for name in names):
        raise ValueError(
            f"the conversation holds {kind}, but {type(processor).__name__} has no {' or '.join(names)}; "
            "use a processor that has one (transformers' need torchvision for videos), or leave such rows out"
        )


def video_fps_of(processor: Any) -> float:
    """Frames per second that a processor takes from a video file: its video processor's, or 2.

    Args:
        processor: The processor.
    """
    return float(getattr(getattr(processor, "video_processor", None), "fps", None) or 2.0)
