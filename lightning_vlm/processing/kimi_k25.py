"""Kimi-K2.5 as its repository's own processor has it: one placeholder per image, expanded here.

Its model would expand them in its forward pass, at a length that is only then known; expanded before, a batch has its
final length and can be padded, packed and split for a pipeline. (transformers' ``Kimi_K25Processor`` expands by itself
and is of the family of `template_encoder`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.processing.conversation_media import media_of, prepare_conversation
from lightning_vlm.processing.encoded import EncodedSample, to_sample

_DEFAULT_MERGE_KERNEL: tuple[int, int] = (2, 2)
_MEDIA_TOKEN, _MEDIA_TOKEN_ID = "<|media_pad|>", 163605


def encode_kimi_k25(example: Mapping[str, Any], processor: Any) -> EncodedSample:
    """Encodes one conversation.

    Args:
        example: Has ``conversation``; it is not changed.
        processor: The processor, called with ``text`` and ``medias``; it returns ``grid_thws`` ``(num_images, 3)``.

    Returns:
        The sample, with ``grid_thws`` and ``image_grid_hws`` ``(num_images, 2)``.

    Raises:
        ValueError: If there are videos or sounds, or placeholders and images differ in number.
    """
    conversation = prepare_conversation(example["conversation"])
    media = media_of(conversation)
    if media.videos or media.audio:
        raise ValueError("this Kimi-K2.5 encoder takes text and images; leave conversations with videos or sounds out")
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
    medias = [{"type": "image", "image": image} for image in media.images]
    output = dict(processor(text=text, medias=medias or None, return_tensors="pt"))
    grids = output.get("grid_thws")
    if grids is not None and len(grids):
        ids, mask = output["input_ids"][0], output.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[0]
        kernel = getattr(getattr(processor, "image_processor", None), "merge_kernel_size", _DEFAULT_MERGE_KERNEL)
        ids, mask = _expand_image_tokens(ids, mask, grids, media_token_id(processor), tuple(kernel))
        output |= {"input_ids": ids[None], "attention_mask": mask[None], "image_grid_hws": grids[:, 1:]}
    return to_sample(output, conversation, processor, media)


def media_token_id(processor: Any) -> int:
    """The placeholder: the processor's, the tokenizer's ``<|media_pad|>``, or the one of the release.

    Args:
        processor: The processor.
    """
    if (named := getattr(processor, "media_placeholder_token_id", None)) is not None:
        return int(named)
    tokenizer = getattr(processor, "tokenizer", None)
    convert = getattr(tokenizer, "convert_tokens_to_ids", None)
    found = None if convert is None else convert(_MEDIA_TOKEN)
    return found if isinstance(found, int) and found != getattr(tokenizer, "unk_token_id", None) else _MEDIA_TOKEN_ID


def _expand_image_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    grid_thws: Tensor,
    media_token_id: int,
    merge_kernel_size: tuple[int, int] = _DEFAULT_MERGE_KERNEL,
) -> tuple[Tensor, Tensor]:
    """Repeats each placeholder as often as its image has features.

    Args:
        input_ids: ``(L,)`` with one placeholder per image.
        attention_mask: ``(L,)``.
        grid_thws: ``(num_images, 3)`` patches (frames, height, width) of each; the frames do not count.
        media_token_id: The placeholder.
        merge_kernel_size: Patches (height, width) that become one feature.

    Returns:
        (input_ids, attention_mask), longer and with the mask 1 on placeholders; the same tensors if there are none.

    Raises:
        ValueError: If placeholders and images differ in number.
    """
    is_media = input_ids == media_token_id
    if not is_media.any():
        return input_ids, attention_mask
    if (found := int(is_media.sum())) != len(grid_thws):
        raise ValueError(f"{found} image placeholder(s) for {len(grid_thws)} image(s)")
    height, width = merge_kernel_size
    repeats = torch.ones(len(input_ids), dtype=torch.int64)
    repeats[is_media] = (grid_thws[:, 1] // height * (grid_thws[:, 2] // width)).to(repeats)
    mask = attention_mask.masked_fill(is_media, 1)
    return input_ids.repeat_interleave(repeats), mask.repeat_interleave(repeats)
