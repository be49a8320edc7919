"""Estimated lengths: NeMo AutoModel's numbers, with the cases where rounding, defaults and missing data decide."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_utils import SizeDict

from lightning_vlm.automodel.estimates import (
    _estimate_image_tokens,
    _estimate_sample_length,
    _estimate_video_tokens,
    _smart_resize_image,
    _smart_resize_video,
    estimate_tokens,
    image_config,
    video_config,
)

IMAGE = image_config(SimpleNamespace(image_processor=SimpleNamespace()))
VIDEO = video_config(SimpleNamespace(video_processor=SimpleNamespace()))
assert IMAGE is not None
assert VIDEO is not None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1000), (28, 1792)),
        ((10, 10), (56, 56)),
        ((10_000, 10_000), (980, 980)),
        ((280, 560), (280, 560)),
        ((42, 420), (56, 420)),  # 1.5 factors: half to even goes up
        ((70, 420), (56, 420)),  # 2.5 factors: half to even goes down
        ((13, 1000), (28, 504)),  # rounds to 0, and so is below the minimum
        ((15, 100_000), (28, 81_788)),
        ((100_000, 15), (81_788, 28)),  # a side is never less than a factor, even above the maximum
    ],
    ids=str,
)
def test_images_are_resized(size: tuple[int, int], expected: tuple[int, int]) -> None:
    actual = _smart_resize_image(*size)
    assert actual == expected
    assert {type(side) for side in actual} == {int}


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ((1, 10, 10), (128, 128)),
        ((3, 64, 64), (64, 64)),
        ((4, 64, 64), (64, 64)),  # exactly the minimum: 4 frames
        ((2, 64, 64), (96, 96)),  # below it
        ((768, 480, 640), (96, 128)),  # above the maximum
    ],
    ids=str,
)
def test_videos_are_resized(video: tuple[int, int, int], expected: tuple[int, int]) -> None:
    assert _smart_resize_video(*video) == expected


def test_the_bounds_count_padded_frames_and_the_scale_those_without() -> None:
    # 3 frames count as 4, so 4 x 64 x 64 exceeds 12,288; the scale from 3 frames is 1 and leaves the size as it is.
    assert _smart_resize_video(3, 64, 64, min_pixels=1, max_pixels=12_288) == (64, 64)
    assert _smart_resize_video(3, 64, 64, temporal_factor=1, min_pixels=1, max_pixels=12_287) == (32, 32)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_a_side_of_zero_has_no_scale(size: tuple[int, int]) -> None:
    with pytest.raises(ZeroDivisionError):
        _smart_resize_image(*size)
    with pytest.raises(ZeroDivisionError):
        _smart_resize_video(2, *size)
    with pytest.raises(ZeroDivisionError):
        _smart_resize_video(0, 5, 5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([14, 28, 32]))
def test_sizes_are_multiples_within_the_bounds(height: int, width: int, factor: int) -> None:
    rows, columns = _smart_resize_image(height, width, factor)
    assert rows % factor == columns % factor == 0
    assert rows * columns >= 56 * 56
    assert rows * columns <= 14 * 14 * 4 * 1280 or min(rows, columns) == factor


def test_image_tokens_are_merged_patches() -> None:
    assert _estimate_image_tokens([280, 560], IMAGE) == (280 // 14) * (560 // 14) // 4
    assert _estimate_image_tokens(("280", 560.0), IMAGE) == 200
    # Integer divisions one after another: 3 x 3 patches of which 2 x 2 merge.
    odd = {"patch_size": 10, "merge_size": 2, "factor": 16, "min_pixels": 1, "max_pixels": 10**6}
    assert _estimate_image_tokens([32, 32], odd) == 3 * 3 // 4


@pytest.mark.parametrize(
    ("video", "frames"),
    [
        ([100, 128, 128, 25.0, 4.0], 8),  # 4 s at 2 per second
        ([0, 128, 128, 25.0, 4.0], 8),  # frames from the duration
        ([3, 128, 128, 25.0, 0.0], 4),  # at least min_frames, even of a video with fewer
        ([0, 128, 128, 0.0, 4.0], 4),  # no rate and no frames: still min_frames
        ([9, 128, 128, 0.0, 100.0], 10),  # no rate: from the duration, at most all, then a whole temporal patch
        ([10**5, 128, 128, 10.0, 10**4], 768),  # at most max_frames
        ([125, 128, 128, 25.0, 5.0], 10),
    ],
    ids=str,
)
def test_video_tokens_follow_from_sampled_frames(video: list[float], frames: int) -> None:
    height, width = _smart_resize_video(frames, 128, 128)
    assert _estimate_video_tokens(video, VIDEO) == frames // 2 * (height // 16) * (width // 16) // 4


def test_a_very_short_video_has_a_frame() -> None:
    assert _estimate_video_tokens([9, 128, 128, 30.0, 0.3], {**VIDEO, "min_frames": 0}) == 8 * 8 // 4


@pytest.mark.parametrize("estimate", [_estimate_image_tokens, _estimate_video_tokens])
def test_counts_that_were_stored_are_used(estimate: Any) -> None:
    assert estimate({"n_tokens": 77, "height": 9}, IMAGE) == 77
    assert estimate({"height": 9}, IMAGE) == 500


ROW = {
    "conversation": [
        {"role": "system", "content": "x" * 10},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "y" * 7}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text"}, {"type": "audio"}, "bare"]},
        {"role": "assistant"},
    ]
}


def test_text_is_a_third_of_all_characters_and_media_are_500() -> None:
    assert estimate_tokens(ROW, None, None) == (17 // 3, 1000)
    assert _estimate_sample_length(ROW) == 1005
    assert _estimate_sample_length(ROW, return_media_tokens=True) == (1005, 1000)
    assert _estimate_sample_length(ROW, IMAGE, VIDEO) == 1005, "configs alone tell no size"


def test_a_row_without_conversation_is_empty() -> None:
    assert _estimate_sample_length({}) == 0
    assert _estimate_sample_length({"conversation": []}, return_media_tokens=True) == (0, 0)


@pytest.mark.parametrize("count", [0, 12, "12"])
def test_text_that_was_counted_before_wins_even_if_zero(count: Any) -> None:
    assert estimate_tokens({**ROW, "_text_tokens": count}, None, None) == (int(count), 1000)


@pytest.mark.parametrize("count", [0, 12])
def test_media_that_were_counted_before_win_even_if_zero(count: int) -> None:
    row = {**ROW, "_media_tokens": count, "mm_inputs_meta": {"images_meta": [[280, 560]]}}
    assert estimate_tokens(row, IMAGE, None) == (5, count)


def test_metadata_are_summed_for_the_kinds_that_have_a_config() -> None:
    video = [100, 128, 128, 25.0, 4.0]
    row = {**ROW, "mm_inputs_meta": {"images_meta": [[280, 560], None, [280, 280]], "videos_meta": [None, video]}}
    images, videos = 200 + 100, _estimate_video_tokens(video, VIDEO)
    assert estimate_tokens(row, IMAGE, VIDEO)[1] == images + videos
    assert estimate_tokens(row, IMAGE, None)[1] == images, "a kind without a config counts nothing"
    assert estimate_tokens(row, None, VIDEO)[1] == videos
    assert estimate_tokens(row, None, None)[1] == 1000, "without any config, by item"
    assert estimate_tokens({**ROW, "mm_inputs_meta": {"images_meta": None}}, IMAGE, VIDEO)[1] == 0


def test_a_processor_without_a_part_has_no_config() -> None:
    assert image_config(SimpleNamespace()) is None
    assert image_config(None) is None
    assert video_config(SimpleNamespace(video_processor=None)) is None


def test_defaults_are_those_of_qwen() -> None:
    assert IMAGE == {"patch_size": 14, "merge_size": 2, "factor": 28, "min_pixels": 3136, "max_pixels": 1003520}
    frames = {"temporal_patch_size": 2, "fps": 2.0, "min_frames": 4, "max_frames": 768}
    sizes = {"patch_size": 16, "merge_size": 2, "factor": 32, "min_pixels": 16384, "max_pixels": 12582912}
    assert sizes | frames == VIDEO


@pytest.mark.parametrize(
    ("own", "size", "expected"),
    [
        (50, {"min_pixels": 60, "shortest_edge": 70}, 50),
        (None, {"min_pixels": 60, "shortest_edge": 70}, 60),
        (0, {"min_pixels": 0, "shortest_edge": 70}, 70),
        (None, {}, 3136),
        (None, None, 3136),
        (None, SizeDict(shortest_edge=70, longest_edge=80), 70),
    ],
    ids=str,
)
def test_bounds_are_the_first_that_is_set(own: int | None, size: Any, expected: int) -> None:
    config = image_config(SimpleNamespace(image_processor=SimpleNamespace(min_pixels=own, size=size)))
    assert config is not None
    assert config["min_pixels"] == expected


def test_a_processors_own_numbers_are_used() -> None:
    inner = SimpleNamespace(patch_size=16, merge_size=3, max_pixels=9, fps=1, min_frames=2, max_frames=5)
    config = video_config(SimpleNamespace(video_processor=inner))
    assert config is not None
    assert (config["factor"], config["max_pixels"]) == (48, 9)
    assert (config["fps"], config["min_frames"], config["max_frames"]) == (1, 2, 5)
    assert math.prod(config[name] for name in ("patch_size", "merge_size")) == config["factor"]
