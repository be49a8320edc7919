"""Processors that take rendered text and media side by side: Qwen2.5-VL, LLaVA-OneVision-1.5, Kimi-VL.

The template writes one placeholder per medium and the processor expands it. Frames of a video are those that are given:
none are sampled again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_vlm.processing.conversation_media import media_of, prepare_conversation, video_metadata_of
from lightning_vlm.processing.encoded import EncodedSample, cut_sample, require_part, to_sample, video_fps_of


def encode_rendered(example: Mapping[str, Any], processor: Any) -> EncodedSample:
    """Encodes one conversation for Qwen2.5-VL or LLaVA-OneVision-1.5.

    Args:
        example: Has ``conversation``; it is not changed.
        processor: The processor.

    Raises:
        ValueError: If there are videos and the processor has no part for them.
    """
    conversation = prepare_conversation(example["conversation"], video_fps=video_fps_of(processor))
    media = media_of(conversation)
    if media.videos:
        require_part(processor, "videos", ("video_processor",))
    metadata = video_metadata_of(conversation)
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
    output = processor(
        text=[text],
        images=media.images or None,
        videos=media.videos or None,
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
        **({} if metadata is None else {"video_metadata": metadata}),
    )
    return to_sample(output, conversation, processor, media)


def encode_kimi_vl(example: Mapping[str, Any], processor: Any, *, max_length: int | None = None) -> EncodedSample:
    """Encodes one conversation for Kimi-VL, which takes images alone.

    Args:
        example: Has ``conversation``; it is not changed.
        processor: The processor; it is remote code of the model's repository.
        max_length: Most tokens; the rest is cut.

    Raises:
        ValueError: If there are videos or sounds, or an image would be cut.
    """
    conversation = prepare_conversation(example["conversation"])
    media = media_of(conversation)
    if media.videos or media.audio:
        raise ValueError("Kimi-VL takes text and images; leave conversations with videos or sounds out")
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
    output = processor(
        text=[text], images=media.images or None, add_special_tokens=False, padding=True, return_tensors="pt"
    )
    return cut_sample(to_sample(output, conversation, processor, media), max_length, processor)
