"""Conversations that are too long by estimate, left out before they are encoded: for those who migrate from NeMo.

Text is counted by the tokenizer, images by Qwen-VL's resizing rule, videos not at all. The collate functions here do
not use it: they encode first and know the length.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_vlm.automodel.estimates import MediaConfig, _estimate_image_tokens, image_config
from lightning_vlm.media.load import image_size
from lightning_vlm.media.policy import MediaPolicy
from lightning_vlm.processing.conversation_media import kind_of, parts_of
from lightning_vlm.schema import DataError

_log = logging.getLogger(__name__)


def _drop_overlong_samples(
    conversations: Sequence[Any], processor: Any, max_length: int | None
) -> tuple[Sequence[Any], list[int]]:
    """Leaves out conversations that are estimated at more tokens than allowed.

    Args:
        conversations: Messages of each sample.
        processor: Renders and counts.
        max_length: Most tokens; ``None`` keeps all.

    Returns:
        (conversations that stay, their positions). What cannot be estimated stays.

    Raises:
        ValueError: If none stays.
    """
    if max_length is None:
        return conversations, list(range(len(conversations)))
    kept = []
    for position, conversation in enumerate(conversations):
        try:
            is_short = _estimated_tokens(conversation, processor) <= max_length
        except Exception as error:  # whatever a template or tokenizer raises: encoding will tell
            _log.debug("conversation %d cannot be estimated and stays: %s", position, error)
            is_short = True
        if is_short:
            kept.append(position)
    report_dropped(len(conversations) - len(kept), len(conversations), max_length)
    return [conversations[position] for position in kept], kept


def report_dropped(dropped: int, total: int, max_length: int) -> None:
    """Says how many samples of a batch are left out.

    Args:
        dropped: So many.
        total: Of so many.
        max_length: Because they have more tokens than this.

    Raises:
        ValueError: If none is left.
    """
    if dropped == total:
        raise ValueError(f"all {total} samples of the batch have more than max_length {max_length} tokens; raise it")
    if dropped:
        _log.warning(
            "%d of %d samples have more than max_length %d tokens and are left out", dropped, total, max_length
        )


def _estimated_tokens(conversation: Sequence[Mapping[str, Any]], processor: Any) -> int:
    rendered = processor.apply_chat_template([conversation], tokenize=False)
    text = rendered if isinstance(rendered, str) else rendered[0]
    tokenizer = getattr(processor, "tokenizer", processor)
    return len(tokenizer.encode(text, add_special_tokens=False)) + _estimate_media_tokens(conversation, processor)


def _estimate_media_tokens(conversation: Sequence[Mapping[str, Any]], processor: Any) -> int:
    """Tokens that media take besides their placeholder; 0 for videos, and for what cannot be read.

    Args:
        conversation: The messages.
        processor: Has an ``image_processor``, or media take none.
    """
    if (config := _extract_image_config(processor)) is None:
        return 0
    total = 0
    for part in (part for message in conversation for part in parts_of(message)):
        if kind_of(part) == "image" and (size := _size(part.get("image"))) is not None:
            total += max(_estimate_image_tokens(size, config) - 1, 0)
    return total


def _size(image: Any) -> tuple[int, int] | None:
    if isinstance(image, Image.Image):
        return image.height, image.width
    try:
        return image_size(image, MediaPolicy(Path.cwd()), "conversation") if isinstance(image, str) else None
    except DataError:
        return None


def _extract_image_config(processor: Any) -> MediaConfig | None:
    """See `automodel.estimates.image_config`.

    Args:
        processor: The processor.
    """
    return image_config(processor)
