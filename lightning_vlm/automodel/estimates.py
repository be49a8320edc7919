"""Lengths that are guessed from a raw row: NeMo AutoModel's estimating functions, for those who migrate from it.

They cost nothing (no tokenizer, no file is opened) and are wrong by construction: three characters count as a token,
which is too few for Chinese or code, and the tokens of the chat template and around media do not count at all. A plan
made from them overflows. Our own path measures exact lengths instead (`data.lengths`), once, and keeps them.

Media sizes follow the Qwen-VL processors' resizing rule, which is not the rule of `geometry` (that is Nemotron's).
A row is a dict: ``conversation`` (messages with ``content``), and optionally ``_text_tokens``, ``_media_tokens`` and
``mm_inputs_meta`` (``images_meta`` of ``[height, width]``, ``videos_meta`` of ``[frames, height, width, fps,
duration]``, or dicts with ``n_tokens``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TOKENS_PER_ITEM = 500
"""Guess for an image or a video of which nothing is known."""
CHARACTERS_PER_TOKEN = 3

MediaConfig = dict[str, Any]
"""Numbers that media tokens follow from, see `image_config` and `video_config`."""


def _smart_resize_image(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 14 * 14 * 4 * 1280
) -> tuple[int, int]:
    """The size that a Qwen2-VL image processor resizes an image to, without that one's limit on the aspect ratio.

    Args:
        height: Image height, in pixels.
        width: Image width, in pixels.
        factor: Both sides become multiples of it.
        min_pixels: Smaller images are enlarged to at least this.
        max_pixels: Larger images are shrunk to at most this, unless a side would be less than ``factor``.

    Returns:
        (height, width) in pixels.

    Raises:
        ZeroDivisionError: If a side is 0.
    """
    return _resize(height, width, factor, min_pixels, max_pixels, frames=1, padded_frames=1)


def _smart_resize_video(
    num_frames: int,
    height: int,
    width: int,
    temporal_factor: int = 2,
    factor: int = 32,
    min_pixels: int = 128 * 128,
    max_pixels: int = 16 * 16 * 2 * 2 * 2 * 6144,
) -> tuple[int, int]:
    """The size that a Qwen3-VL video processor resizes the frames of a video to.

    Args:
        num_frames: Frames that are sampled.
        height: Frame height, in pixels.
        width: Frame width, in pixels.
        temporal_factor: Frames are padded to a multiple of it.
        factor: Both sides become multiples of it.
        min_pixels: Fewest pixels of all padded frames together.
        max_pixels: Most pixels of all padded frames together.

    Returns:
        (height, width) in pixels.

    Raises:
        ZeroDivisionError: If there are no frames or a side is 0.
    """
    padded = math.ceil(num_frames / temporal_factor) * temporal_factor
    return _resize(height, width, factor, min_pixels, max_pixels, frames=num_frames, padded_frames=padded)


def _resize(
    height: int, width: int, factor: int, low: int, high: int, frames: int, padded_frames: int
) -> tuple[int, int]:
    # Python's half-to-even rounding is part of the contract, and so is that the scale is made from frames without
    # their padding while the bounds are compared with it: the processors do both.
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    pixels = padded_frames * rows * columns
    if pixels > high:
        scale = math.sqrt(frames * height * width / high)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif pixels < low:
        scale = math.sqrt(low / (frames * height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def _estimate_image_tokens(img_meta: Sequence[float] | Mapping[str, Any], image_cfg: MediaConfig) -> int:
    """Tokens of an image of known size.

    Args:
        img_meta: ``[height, width]``, or a dict whose ``n_tokens`` was counted before (NeMo writes such dicts but
            fails to read them here).
        image_cfg: What `image_config` returned.
    """
    if isinstance(img_meta, Mapping):
        return int(img_meta.get("n_tokens", TOKENS_PER_ITEM))
    height, width = _smart_resize_image(
        int(img_meta[0]), int(img_meta[1]), image_cfg["factor"], image_cfg["min_pixels"], image_cfg["max_pixels"]
    )
    return _tokens(1, height, width, image_cfg)


def _estimate_video_tokens(vid_meta: Sequence[float] | Mapping[str, Any], video_cfg: MediaConfig) -> int:
    """Tokens of a video of known size.

    Args:
        vid_meta: ``[total_frames, height, width, fps, duration_s]``, or a dict with ``n_tokens``.
        video_cfg: What `video_config` returned; its ``min_frames`` counts even where the video has fewer.
    """
    if isinstance(vid_meta, Mapping):
        return int(vid_meta.get("n_tokens", TOKENS_PER_ITEM))
    total, height, width = (int(number) for number in vid_meta[:3])
    fps, duration = float(vid_meta[3]), float(vid_meta[4])
    if total == 0 and fps > 0:
        total = int(duration * fps)
    seconds = total / fps if fps > 0 else duration
    wanted = max(1, int(seconds * video_cfg["fps"]))
    frames = max(video_cfg["min_frames"], min(total, video_cfg["max_frames"], wanted))
    depth = video_cfg["temporal_patch_size"]
    frames = math.ceil(frames / depth) * depth
    height, width = _smart_resize_video(
        frames, height, width, depth, video_cfg["factor"], video_cfg["min_pixels"], video_cfg["max_pixels"]
    )
    return _tokens(frames // depth, height, width, video_cfg)


def _tokens(depth: int, height: int, width: int, config: MediaConfig) -> int:
    patch = config["patch_size"]
    return depth * (height // patch) * (width // patch) // config["merge_size"] ** 2


def _estimate_sample_length(
    example: dict[str, Any],
    image_cfg: MediaConfig | None = None,
    video_cfg: MediaConfig | None = None,
    return_media_tokens: bool = False,
) -> int | tuple[int, int]:
    """Tokens of a raw row, see `estimate_tokens`.

    Args:
        example: The row.
        image_cfg: What `image_config` returned, or ``None``.
        video_cfg: What `video_config` returned, or ``None``.
        return_media_tokens: Return (all tokens, tokens of media) instead of all tokens alone.
    """
    text, media = estimate_tokens(example, image_cfg, video_cfg)
    return (text + media, media) if return_media_tokens else text + media


def estimate_tokens(
    example: Mapping[str, Any], image_cfg: MediaConfig | None, video_cfg: MediaConfig | None
) -> tuple[int, int]:
    """Tokens of a raw row's text and of its media.

    Text is ``_text_tokens`` where that was counted before, and else a third of the characters. Media are
    ``_media_tokens`` (NeMo documents the key but never reads it), or follow from ``mm_inputs_meta`` where a config is
    given, and are else 500 per image or video. With metadata, media of a kind that has no config count nothing.

    Args:
        example: The row; without ``conversation`` it has no text and no media.
        image_cfg: What `image_config` returned, or ``None``.
        video_cfg: What `video_config` returned, or ``None``.
    """
    contents = [message.get("content", []) for message in example.get("conversation", [])]
    items = [item for content in contents if isinstance(content, list) for item in content if isinstance(item, Mapping)]
    if (text := example.get("_text_tokens")) is None:
        characters = sum(len(content) for content in contents if isinstance(content, str))
        characters += sum(len(item.get("text", "")) for item in items if item.get("type") == "text")
        text = characters // CHARACTERS_PER_TOKEN
    if (media := example.get("_media_tokens")) is None:
        meta = example.get("mm_inputs_meta")
        if meta is None or (image_cfg is None and video_cfg is None):
            media = TOKENS_PER_ITEM * sum(item.get("type") in ("image", "video") for item in items)
        else:
            images = (meta.get("images_meta") or []) if image_cfg is not None else []
            videos = (meta.get("videos_meta") or []) if video_cfg is not None else []
            media = sum(_estimate_image_tokens(image, image_cfg or {}) for image in images if image is not None)
            media += sum(_estimate_video_tokens(video, video_cfg or {}) for video in videos if video is not None)
    return int(text), int(media)


def image_config(processor: Any) -> MediaConfig | None:
    """The numbers of ``processor.image_processor`` that image tokens follow from; ``None`` without one."""
    inner = getattr(processor, "image_processor", None)
    return None if inner is None else _config(inner, patch_size=14, min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 1280)


def video_config(processor: Any) -> MediaConfig | None:
    """The numbers of ``processor.video_processor`` that video tokens follow from; ``None`` without one."""
    inner = getattr(processor, "video_processor", None)
    if inner is None:
        return None
    return {
        **_config(inner, patch_size=16, min_pixels=128 * 128, max_pixels=16 * 16 * 2 * 2 * 2 * 6144),
        "temporal_patch_size": getattr(inner, "temporal_patch_size", 2),
        "fps": getattr(inner, "fps", 2.0),
        "min_frames": getattr(inner, "min_frames", 4),
        "max_frames": getattr(inner, "max_frames", 768),
    }


def _config(inner: Any, patch_size: int, min_pixels: int, max_pixels: int) -> MediaConfig:
    patch_size, merge_size = getattr(inner, "patch_size", patch_size), getattr(inner, "merge_size", 2)
    size = getattr(inner, "size", None)

    def bound(own: str, edge: str, default: int) -> int:
        # transformers renamed these: old processors hold min_pixels, newer ones a size with edges.
        return getattr(inner, own, None) or _entry(size, own) or _entry(size, edge) or default

    return {
        "patch_size": patch_size,
        "merge_size": merge_size,
        "factor": patch_size * merge_size,
        "min_pixels": bound("min_pixels", "shortest_edge", min_pixels),
        "max_pixels": bound("max_pixels", "longest_edge", max_pixels),
    }


def _entry(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
