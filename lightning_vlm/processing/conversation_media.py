"""Images, videos and sounds inside a conversation of plain dicts: found, counted and made ready, never written back.

A message's content is a string or a list of parts like ``{"type": "image", "image": picture}``. Datasets hand out the
same dicts again and again, so a part that changes (a picture that becomes RGB, a file that is read) becomes a new dict:
writing it back would keep every picture that a worker ever touched (defect 2D of the peer).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_vlm.media.audio import load_audio
from lightning_vlm.media.load import load_image
from lightning_vlm.media.policy import MediaPolicy
from lightning_vlm.media.video import load_video

Message = Mapping[str, Any]
Conversation = Sequence[Message]

SOURCE = "conversation"
"""What errors name: a conversation that is handed over in memory has no file and no line."""

_EXPECTED = {
    "image": "a PIL image, an array of pixels, or a file under the working folder",
    "video": "a list of images, an array of them, or a file under the working folder",
    "audio": "an array of samples, a pair (samples, sampling rate in Hz), or a file under the working folder",
}


@dataclass(frozen=True, slots=True)
class Media:
    """What a conversation shows, in reading order.

    Attributes:
        images: PIL images or arrays.
        videos: Lists of frames.
        audio: Sounds, as `prepare_conversation` leaves them.
    """

    images: list[Any]
    videos: list[Any]
    audio: list[Any]


def kind_of(part: Any) -> str | None:
    """``image``, ``video`` or ``audio`` for a part that is one, by its type or by its key; ``None`` for text.

    Args:
        part: One part of a message's content.
    """
    if not isinstance(part, Mapping):
        return None
    named = part.get("type")
    if named in _EXPECTED:
        return named
    return next((kind for kind in _EXPECTED if part.get(kind) is not None), None) if named != "text" else None


def parts_of(message: Message) -> list[Any]:
    """Parts of a message's content; a string is one text part.

    Args:
        message: The message.
    """
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or [])


def media_of(conversation: Conversation) -> Media:
    """The media of a conversation.

    Args:
        conversation: The messages, see `prepare_conversation`.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in _EXPECTED}
    for message in conversation:
        for part in parts_of(message):
            if (kind := kind_of(part)) is not None:
                found[kind].append(part.get(kind))
    return Media(found["image"], found["video"], found["audio"])


def prepare_conversation(
    conversation: Conversation,
    sampling_rate: int | None = None,
    *,
    max_video_frames: int | None = None,
    video_fps: float | None = None,
) -> list[dict[str, Any]]:
    """A copy of the messages whose media are decoded; parts that need nothing are shared.

    Images become RGB, videos lists of RGB frames with their ``video_metadata``, files are read.

    Args:
        conversation: The messages. A video part may say the ``fps`` of a list of frames.
        sampling_rate: Make sounds one channel of this rate in Hz; they stay as they are when ``None``.
        max_video_frames: Frames that are taken from a longer video file. Lists are left as they are.
        video_fps: Frames per second that are taken from a video file.

    Raises:
        ValueError: If a part has a type but nothing of that kind.
        MediaError: If a medium cannot be read, or its file lies outside the working folder.
    """
    prepared = []
    for message in conversation:
        content = message.get("content")
        if not isinstance(content, str):
            content = [_prepare(part, sampling_rate, max_video_frames, video_fps) for part in parts_of(message)]
        prepared.append({**message, "content": content})
    return prepared


def _prepare(part: Any, sampling_rate: int | None, max_frames: int | None, fps: float | None) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if (kind := kind_of(part)) is None:
        return part
    value = part.get(kind)
    if value is None:
        raise ValueError(f"a part of the type {kind} holds no {kind!r}; expected {_EXPECTED[kind]}")
    policy = MediaPolicy(Path.cwd())
    more: dict[str, Any] = {}
    if kind == "image":
        is_ready = isinstance(value, Image.Image) and value.mode == "RGB"
        value = value if is_ready else load_image(value, policy, SOURCE)
    elif kind == "video":
        is_file = isinstance(value, (str, bytes, Path))
        if not is_file:  # whoever listed the frames had limits of his own
            policy = replace(policy, max_video_frames=sys.maxsize)
        asked: dict[str, Any] = {"fps": fps} if fps else {"num_frames": max_frames}
        video = load_video(
            str(value) if isinstance(value, Path) else value, policy, SOURCE, frames_fps=part.get("fps"),
            **(asked if is_file else {}),
        )  # fmt: skip
        value = list(video.frames)
        if (rate := video.info.fps) is not None:
            indices = list(video.indices)
            more["video_metadata"] = {"fps": rate, "total_num_frames": video.info.num_frames, "frames_indices": indices}
    elif sampling_rate is not None:
        value = to_waveform(value, sampling_rate)
    if value is part.get(kind) and part.get("type") == kind:
        return part
    return {**part, "type": kind, kind: value, **more}


def video_metadata_of(conversation: Conversation) -> list[dict[str, Any]] | None:
    """What is known of the time of each video's frames; ``None`` unless it is of all.

    Args:
        conversation: What `prepare_conversation` returned.
    """
    parts = [part for message in conversation for part in parts_of(message) if kind_of(part) == "video"]
    found = [part["video_metadata"] for part in parts if part.get("video_metadata")]
    return found if found and len(found) == len(parts) else None


def _ensure_rgb(conversations: Sequence[Conversation]) -> list[list[dict[str, Any]]]:
    """Conversations whose pictures are RGB: new ones, where NeMo AutoModel writes into those given.

    Args:
        conversations: Messages of each sample.
    """
    return [prepare_conversation(conversation) for conversation in conversations]


def _count_media_per_sample(conversations: Sequence[Conversation]) -> tuple[list[int], list[int]]:
    """(images, videos) of each conversation.

    Args:
        conversations: Messages of each sample.
    """
    media = [media_of(conversation) for conversation in conversations]
    return [len(own.images) for own in media], [len(own.videos) for own in media]


def _extract_media_from_conversations(
    conversations: Sequence[Conversation],
) -> tuple[list[Any] | None, list[Any] | None]:
    """(images, videos) of all conversations in reading order; ``None`` for a kind that none has.

    Args:
        conversations: Messages of each sample.
    """
    media = [media_of(conversation) for conversation in conversations]
    images, videos = [item for own in media for item in own.images], [item for own in media for item in own.videos]
    return images or None, videos or None


def flatten_messages(conversation: Conversation, placeholders: Mapping[str, str]) -> list[dict[str, Any]]:
    """Messages whose content is a string, each medium being its placeholder: for templates that take no parts.

    Args:
        conversation: The messages.
        placeholders: Text that stands for ``image``, ``video``, ``audio``.

    Raises:
        ValueError: If there is a medium of a kind that has no placeholder.
    """
    flat = []
    for message in conversation:
        text = ""
        for part in parts_of(message):
            if (kind := kind_of(part)) is None:
                text += part if isinstance(part, str) else part.get("text") or ""
            elif kind not in placeholders:
                raise ValueError(f"the processor takes no {kind}; it takes {', '.join(placeholders) or 'text alone'}")
            else:
                text += placeholders[kind]
        flat.append({**message, "content": text})
    return flat


def to_waveform(audio: Any, sampling_rate: int) -> np.ndarray:
    """One channel of float32 samples at a sampling rate, see `load_audio`.

    NeMo AutoModel interpolates linearly, which folds what lies above half of the new rate back into the sound (defect
    2B.14); this does not.

    Args:
        audio: Samples; a pair of them and their rate in Hz; a dict with ``array`` and ``sampling_rate``, or with
            ``bytes`` or ``path`` of a file; or a file under the working folder. Samples without a rate have the one
            that is wanted.
        sampling_rate: In Hz.

    Returns:
        ``(num_samples,)`` float32.

    Raises:
        MediaError: If it is none of these, or cannot be read.
        ValueError: If it is a dict with none of these.
    """
    if isinstance(audio, Mapping):  # a row of datasets' Audio, decoded or not
        encoded = next((audio[key] for key in ("bytes", "path") if audio.get(key)), None)
        samples = audio.get("array")
        audio = encoded if samples is None else (samples, audio.get("sampling_rate") or sampling_rate)
        if audio is None:
            raise ValueError(f"a sound is an object without array, bytes and path; expected {_EXPECTED['audio']}")
    is_pair = isinstance(audio, (list, tuple)) and len(audio) == 2 and np.ndim(audio[0]) > 0
    if not is_pair and not isinstance(audio, (str, bytes, Path)):
        audio = (np.asarray(audio), sampling_rate)
    if isinstance(audio, (str, bytes, Path)):
        policy = MediaPolicy(Path.cwd())
    else:  # whoever decoded it had limits of his own
        policy = MediaPolicy(Path.cwd(), max_audio_s=math.inf)
    samples, _ = load_audio(str(audio) if isinstance(audio, Path) else audio, policy, SOURCE, sampling_rate)
    return samples.numpy()
