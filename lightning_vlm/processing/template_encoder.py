"""Any transformers processor whose chat template places the media itself: Gemma 3 and 4, LLaVA-OneVision, Qwen3-VL...

The conversation is handed to ``apply_chat_template``, which is also what one calls at inference; so this is the family
of every processor that nothing else is known of. What a template does to media is not checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_vlm.processing.conversation_media import media_of, prepare_conversation, video_metadata_of
from lightning_vlm.processing.encoded import (
    EncodedSample,
    cut_sample,
    require_part,
    sampling_rate_of,
    to_sample,
    video_fps_of,
)
from lightning_vlm.processing.thinking_prefix import gemma4_inject_thinking_prefix

Hook = Callable[[Any, Any], Any]


def encode_with_template(
    example: Mapping[str, Any], processor: Any, *, max_length: int | None = None, hook: Hook | None = None
) -> EncodedSample:
    """Encodes one conversation.

    Args:
        example: Has ``conversation``; it is not changed.
        processor: The processor.
        max_length: Most tokens; the rest is cut.
        hook: ``(batch of this one sample, processor) -> batch``, called before labels are made.

    Raises:
        ValueError: If media would be cut, or the processor has no part for them.
    """
    rate, fps = sampling_rate_of(processor), video_fps_of(processor)
    conversation = prepare_conversation(example["conversation"], rate, video_fps=fps)
    media = media_of(conversation)
    if media.videos:
        require_part(processor, "videos", ("video_processor",))
    options: dict[str, Any] = {"processor_kwargs": {"do_sample_frames": False}} if media.videos else {}
    if (metadata := video_metadata_of(conversation)) is not None:
        options["processor_kwargs"]["video_metadata"] = [metadata]
    output = processor.apply_chat_template(
        [conversation], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=False, **options
    )
    if hook is not None:
        output = hook(output, processor)
    return cut_sample(to_sample(output, conversation, processor, media), max_length, processor)


def encode_gemma4_prefix(example: Mapping[str, Any], processor: Any, *, max_length: int | None = None) -> EncodedSample:
    """Encodes one conversation with the empty thinking channel of Gemma 4, which is not trained on.

    Args:
        example: As for `encode_with_template`.
        processor: As for `encode_with_template`.
        max_length: As for `encode_with_template`, counted with the channel.

    Raises:
        ValueError: As for `encode_with_template`.
    """
    return encode_with_template(example, processor, max_length=max_length, hook=gemma4_inject_thinking_prefix)
