"""From a reference to the frames of a video: a video file, a list of images, or an array.

Frames are chosen before anything is decoded, by `sample_frames`, so that a plan can count them from the header; then
only those are converted and kept. Files are read by `video_backend`: torchcodec or PyAV, which agree on every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_vlm.media.load import image_size, load_image
from lightning_vlm.media.policy import MediaError, MediaPolicy, describe
from lightning_vlm.media.video_backend import VideoFile, VideoInfo, empty_video, read_video

__all__ = ["Video", "VideoInfo", "load_video", "sample_frames", "video_info"]


@dataclass(frozen=True, slots=True)
class Video:
    """The frames that were taken from a video.

    Attributes:
        frames: RGB images of one size, upright, in order.
        indices: Number of each frame in the video.
        timestamps_s: When each is shown, in seconds from the first frame of the video; ``None`` where nothing tells.
        info: The whole video.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...] | None
    info: VideoInfo


def sample_frames(
    total: int, source_fps: float | None, num_frames: int | None = None, fps: float | None = None
) -> list[int]:
    """Chooses frames: every so often by ``fps``, evenly from first to last by ``num_frames``, or all.

    Args:
        total: Frames of the video.
        source_fps: Its frames per second.
        num_frames: Most frames; with ``fps``, what is left out is left out evenly.
        fps: Frames per second of video; without effect where ``source_fps`` is unknown or lower.

    Returns:
        Numbers of the frames, rising, none twice.

    Raises:
        ValueError: If ``num_frames`` or ``fps`` is not positive.
    """
    _check_asked(num_frames, fps)
    step = max(1.0, source_fps / fps) if fps and source_fps else 1.0
    # A frame's number is rounded down after a hair is added: 2 x (30 / 1.1) must not fall short by an ulp.
    chosen = [int(k * step + 1e-9) for k in range(int((total - 1) / step + 1e-9) + 1)] if total else []
    if num_frames is not None and len(chosen) > num_frames:
        return sorted({round(place) for place in np.linspace(0, total - 1, num_frames)})
    return chosen


def video_info(
    ref: Any,
    policy: MediaPolicy,
    source: str,
    frames_fps: float | None = None,
    choose: Callable[[int, float | None], list[int]] | None = None,
) -> VideoInfo:
    """Number, size and rate of a video's frames.

    MP4 and MOV say them in their header, and the first frame is decoded to see how the camera was held. In other files
    frames are counted by reading through, without decoding. Of a list of images, the first one's header is read.

    Args:
        ref: As for `load_video`.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.
        frames_fps: As for `load_video`.
        choose: As for `load_video`: with it, frames are counted and refused as there.

    Raises:
        MediaError: As for `load_video`, except for damage that only decoding reveals.
        RuntimeError: As for `load_video`.
    """
    what = describe(ref, "video")
    if (frames := _frame_list(ref)) is not None:
        _check_count(len(frames), ref, source)
        if choose is not None:
            _check_chosen(choose(len(frames), frames_fps), policy, what, source)
        height, width = image_size(frames[0], policy, source)
        return VideoInfo(len(frames), height, width, frames_fps)

    def count(file: VideoFile) -> VideoInfo:
        if choose is not None:
            _check_chosen(choose(file.info.num_frames, file.info.fps), policy, what, source)
        return file.info

    return read_video(ref, policy, source, count, header_only=True)


def load_video(
    ref: Any,
    policy: MediaPolicy,
    source: str,
    num_frames: int | None = None,
    fps: float | None = None,
    frames_fps: float | None = None,
    choose: Callable[[int, float | None], list[int]] | None = None,
) -> Video:
    """Decodes the chosen frames of a video, upright.

    Args:
        ref: Path, ``data:`` URI or address of a video file; its bytes; a `FileSlice`; a tuple or list of images, as
            `load_image` takes them; or an array of them, ``(T, H, W, 3)`` or ``(T, 3, H, W)``.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.
        num_frames: See `sample_frames`.
        fps: See `sample_frames`.
        frames_fps: Frames per second of a list of images, where it is known.
        choose: Another rule than `sample_frames`: from the number of frames and their rate to those wanted, rising.

    Raises:
        MediaError: If the video is missing, not allowed, unreadable, empty, too large, of more chosen frames than the
            policy allows, or a list of images that are refused or differ in size.
        ValueError: If ``num_frames`` or ``fps`` is not positive.
        RuntimeError: If ``LIGHTNING_VLM_VIDEO_BACKEND`` names a reader of video files that cannot run.
    """
    _check_asked(num_frames, fps)  # here too: inside, any ValueError is a damaged video's
    choose = choose or (lambda total, source_fps: sample_frames(total, source_fps, num_frames, fps))
    what = describe(ref, "video")
    if (frames := _frame_list(ref)) is not None:
        _check_count(len(frames), ref, source)
        indices = choose(len(frames), frames_fps)
        _check_chosen(indices, policy, what, source)
        images = [load_image(frames[index], policy, source) for index in indices]
        info = VideoInfo(len(frames), images[0].height, images[0].width, frames_fps)
        times = tuple(index / frames_fps for index in indices) if frames_fps else None
        return Video(_of_one_size(images, what, source), tuple(indices), times, info)

    def take(file: VideoFile) -> Video:
        info = file.info
        indices = choose(info.num_frames, info.fps)
        _check_chosen(indices, policy, what, source)
        images, times = file.decode(indices)
        if len(images) < len(indices):
            raise MediaError(
                source,
                f"{what} ends before frame {indices[len(images)] + 1} of {info.num_frames}, expected a complete video",
                "replace the file or remove the row",
                "damaged video",
            )
        return Video(_of_one_size(images, what, source), tuple(indices), times, info)

    return read_video(ref, policy, source, take)


def _frame_list(ref: Any) -> Sequence[Any] | None:
    """The frames of a video that is given as images, ``None`` where it is a file."""
    if isinstance(ref, np.ndarray | Tensor) and ref.ndim == 4:
        return list(ref)
    return ref if isinstance(ref, list | tuple) else None


def _of_one_size(images: list[Image.Image], what: str, source: str) -> tuple[Image.Image, ...]:
    first = images[0]
    for number, image in enumerate(images, 1):
        if image.size != first.size:
            raise MediaError(
                source,
                f"{what} has a frame of {image.width} x {image.height} pixels ({number}. of those taken), expected "
                f"{first.width} x {first.height} as of the first",
                "bring all frames to one size",
                "frames of different sizes",
            )
    return tuple(images)


def _check_asked(num_frames: int | None, fps: float | None) -> None:
    if (num_frames is not None and num_frames < 1) or (fps is not None and fps <= 0):
        raise ValueError(f"num_frames is {num_frames} and fps is {fps}; expected numbers above zero")


def _check_count(count: int, ref: Any, source: str) -> None:
    if not count:
        raise empty_video(describe(ref, "video"), "no frame", source)


def _check_chosen(indices: list[int], policy: MediaPolicy, what: str, source: str) -> None:
    if len(indices) > policy.max_video_frames:
        raise MediaError(
            source,
            f"{what} gives {len(indices):,} frames, expected at most max_video_frames = {policy.max_video_frames:,}",
            "take fewer (data.processor_options.video: num_frames, fps), or raise data.max_video_frames",
            "too many frames",
        )
