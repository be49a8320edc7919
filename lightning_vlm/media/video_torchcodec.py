"""Video files read by torchcodec, with the FFmpeg that it finds on the system.

It offers no list of formats, no limit of pixels, no time of a frame before that is decoded and only a guess of the
rate, so it answers only for what it cannot answer otherwise than PyAV: a whole MP4, MOV, Matroska or WebM file of
constant rate that begins with its pictures, of eight bits and even height. For anything else `TorchcodecFile` raises,
and PyAV reads the file. With one FFmpeg below both, frames are the same to the pixel; another version may round colours
otherwise.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from lightning_vlm.media.policy import MediaPolicy, check_pixels
from lightning_vlm.media.video_backend import VideoInfo

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder

_HEAD_BYTES = 65_536  # a Matroska file describes its streams in them
_PROBED_BYTES = 1_024  # FFmpeg first looks at twice as many to tell a format
_DEFAULT_DURATION = re.compile(rb"\x23\xe3\x83([\x81-\x88])")  # Matroska: nanoseconds of a frame, after their length
# Odd heights and more bits take another path through swscale, where PyAV and torchcodec ask for different filters.
_PIXEL_FORMATS = {f"yuv{full}{layout}p" for full in ("", "j") for layout in (420, 422, 444)}
_FRAMES_AT_ONCE = 8


class TorchcodecFile:
    """A `VideoFile`.

    The policy's limit holds for the size in the header. A frame that is larger than the header says is decoded before
    it is refused, up to the 268 megapixels where FFmpeg itself stops.

    Args:
        file: Its bytes, seekable.
        policy: Gives the limit of pixels.
        what: As `describe` names it.
        source: ``file:line`` of the row.

    Raises:
        MediaError: If it has more pixels than the policy allows.
        Exception: Of any kind if PyAV should read it.
    """

    def __init__(self, file: BinaryIO, policy: MediaPolicy, what: str, source: str) -> None:
        from torchcodec.decoders import VideoDecoder

        head = file.read(_HEAD_BYTES)
        file.seek(0)
        is_mp4 = _is_mp4(head)
        if not is_mp4 and not _is_matroska(head):
            raise ValueError("neither MP4 nor Matroska")
        self._reader = _Reader(file)
        self._decoder = VideoDecoder(self._reader, dimension_order="NHWC", device="cpu")
        self._reader.check()
        self.info = _info(self._decoder, None if is_mp4 else head)
        check_pixels(*self._as_stored(), policy, what, source)

    def decode(self, indices: list[int]) -> tuple[list[Image.Image], tuple[float, ...]]:
        """As `VideoFile.decode`; raises where a frame is missing."""
        frames: list[Image.Image] = []
        seconds: list[float] = []
        for start in range(0, len(indices), _FRAMES_AT_ONCE):
            # Frames of another size than the header's are refused here, before they are converted.
            batch = self._decoder.get_frames_at(indices[start : start + _FRAMES_AT_ONCE])
            self._reader.check()
            frames += [Image.fromarray(pixels) for pixels in batch.data.numpy()]
            seconds += batch.pts_seconds.tolist()
        times = [time - self._decoder.metadata.begin_stream_seconds_from_content for time in seconds]
        # In place of a frame that cannot be decoded comes the next one.
        if [round(time * (self.info.fps or 0)) for time in times] != indices:
            raise ValueError("other frames than those asked for")
        # Whole ticks of the file's clock, which as floating-point numbers have lost their last bits in subtraction.
        return frames, tuple(float(Fraction(time).limit_denominator(1_000_000)) for time in times)

    def _as_stored(self) -> tuple[int, int]:
        """(width, height) before turning."""
        size = (self.info.width, self.info.height)
        return size[::-1] if (self._decoder.metadata.rotation or 0) % 180 else size


class _Reader:
    """A stream as torchcodec reads it: an exception would have to pass through FFmpeg, which is C, and is kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: Exception | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self._error = error
            return b""

    def seek(self, offset: int, whence: int) -> int:
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            self._error = error
            return -1

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _is_mp4(head: bytes) -> bool:
    # FFmpeg would take a playlist for one and open what it names: whatever else follows, playlists are text, and
    # FFmpeg looks for them in front of the first zero byte, which is the very first here.
    return head[4:8] == b"ftyp" and int.from_bytes(head[:4]) <= _PROBED_BYTES


def _is_matroska(head: bytes) -> bool:
    # By FFmpeg's own rule, which then gives the highest of all scores: no playlist can have a higher one.
    if head[:4] != b"\x1a\x45\xdf\xa3" or not head[4:5].strip(b"\0"):
        return False
    start = 4 + 9 - head[4].bit_length()  # leading zero bits count the further bytes of the length
    end = start + (int.from_bytes(head[4:start]) & (1 << 7 * (start - 4)) - 1)
    return end <= min(len(head), _PROBED_BYTES) and any(kind in head[start:end] for kind in (b"matroska", b"webm"))


def _info(decoder: VideoDecoder, matroska_head: bytes | None) -> VideoInfo:
    about = decoder.metadata
    count, rate, turn = about.num_frames_from_content, about.average_fps_from_header, about.rotation or 0.0
    height, width = about.height, about.width
    if decoder.stream_index != 0:
        raise ValueError("does not begin with its pictures, of which there may be several streams")
    if about.pixel_format not in _PIXEL_FORMATS or (width if turn % 180 else height) % 2:
        raise ValueError(f"pixels of {about.pixel_format}, {width} x {height}")
    if turn % 90 or (turn and matroska_head):
        raise ValueError(f"turned by {turn} degrees")
    if matroska_head is None:
        if count != about.num_frames_from_header:
            raise ValueError(f"{count} frames, {about.num_frames_from_header} in the header: cut, or by an edit list")
        tolerance = 1e-9 * count  # an MP4 file counts in fractions that its rate divides
    else:
        if not any(abs(stated / rate - 1) < 1e-6 for stated in _stated_rates(matroska_head)):
            raise ValueError("states no rate: FFmpeg guesses one, and of two guesses torchcodec tells the other")
        tolerance = 2e-3  # a Matroska file counts in milliseconds
    if (
        abs(count / rate - (about.end_stream_seconds_from_content - about.begin_stream_seconds_from_content))
        > tolerance
    ):
        raise ValueError("variable frame rate")
    return VideoInfo(count, height, width, rate)


def _stated_rates(matroska_head: bytes) -> list[float]:
    """Frames per second of each stream that says how long a frame is shown."""
    durations = [
        int.from_bytes(matroska_head[found.end() : found.end() + found[1][0] - 0x80])
        for found in _DEFAULT_DURATION.finditer(matroska_head)
    ]
    return [1e9 / duration for duration in durations if duration]
