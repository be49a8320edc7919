"""MP3 files without a count of their frames: read to their end, as those that have one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lightning_vlm.media.audio import audio_info, load_audio
from lightning_vlm.media.mp3 import with_length
from lightning_vlm.media.policy import MediaPolicy

SOURCE = "file.jsonl:12"
POLICY = MediaPolicy(Path())
MODES = ("CONSTANT", "AVERAGE", "VARIABLE")
RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
DELAY = 576
ID3 = b"ID3\x03\x00\x00" + bytes([0, 0, 1, 2]) + bytes(130)


def mp3(rate: int = 44_100, channels: int = 1, mode: str = "VARIABLE") -> bytes:
    """Three seconds that begin in silence: the first frame's bit rate is far from that of the others."""
    noise = np.random.default_rng(0).normal(size=(3 * rate, channels)) * np.linspace(0, 0.3, 3 * rate)[:, None]
    content = io.BytesIO()
    soundfile.write(content, noise, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return content.getvalue()


def bare(content: bytes) -> bytes:
    """The same without its first frame, which says the length."""
    place = max(content.find(mark) for mark in (b"Xing", b"Info"))
    assert place > 0
    return content[content.index(content[:2], place) :]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_is_read_to_its_end(rate: int, channels: int, mode: str) -> None:
    content = mp3(rate, channels, mode)
    expected, _ = load_audio(content, POLICY, SOURCE, rate)
    assert len(expected) == 3 * rate
    info = audio_info(bare(content), POLICY, SOURCE)
    found, _ = load_audio(bare(content), POLICY, SOURCE, rate)
    assert 3 * rate <= info.num_samples == len(found) < 3 * rate + 3 * 1152
    # An encoder's own silence in front is cut off where its first frame tells how long it is.
    assert (found[DELAY:][: 2 * rate] - expected[: 2 * rate]).abs().max() < 1e-5


@pytest.mark.parametrize("before", [b"", ID3, ID3 + ID3], ids=len)
@pytest.mark.parametrize("behind", [b"", b"TAG" + b"\xff\xfb\x90" * 41 + b"ab", b"\xff\xfb\x90\x64half"], ids=len)
def test_what_is_no_frame_does_not_count(before: bytes, behind: bytes) -> None:
    content = bare(mp3())
    assert audio_info(before + content + behind, POLICY, SOURCE) == audio_info(content, POLICY, SOURCE)
    expected, _ = load_audio(content, POLICY, SOURCE)
    found, _ = load_audio(before + content + behind, POLICY, SOURCE)
    assert len(found) == len(expected)


@pytest.mark.parametrize("before", [b"", ID3])
def test_one_that_says_its_length_is_left_alone(before: bytes) -> None:
    stream = io.BytesIO(before + mp3())
    assert with_length(stream) is stream
    assert stream.tell() == 0


def test_a_count_that_was_never_filled_in_is_none() -> None:
    content = bytearray(mp3())
    place = content.index(b"Xing") + 8
    content[place : place + 4] = bytes(4)
    assert audio_info(bytes(content), POLICY, SOURCE) == audio_info(bare(mp3()), POLICY, SOURCE)


def test_what_is_no_mp3_is_left_to_its_reader() -> None:
    stream = io.BytesIO(b"no frames here \xff\xfb\x90\x64")
    assert with_length(stream) is stream
    assert stream.tell() == 0
