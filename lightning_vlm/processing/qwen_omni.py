"""Qwen3-Omni: images, videos and sounds, and videos with their sound.

Media are gathered here, so ``qwen_omni_utils`` is not needed. What comes in are decoded frames and samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_vlm.processing.conversation_media import (
    Conversation,
    kind_of,
    media_of,
    parts_of,
    prepare_conversation,
    to_waveform,
    video_metadata_of,
)
from lightning_vlm.processing.encoded import EncodedSample, require_part, sampling_rate_of, to_sample, video_fps_of


def encode_qwen_omni(example: Mapping[str, Any], processor: Any, *, use_audio_in_video: bool = False) -> EncodedSample:
    """Encodes one conversation.

    Args:
        example: Has ``conversation``; it is not changed.
        processor: The processor.
        use_audio_in_video: Interleave each video with its sound, the ``audio`` of its own part.

    Raises:
        ValueError: If a video has no sound although it is to be used, or the processor has no part for the media.
    """
    rate = sampling_rate_of(processor)
    conversation = prepare_conversation(example["conversation"], rate, video_fps=video_fps_of(processor))
    media = media_of(conversation)
    inputs: dict[str, Any] = {"images": media.images, "videos": media.videos, "audio": media.audio}
    if media.videos:
        require_part(processor, "videos", ("video_processor",))
    if use_audio_in_video and media.videos:
        inputs["audio"], inputs["audio_from_video_indices"] = _with_sound_of_videos(conversation, rate)
        inputs["load_audio_from_video"] = True
    inputs["video_metadata"] = video_metadata_of(conversation)
    text = processor.apply_chat_template([conversation], tokenize=False, add_generation_prompt=False)
    output = processor(
        text=[text] if isinstance(text, str) else text,
        padding=True,
        return_tensors="pt",
        **{name: value for name, value in inputs.items() if value},
    )
    return to_sample(output, conversation, processor, media)


def _with_sound_of_videos(conversation: Conversation, rate: int) -> tuple[list[Any], list[int | None]]:
    """All sounds in reading order, and for each the video that it belongs to."""
    sounds: list[Any] = []
    owners: list[int | None] = []
    videos = 0
    for part in (part for message in conversation for part in parts_of(message)):
        kind = kind_of(part)
        if kind == "audio":
            sounds.append(part["audio"])
            owners.append(None)
        elif kind == "video":
            if part.get("audio") is None:
                raise ValueError(
                    "use_audio_in_video is on, but a video part has no 'audio'; expected its samples there"
                )
            sounds.append(to_waveform(part["audio"], rate))
            owners.append(videos)
            videos += 1
    return sounds, owners
