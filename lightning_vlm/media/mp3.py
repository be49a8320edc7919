"""MP3 files that do not say how long they are -> the same sound with a first frame that does.

Encoders put a frame in front that only counts the others ("Xing" or "Info"). Without it, as in recordings of a stream,
libsndfile guesses the length from the first frame's bit rate: of a longer sound it reads a part, without a word, and
a shorter one looks damaged. Counting looks at four bytes of each frame, and holds such a file in memory.
"""

from __future__ import annotations

import io
from typing import BinaryIO

_HEADER = 4
_MPEG_1 = 3
_RATES_HZ = (44_100, 48_000, 32_000)
_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_BELOW = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # of MPEG 2 and 2.5
_HAS_COUNT = 1  # flag of the counting frame


def with_length(stream: BinaryIO) -> BinaryIO:
    """An MP3 that says how many frames it has.

    Args:
        stream: An MP3 file; read, and not closed.

    Returns:
        The stream itself at its start, where it says so already; else its frames with a counting one in front, in
        memory. A frame that is cut off at the end is not counted.
    """
    stream.seek(_end_of_tags(stream))
    beginning = stream.read(_HEADER + 64)
    if _frame_bytes(beginning, 0) and _says_count(beginning):
        stream.seek(0)
        return stream
    stream.seek(_end_of_tags(stream))
    content = stream.read()
    start = _next_frame(content, 0)
    if start is None:  # for its reader to judge
        stream.seek(0)
        return stream
    if _place_of_count(content[start:]):  # it has none: it was never filled in
        start += _frame_bytes(content, start)
    sound = content[start:]
    return io.BytesIO(_counting_frame(sound, _count_frames(sound)) + sound)


def _end_of_tags(stream: BinaryIO) -> int:
    """Where titles and pictures (ID3v2) end that stand in front of the frames."""
    place = 0
    while True:
        stream.seek(place)
        tag = stream.read(10)
        if len(tag) < 10 or not tag.startswith(b"ID3"):
            return place
        footer = 10 if tag[5] & 0x10 else 0
        place += 10 + footer + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))


def _frame_bytes(content: bytes, at: int) -> int:
    """Length of the frame that begins here; 0 where none does."""
    word = int.from_bytes(content[at : at + _HEADER], "big")
    version, layer, kbps, rate, padding = (
        word >> 19 & 3,
        word >> 17 & 3,
        word >> 12 & 15,
        word >> 10 & 3,
        word >> 9 & 1,
    )
    if word >> 21 != 0x7FF or version == 1 or layer != 1 or kbps in (0, 15) or rate == 3:
        return 0
    if version == _MPEG_1:
        return 144_000 * _KBPS[kbps - 1] // _RATES_HZ[rate] + padding
    return 72_000 * _KBPS_BELOW[kbps - 1] // (_RATES_HZ[rate] // (2 if version else 4)) + padding


def _next_frame(content: bytes, at: int) -> int | None:
    """The first frame from a place on. Behind other bytes it is one only if another follows, or the end."""
    if _frame_bytes(content, at):
        return at
    while (at := content.find(b"\xff", at + 1)) >= 0:
        end = at + _frame_bytes(content, at)
        if end > at and (end == len(content) or _frame_bytes(content, end)):
            return at
    return None


def _count_frames(content: bytes) -> int:
    count, at = 0, _next_frame(content, 0)
    while at is not None and (end := at + _frame_bytes(content, at)) <= len(content):
        count, at = count + 1, _next_frame(content, end)
    return count


def _place_of_mark(frame: bytes) -> int:
    """Where a counting frame has its mark: behind what tells a decoder how to read the sound."""
    is_first, is_mono = frame[1] >> 3 & 3 == _MPEG_1, frame[3] >> 6 == 3
    return _HEADER + ((17 if is_mono else 32) if is_first else (9 if is_mono else 17))


def _place_of_count(frame: bytes) -> int:
    """Where a counting frame has its count; 0 where the frame is none."""
    place = _place_of_mark(frame)
    return place + 8 if frame[place : place + 4] in (b"Xing", b"Info") else 0


def _says_count(frame: bytes) -> bool:
    place = _place_of_count(frame)
    return place > 0 and bool(frame[place - 1] & _HAS_COUNT) and any(frame[place : place + 4])


def _counting_frame(like: bytes, count: int) -> bytes:
    """A frame of the same rate and channels that holds a count and no sound."""
    rate = 0xE0 | like[2] & 0x0C  # with the highest bit rate: there is room for the count
    header = bytes([like[0], like[1] | 1, rate, like[3]])  # no checksum
    place = _place_of_mark(header)
    mark = b"Info" + _HAS_COUNT.to_bytes(4, "big") + count.to_bytes(4, "big")
    return (header.ljust(place, b"\0") + mark).ljust(_frame_bytes(header, 0), b"\0")
