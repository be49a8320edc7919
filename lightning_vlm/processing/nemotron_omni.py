"""Nemotron-3-Nano-Omni: images, one video and sounds per conversation, in a template that takes plain strings.

Three processors are of this family: ours (`NemotronVLProcessor`, images), transformers' own, and NVIDIA's remote code.
They return pixels as packed patches with their grids, or as one tensor per image with ``image_flags``; both pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers import ParakeetFeatureExtractor
from transformers.video_utils import VideoMetadata

from lightning_vlm.processing.conversation_media import (
    flatten_messages,
    media_of,
    prepare_conversation,
    to_waveform,
    video_metadata_of,
)
from lightning_vlm.processing.encoded import EncodedSample, cut_sample, require_part, sampling_rate_of, to_sample

_SOUND_KEYS = ("input_features", "sound_features", "sound_clips")


def encode_nemotron_omni(
    example: Mapping[str, Any], processor: Any, *, max_length: int | None = None, max_video_frames: int = 8
) -> EncodedSample:
    """Encodes one conversation.

    Unlike in NeMo AutoModel labels come from the template, so ``<think>`` and all text parts of an answer are trained
    on; sounds are resampled without aliasing; cutting through media is an error.

    Args:
        example: Has ``conversation`` and, unless its parts hold the sound, ``audio``: an array, or a pair with its
            rate. It is not changed.
        processor: The processor.
        max_length: Most tokens; the rest is cut.
        max_video_frames: Most frames of a video; more are thinned out evenly, to an even number.

    Returns:
        The sample. Pixels of several sizes are a list; ``image_flags`` ``(num_images, 1)`` where there are no grids;
        ``sound_features`` ``(num_clips, frames, mel_bins)`` float32 and ``sound_attention_mask`` where the processor
        makes no features by itself.

    Raises:
        NotImplementedError: If there are several videos.
        ValueError: If media would be cut, or the processor has no part for videos.
    """
    rate = sampling_rate_of(processor)
    conversation = prepare_conversation(example["conversation"], rate, max_video_frames=max_video_frames)
    media = media_of(conversation)
    if len(media.videos) > 1:
        raise NotImplementedError(f"the conversation holds {len(media.videos)} videos; the processor takes one")
    sounds = media.audio or ([] if example.get("audio") is None else [to_waveform(example["audio"], rate)])
    names = {"image": "<image>", "video": "<video>", "audio": "<so_embedding>"}
    tokens = {kind: getattr(processor, f"{kind}_token", text) for kind, text in names.items()}
    messages = flatten_messages(conversation, tokens)
    if sounds and not media.audio:
        messages = _with_placeholder(messages, tokens["audio"])
    text = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=False, **_own(processor)
    )
    inputs: dict[str, Any] = {}
    if media.images:
        inputs["images"] = media.images
    if media.videos:
        if hasattr(processor, "video_processor"):
            require_part(processor, "videos", ("video_processor",))
        frames = media.videos[0]
        chosen = choose_frames(len(frames), max_video_frames)
        inputs["videos"] = [[frames[index] for index in chosen]]
        for known in video_metadata_of(conversation) or []:
            indices = [known["frames_indices"][index] for index in chosen]
            inputs["video_metadata"] = VideoMetadata(**{**known, "frames_indices": indices})
    if sounds:
        inputs["audio"] = sounds
    output = dict(processor(text=[text], return_tensors="pt", **inputs))
    if "pixel_values" in output and not any(key.startswith("image_grid") for key in output):
        output["image_flags"] = torch.ones(len(output["pixel_values"]), 1, dtype=torch.int64)
    if sounds and not any(key in output for key in _SOUND_KEYS):
        features = _feature_extractor(rate)(sounds, sampling_rate=rate, return_tensors="pt")
        output |= {"sound_features": features["input_features"], "sound_attention_mask": features["attention_mask"]}
    return cut_sample(to_sample(output, conversation, processor, media), max_length, processor)


def choose_frames(total: int, max_frames: int) -> list[int]:
    """Which frames of a video are taken: all, or evenly spaced ones in an even number, first and last included.

    Args:
        total: Frames that there are.
        max_frames: Most frames.
    """
    if total <= max_frames:
        return list(range(total))
    count = max_frames if max_frames % 2 == 0 else max(2, max_frames - 1)
    return torch.linspace(0, total - 1, count).round().long().tolist()


def _with_placeholder(messages: list[dict[str, Any]], token: str) -> list[dict[str, Any]]:
    """A sound that stands beside the conversation is heard first, unless its text says where."""
    if any(token in message["content"] for message in messages):
        return messages
    first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), 0)
    return [
        {**message, "content": token + message["content"]} if number == first else message
        for number, message in enumerate(messages)
    ]


def _own(processor: Any) -> dict[str, Any]:
    """The processor's own template, where its tokenizer has none or another."""
    template = getattr(processor, "chat_template", None)
    differs = isinstance(template, str) and template != getattr(processor.tokenizer, "chat_template", None)
    return {"chat_template": template} if differs else {}


@lru_cache(maxsize=4)
def _feature_extractor(rate: int) -> ParakeetFeatureExtractor:
    return ParakeetFeatureExtractor(sampling_rate=rate)
