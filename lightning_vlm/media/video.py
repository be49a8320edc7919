"""From a reference to the frames of a video: a video file, a list of images, or an array.

Frames are chosen before anything is decoded, by `sample_frames`, so that a plan can count them from the header; then
only those are converted and kept, and stretches without a wanted frame are jumped over, keyframe to keyframe. PyAV is
the one decoder: it brings its own FFmpeg, so the same file gives the same frames on every machine. A second one
(torchcodec) would be faster on a GPU and would have to agree to the pixel.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_vlm.media.load import image_size, load_image
from lightning_vlm.media.open import open_media
from lightning_vlm.media.policy import (
    MediaError,
    MediaPolicy,
    check_pixels,
    describe,
    not_installed,
    undecodable,
)

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Others are refused: FFmpeg also reads playlists, which name further files and addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif"
_HONEST = {"mp4", "matroska", "mpegts"}  # they store when each frame is shown; AVI stores when it is decoded


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video says of itself.

    Attributes:
        num_frames: How many frames it shows.
        height: Of a frame, upright.
        width: Of a frame, upright.
        fps: Frames per second, on average; ``None`` where nothing tells (a list of images). A Matroska file of variable
            frame rate may say a nominal one (25 for 30 frames in eight seconds): times that are counted by it, as vLLM
            counts them too, are then not those of the clock.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None

    @property
    def duration_s(self) -> float | None:
        """Its length in seconds, ``None`` where nothing tells."""
        return self.num_frames / self.fps if self.fps else None


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
    """
    what = describe(ref, "video")
    if (frames := _frame_list(ref)) is not None:
        _check_count(len(frames), ref, source)
        if choose is not None:
            _check_chosen(choose(len(frames), frames_fps), policy, what, source)
        height, width = image_size(frames[0], policy, source)
        return VideoInfo(len(frames), height, width, frames_fps)
    with _opened(ref, policy, source) as (container, stream):
        info = _info(container, stream, policy, what, source)
        if choose is not None:
            _check_chosen(choose(info.num_frames, info.fps), policy, what, source)
        return info


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
    with _opened(ref, policy, source) as (container, stream):
        info = _info(container, stream, policy, what, source)
        indices = choose(info.num_frames, info.fps)
        _check_chosen(indices, policy, what, source)
        images, times = _decode(container, stream, indices, info.fps)
        if len(images) < len(indices):
            raise MediaError(
                source,
                f"{what} ends before frame {indices[len(images)] + 1} of {info.num_frames}, expected a complete video",
                "replace the file or remove the row",
                "damaged video",
            )
        return Video(_of_one_size(images, what, source), tuple(indices), times, info)


def _frame_list(ref: Any) -> Sequence[Any] | None:
    """The frames of a video that is given as images, ``None`` where it is a file."""
    if isinstance(ref, np.ndarray | Tensor) and ref.ndim == 4:
        return list(ref)
    return ref if isinstance(ref, list | tuple) else None


@contextmanager
def _opened(ref: Any, policy: MediaPolicy, source: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and its picture stream; whatever goes wrong inside becomes a `MediaError`."""
    what = describe(ref, "video")
    try:
        import av
    except ImportError as error:
        raise not_installed(what, "PyAV", "lightning-vlm[video]", source) from error
    with open_media(ref, policy, source, "video") as file:
        try:
            if not file.seek(0, os.SEEK_END):
                raise ValueError("not a video")  # FFmpeg would speak of an argument
            file.seek(0)
            with av.open(file, "r", options={"format_whitelist": _FORMATS}) as container:
                if not container.streams.video:
                    raise _empty(what, "no pictures", source)
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # the loader's workers are what runs side by side
                check_pixels(stream.codec_context.width, stream.codec_context.height, policy, what, source)
                # A frame can be larger than the header says: FFmpeg then refuses it.
                stream.codec_context.options = {"max_pixels": str(policy.max_image_pixels)}
                yield container, stream
        except MediaError:
            raise
        except av.error.ArgumentError as error:  # what it says of a format that is not in our list
            raise undecodable(ValueError("not a video"), what, "video", source, "FFmpeg") from error
        except Exception as error:  # FFmpeg's errors come as many kinds, some of them Python's own
            raise undecodable(error, what, "video", source, "FFmpeg") from error


def _info(container: InputContainer, stream: VideoStream, policy: MediaPolicy, what: str, source: str) -> VideoInfo:
    in_header = "mp4" in container.format.name.split(",") and stream.frames
    # An edit list cuts frames out of what is shown: the header marks them, and FFmpeg does not decode them.
    count = sum(not entry.is_discard for entry in stream.index_entries) if in_header else 0
    count = count or len(_packets(container, stream))
    if not count:
        raise _empty(what, "no frame", source)
    height, width = stream.codec_context.height, stream.codec_context.width
    if in_header:
        container.seek(0)
        first = next(container.decode(stream), None)
        if first is not None and first.rotation % 180:
            height, width = width, height
    rate = stream.average_rate or stream.guessed_rate
    return VideoInfo(count, height, width, float(rate) if rate else None)


def _packets(container: InputContainer, stream: VideoStream) -> list[tuple[int | None, bool]]:
    """(time, whether a decoder can start there) of each frame that is shown, as stored; nothing is decoded."""
    return [
        (packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size and not packet.is_discard
    ]


def _decode(
    container: InputContainer, stream: VideoStream, indices: list[int], fps: float | None
) -> tuple[list[Image.Image], tuple[float, ...] | None]:
    """The frames of these numbers, fewer where the file ends early; and when each is shown."""
    container.seek(0)
    packets = _packets(container, stream)
    times = sorted(time for time, _ in packets if time is not None)
    told = len(set(times)) == len(packets) > indices[-1]
    found = None
    if told and _HONEST.intersection(container.format.name.split(",")):
        keys = sorted(time for time, is_key in packets if is_key and time is not None)
        found = _by_jumping(container, stream, [times[index] for index in indices], keys)
    if found is None:
        found = _one_by_one(container, stream, indices)
    if told and stream.time_base:
        return found, tuple(float((times[index] - times[0]) * stream.time_base) for index in indices)
    return found, tuple(index / fps for index in indices) if fps else None


def _one_by_one(container: InputContainer, stream: VideoStream, indices: list[int]) -> list[Image.Image]:
    container.seek(0)
    wanted, found = set(indices), []
    for index, frame in enumerate(container.decode(stream)):
        if index in wanted:
            found.append(_picture(frame))
        if index == indices[-1]:
            break
    return found


def _by_jumping(
    container: InputContainer, stream: VideoStream, wanted: list[int], keys: list[int]
) -> list[Image.Image] | None:
    """The frames shown at these times, ``None`` if one was not met: a jump landed elsewhere, or it is damaged."""
    found: list[Image.Image] = []
    frames: Iterator[VideoFrame] = iter(())
    position = None
    for time in wanted:
        key = keys[max(0, bisect.bisect_right(keys, time) - 1)] if keys else time
        if position is None or key > position:
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        if frame is None or frame.pts != time:
            return None
        position = time
        found.append(_picture(frame))
    return found


def _picture(frame: VideoFrame) -> Image.Image:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))


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
        raise _empty(describe(ref, "video"), "no frame", source)


def _check_chosen(indices: list[int], policy: MediaPolicy, what: str, source: str) -> None:
    if len(indices) > policy.max_video_frames:
        raise MediaError(
            source,
            f"{what} gives {len(indices):,} frames, expected at most max_video_frames = {policy.max_video_frames:,}",
            "take fewer (data.processor_options.video: num_frames, fps), or raise data.max_video_frames",
            "too many frames",
        )


def _empty(what: str, found: str, source: str) -> MediaError:
    return MediaError(
        source,
        f"{what} has {found}, expected a video of at least one frame",
        "replace the file or remove the row",
        "empty video",
    )
