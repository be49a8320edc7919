"""A white image in conversations that have none, hidden from attention: NeMo AutoModel's way to keep ranks in step.

A vision tower that is sharded must run on every rank, so a rank without images is given one. Its tokens are in the
sequence but may not be attended to; a Mamba layer sees them all the same. Our own models run the tower on a dummy
outside of the sequence instead; these functions are for the other processors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_vlm.processing.conversation_media import kind_of, parts_of

_log = logging.getLogger(__name__)

_FAKE_IMAGE = Image.new("RGB", (56, 56), "white")

_ID_NAMES = (
    "image_token_id",
    "video_token_id",
    "image_token_index",
    "video_token_index",
    "image_pad_token_id",
    "video_pad_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "boi_token_id",
    "eoi_token_id",
    "media_placeholder_token_id",
)
_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|media_pad|>",
    "<|media_start|>",
    "<|media_end|>",
    "<image>",
    "<video>",
    "<img>",
    "</img>",
    "<image_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
    "<IMG_CONTEXT>",
)
_FUZZY = ("image", "video", "media", "vision", "img_pad", "vid_pad")

_warned: set[str] = set()


def inject_fake_image_into_conversation(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of a conversation whose first user message begins with a white image.

    Args:
        conversation: The messages; they are not changed.

    Returns:
        New messages; what they hold besides content is shared. Without a user message there is a new one in front.
    """
    image = {"type": "image", "image": _FAKE_IMAGE.copy()}
    messages = [dict(message) for message in conversation]
    for message in messages:
        if message.get("role") == "user":
            message["content"] = [image, *parts_of(message)]
            return messages
    return [{"role": "user", "content": [image]}, *messages]


def inject_fake_image(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example with a fake image, marked so that collate functions hide it; the same content if it has media.

    Args:
        example: Has ``conversation``; it is not changed.
    """
    if _conversation_has_media(example["conversation"]):
        return dict(example)
    conversation = inject_fake_image_into_conversation(example["conversation"])
    return {**example, "conversation": conversation, "_injected_fake": True}


def _conversation_has_media(conversation: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation holds an image or a video (a sound needs no vision tower).

    Args:
        conversation: The messages.
    """
    return any(kind_of(part) in ("image", "video") for message in conversation for part in parts_of(message))


def _batch_has_media(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether any of several conversations holds an image or a video.

    Args:
        conversations: Messages of each sample.
    """
    return any(_conversation_has_media(conversation) for conversation in conversations)


def _get_vision_token_ids(processor: Any) -> set[int]:
    """Ids of the tokens that stand for images and videos or open and close them.

    By the names under which processors and configs keep them, by the tokens of known models, and by what added tokens
    are called.

    Args:
        processor: A processor, or its tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    owners = (processor, tokenizer, getattr(processor, "config", None))
    found = {getattr(owner, name, None) for owner in owners for name in _ID_NAMES}
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        unknown = getattr(tokenizer, "unk_token_id", None)
        found |= {token for token in map(tokenizer.convert_tokens_to_ids, _TOKENS) if token != unknown}
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    found |= {token for text, token in added.items() if any(part in text.lower() for part in _FUZZY)}
    return {token for token in found if isinstance(token, int) and not isinstance(token, bool)}


def mask_fake_vision_tokens_single(sample: dict[str, Any], processor: Any) -> dict[str, Any]:
    """Hides the vision tokens of a sample from attention.

    Args:
        sample: ``input_ids`` and ``attention_mask`` of ``(L,)``; it gets a new mask, in place.
        processor: Tells the tokens; one that tells none is warned of, once per class.

    Returns:
        The same dict. What is hidden survives packing (`neat_samples`).
    """
    sample["attention_mask"] = _hidden(sample["input_ids"], sample["attention_mask"], processor)
    return sample


def mask_fake_vision_tokens_batch(
    batch: dict[str, Any], processor: Any, sample_indices: Sequence[int]
) -> dict[str, Any]:
    """Hides the vision tokens of some rows of a batch from attention.

    Args:
        batch: ``input_ids`` and ``attention_mask`` of ``(B, L)``; it gets a new mask, in place.
        processor: As for `mask_fake_vision_tokens_single`.
        sample_indices: Rows that hold a fake image.

    Returns:
        The same dict.
    """
    mask = batch["attention_mask"].clone()
    for row in sample_indices:
        mask[row] = _hidden(batch["input_ids"][row], mask[row], processor)
    batch["attention_mask"] = mask
    return batch


def _hidden(input_ids: Tensor, mask: Tensor, processor: Any) -> Tensor:
    ids = _get_vision_token_ids(processor)
    if not ids and (name := type(processor).__name__) not in _warned:
        _warned.add(name)
        _log.warning("the vision tokens of %s are not known: a fake image can be attended to", name)
    return mask.masked_fill(torch.isin(input_ids, torch.tensor(sorted(ids), dtype=input_ids.dtype)), 0)
