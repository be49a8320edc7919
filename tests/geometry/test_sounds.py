"""Sounds: clips, frames and tokens, from the number of samples alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.geometry.sounds import SoundGeometry

OMNI = SoundGeometry()
WHOLE = SoundGeometry(clip_s=None)
samples = st.integers(1, 5_000_000)


def halved(frames: int, times: int) -> int:
    """What `times` convolutions of kernel 3, stride 2, padding 1 leave of a number of frames."""
    for _ in range(times):
        frames = math.floor((frames + 2 - 3) / 2) + 1
    return frames


@settings(max_examples=300, deadline=None)
@given(num_samples=samples, geometry=st.sampled_from([OMNI, SoundGeometry(clip_s=5.0), SoundGeometry(clip_s=0.15)]))
def test_clips_are_whole_but_the_last(num_samples: int, geometry: SoundGeometry) -> None:
    lengths = geometry.clip_lengths(num_samples)
    longest, shortest = round(geometry.clip_s * 16_000), 1600
    assert all(length == longest for length in lengths[:-1])
    assert shortest <= lengths[-1] <= longest
    silence = sum(lengths) - num_samples
    assert 0 <= silence < shortest
    assert not silence or lengths[-1] == shortest  # silence only where the end is too short to be one


@settings(max_examples=300, deadline=None)
@given(num_samples=samples)
def test_without_a_limit_there_is_one_clip(num_samples: int) -> None:
    assert WHOLE.clip_lengths(num_samples) == [max(num_samples, 1600)]
    assert WHOLE.num_tokens(num_samples) == halved(max(num_samples, 1600) // 160, 3)


@settings(max_examples=300, deadline=None)
@given(num_samples=samples, exponent=st.integers(0, 5))
def test_tokens_are_frames_halved_as_often_as_the_encoder_does(num_samples: int, exponent: int) -> None:
    geometry = SoundGeometry(subsampling_factor=2**exponent)
    expected = [halved(length // 160, exponent) for length in geometry.clip_lengths(num_samples)]
    assert geometry.num_tokens(num_samples) == sum(expected)
    assert all(tokens > 0 for tokens in expected)


def test_another_rate_is_another_number_of_samples() -> None:
    geometry = SoundGeometry(sampling_rate=8000, hop_length=80)
    assert geometry.clip_lengths(8000 * 31) == [240_000, 8000]
    assert geometry.num_tokens(8000 * 31) == OMNI.num_tokens(16_000 * 31) == 375 + 13


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampling_rate": 0}, "sampling_rate of sounds is 0"),
        ({"hop_length": 0}, "hop_length of sounds is 0"),
        ({"subsampling_factor": 0}, "subsampling_factor of sounds is 0"),
        ({"subsampling_factor": 6}, "subsampling_factor of sounds is 6; expected a power of two"),
        ({"min_clip_s": 0.019}, "min_clip_s is 0.019; expected at least two frames of 160"),
        ({"clip_s": 0.05}, "clip_s is 0.05; expected at least min_clip_s = 0.1"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SoundGeometry(**options)
