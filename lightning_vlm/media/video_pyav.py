"""Video files read by PyAV, which brings its own FFmpeg: the same file gives the same frames on every machine.

This is the reference: any format in the list, any rate, damage told in words. Stretches without a wanted frame are
jumped over, keyframe to keyframe; where a jump lands elsewhere, all is decoded from the start, which is slow and right.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from lightning_vlm.media.policy import MediaError, MediaPolicy, check_pixels, not_installed, undecodable
from lightning_vlm.media.video_backend import VideoInfo, empty_video

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Others are refused: FFmpeg also reads playlists, which name further files and addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,gif"
_HONEST = {"mp4", "matroska", "mpegts"}  # they store when each frame is shown; AVI stores when it is decoded


class PyavFile:
    """A `VideoFile`, of an open container and its picture stream."""

    def __init__(self, container: InputContainer, stream: VideoStream, what: str, source: str) -> None:
        self._container, self._stream = container, stream
        self.info = _info(container, stream, what, source)

    def decode(self, indices: list[int]) -> tuple[list[Image.Image], tuple[float, ...] | None]:
        """As `VideoFile.decode`."""
        return _decode(self._container, self._stream, indices, self.info.fps)


@contextmanager
def opened_by_pyav(
    file: BinaryIO, policy: MediaPolicy, what: str, source: str, given_up: Exception | None = None
) -> Iterator[PyavFile]:
    """A video file; whatever goes wrong inside becomes a `MediaError`.

    Args:
        file: Its bytes, seekable.
        policy: Gives the limit of pixels.
        what: As `describe` names it.
        source: ``file:line`` of the row.
        given_up: Why torchcodec did not read it, for the traceback where PyAV is not installed.

    Raises:
        MediaError: If PyAV is not installed, or the file is no video, damaged, empty or too large.
    """
    try:
        import av
    except ImportError as error:
        raise not_installed(what, "PyAV", "lightning-vlm[video]", source) from given_up or error
    try:
        if not file.seek(0, os.SEEK_END):
            raise ValueError("not a video")  # FFmpeg would speak of an argument
        file.seek(0)
        # A title that is no UTF-8 is no damage: only strict decoding of it would make it one.
        with av.open(file, "r", options={"format_whitelist": _FORMATS}, metadata_errors="replace") as container:
            if not container.streams.video:
                raise empty_video(what, "no pictures", source)
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the loader's workers are what runs side by side
            check_pixels(stream.codec_context.width, stream.codec_context.height, policy, what, source)
            # A frame can be larger than the header says: FFmpeg then refuses it.
            stream.codec_context.options = {"max_pixels": str(policy.max_image_pixels)}
            yield PyavFile(container, stream, what, source)
    except MediaError:
        raise
    except av.error.ArgumentError as error:  # what it says of a format that is not in our list
        raise undecodable(ValueError("not a video"), what, "video", source, "FFmpeg") from error
    except Exception as error:  # FFmpeg's errors come as many kinds, some of them Python's own
        raise undecodable(error, what, "video", source, "FFmpeg") from error


def _info(container: InputContainer, stream: VideoStream, what: str, source: str) -> VideoInfo:
    in_header = "mp4" in container.format.name.split(",") and stream.frames
    # An edit list cuts frames out of what is shown: the header marks them, and FFmpeg does not decode them.
    count = sum(not entry.is_discard for entry in stream.index_entries) if in_header else 0
    count = count or len(_packets(container, stream))
    if not count:
        raise empty_video(what, "no frame", source)
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
        found = _by_jumping(container, stream, times, indices, keys)
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
    container: InputContainer, stream: VideoStream, times: list[int], indices: list[int], keys: list[int]
) -> list[Image.Image] | None:
    """The frames shown at these times, ``None`` if one was not met: a jump landed elsewhere, or it is damaged."""
    found: list[Image.Image] = []
    frames: Iterator[VideoFrame] = iter(())
    last = None
    for index in indices:
        time = times[index]
        key = keys[max(0, bisect.bisect_right(keys, time) - 1)] if keys else time
        # The next frame is never jumped to, nor does torchcodec: it matters where FFmpeg conceals damage.
        if last is None or (index > last + 1 and key > times[last]):
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        if frame is None or frame.pts != time:
            return None
        last = index
        found.append(_picture(frame))
    return found


def _picture(frame: VideoFrame) -> Image.Image:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
