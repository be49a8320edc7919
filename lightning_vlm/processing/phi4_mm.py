"""Phi-4-multimodal: text and sound (and images, where the processor takes them).

Two processors exist. Microsoft's remote code takes ``audios`` as (samples, rate) and numbers its placeholders
``<|audio_1|>``; transformers' own takes ``audio`` and one placeholder token. Both are served. The empty image tensors
that the remote code returns without an image are left out, as everything empty is (`to_sample`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from lightning_vlm.processing.conversation_media import flatten_messages, media_of, prepare_conversation, to_waveform
from lightning_vlm.processing.encoded import (
    EncodedSample,
    cut_sample,
    require_part,
    sampling_rate_of,
    to_sample,
)

MAX_LENGTH = 1024
"""Tokens at which NeMo AutoModel cuts, whatever is there; here a sound that would be cut is an error."""


def encode_phi4_mm(example: Mapping[str, Any], processor: Any, *, max_length: int = MAX_LENGTH) -> EncodedSample:
    """Encodes one conversation.

    Args:
        example: Has ``conversation`` and, unless its parts hold the sound, ``audio``: an array, a pair with its
            rate, or a dict of ``array`` and ``sampling_rate``. It is not changed.
        processor: The processor.
        max_length: Most tokens; the rest is cut.

    Returns:
        The sample, with ``input_mode`` ``(1,)``: 0 for text, 1 with images, 2 with sounds, 3 with both.

    Raises:
        ValueError: If a sound would be cut, or the processor has no part for the media.
    """
    rate = sampling_rate_of(processor)
    conversation = prepare_conversation(example["conversation"], rate)
    media = media_of(conversation)
    sounds = media.audio or ([] if example.get("audio") is None else [to_waveform(example["audio"], rate)])
    is_remote = "audios" in inspect.signature(processor.__call__).parameters
    marks = {} if is_remote else {"image": "image_token", "audio": "audio_token"}
    placeholders = {kind: getattr(processor, name) for kind, name in marks.items()}
    messages = _numbered(conversation) if is_remote else flatten_messages(conversation, placeholders)
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    inputs: dict[str, Any] = {"images": media.images}
    if is_remote:
        inputs["audios"] = [(sound, rate) for sound in sounds]
    else:
        if sounds:
            require_part(processor, "sounds", ("audio_processor", "feature_extractor"))
        inputs["audio"] = sounds
        inputs["sampling_rate"] = rate if sounds else None
    given = {name: value for name, value in inputs.items() if value}
    output = dict(processor(text=[text], padding=True, return_tensors="pt", **given))
    mode = output.pop("input_mode", None)
    sample = cut_sample(to_sample(output, conversation, processor, media), max_length, processor)
    said = bool(media.images) + 2 * bool(sounds)
    sample["input_mode"] = torch.tensor([said]) if mode is None else torch.as_tensor(mode).flatten()[:1]
    return sample


def _numbered(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with ``<|audio_k|>`` and ``<|image_k|>``, counted through the conversation."""
    text_marks = {"image": "\x00image\x00", "audio": "\x00audio\x00"}  # no text holds these
    messages = flatten_messages(conversation, text_marks)
    for kind, mark in text_marks.items():
        number = 0
        for message in messages:
            while mark in message["content"]:
                number += 1
                message["content"] = message["content"].replace(mark, f"<|{kind}_{number}|>", 1)
    return messages
