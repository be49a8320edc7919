"""Videos: frames, grids, tubelets, times and token counts, against the numbers of the spec and of NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.geometry.videos import (
    VideoGeometry,
    frame_labels,
    retained_tokens,
    timestamps_s,
    uniform_frames,
)

OMNI = VideoGeometry()
NANO_12B = VideoGeometry(temporal_patch_size=1, keep_aspect=False)
side = st.integers(1, 5000)


class TestGrid:
    @settings(max_examples=300, deadline=None)
    @given(
        height=side,
        width=side,
        target=st.sampled_from([4, 16, 1000, 1024, 4096]),
        merge=st.sampled_from([1, 2, 4]),
        keep_aspect=st.booleans(),
    )
    def test_is_that_of_the_spec(self, height: int, width: int, target: int, merge: int, keep_aspect: bool) -> None:
        # D3 in the order of its words; transformers' own class needs torchvision.
        target = max(target, merge**2)
        if keep_aspect:
            aspect = width / height
            sides = [max(round(math.sqrt(side)), 1) for side in (target / aspect, target * aspect)]
            up = [side + -side % merge for side in sides]
            expected = up if up[0] * up[1] <= target else [max(side - side % merge, merge) for side in sides]
        else:
            expected = [max(math.isqrt(target) // merge * merge, merge)] * 2
        geometry = VideoGeometry(merge_size=merge, target_num_patches=target, keep_aspect=keep_aspect)
        assert geometry.grid(height, width) == tuple(expected)

    @settings(max_examples=200, deadline=None)
    @given(height=st.integers(100, 5000), width=st.integers(100, 5000))
    def test_is_near_the_target_in_whole_tokens(self, height: int, width: int) -> None:
        rows, columns = OMNI.grid(height, width)
        assert rows % 2 == columns % 2 == 0
        assert OMNI.tokens_per_tubelet((rows, columns)) * 4 == rows * columns
        if 1 / 4 <= width / height <= 4:
            assert 900 <= rows * columns <= 1060  # the product of two rounded sides can be more: 18.3 x 57.0 -> 18 x 58

    def test_of_a_strip_exceeds_the_target_as_the_reference_does(self) -> None:
        # The shorter side cannot be less than a token, and the longer one is not made to make up for it.
        assert OMNI.grid(1, 1000) == (2, 1012)

    @pytest.mark.parametrize("size", [(0, 5), (5, 0)])
    def test_of_a_video_without_pixels_is_refused(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels"):
            OMNI.grid(*size)


class TestUniformFrames:
    @settings(max_examples=500, deadline=None)
    @given(total=st.integers(1, 20_000), num_frames=st.integers(1, 512))
    def test_are_those_of_numpy(self, total: int, num_frames: int) -> None:
        chosen = uniform_frames(total, None, VideoGeometry(num_frames=num_frames, fps=2.0))
        assert chosen == np.linspace(0, total - 1, min(total, num_frames), dtype=int).tolist()

    @settings(max_examples=500, deadline=None)
    @given(
        total=st.integers(1, 20_000),
        num_frames=st.integers(1, 512),
        source_fps=st.floats(0.1, 240) | st.sampled_from([24.0, 25.0, 30.0, 60.0, 24000 / 1001, 30000 / 1001]),
        fps=st.floats(0.1, 60) | st.sampled_from([1.0, 2.0, 4.0]),
    )
    def test_are_as_many_as_serving_takes(self, total: int, num_frames: int, source_fps: float, fps: float) -> None:
        # vLLM's loader, in the order of its words.
        count = min(num_frames, total)
        count = max(1, min(count, math.floor(total / source_fps * fps)))
        expected = list(range(total)) if count == total else np.linspace(0, total - 1, count, dtype=int).tolist()
        chosen = uniform_frames(total, source_fps, VideoGeometry(num_frames=num_frames, fps=fps))
        assert chosen == expected
        assert all(earlier < later for earlier, later in itertools.pairwise(chosen))
        assert 0 <= chosen[0] <= chosen[-1] <= total - 1

    @pytest.mark.parametrize(
        ("total", "source_fps", "options", "expected"),
        [
            (300, 30.0, {"num_frames": 4, "fps": 2.0}, [0, 99, 199, 299]),
            (300, 30.0, {"num_frames": 256, "fps": 1.0}, [0, 33, 66, 99, 132, 166, 199, 232, 265, 299]),
            (10, 30.0, {"fps": 2.0}, [0]),  # a third of a second: none by the rate, but never none
            (3, None, {"fps": 2.0}, [0, 1, 2]),  # no rate is known: all
            (3, 1.0, {"fps": 2.0}, [0, 1, 2]),  # fewer than asked for: all, none twice
            (3, 30.0, {"fps": None}, [0, 1, 2]),
            (1, None, {}, [0]),
        ],
    )
    def test_of_known_videos(self, total: int, source_fps: float | None, options: dict, expected: list[int]) -> None:
        assert uniform_frames(total, source_fps, VideoGeometry(**options)) == expected


class TestTimes:
    @settings(max_examples=200, deadline=None)
    @given(fps=st.floats(0.05, 240), indices=st.lists(st.integers(0, 10**6), max_size=5))
    def test_are_whole_milliseconds_per_frame(self, fps: float, indices: list[int]) -> None:
        assert timestamps_s(indices, fps) == [index * int(1000 / fps) / 1000 for index in indices]

    def test_of_no_frame_are_none(self) -> None:
        assert timestamps_s([], 30.0) == []


class TestLabels:
    @settings(max_examples=100, deadline=None)
    @given(num_frames=st.integers(1, 40), size=st.integers(1, 4), timed=st.booleans())
    def test_name_each_frame_once_in_order(self, num_frames: int, size: int, timed: bool) -> None:
        times = [0.5 * index for index in range(num_frames)] if timed else None
        labels = frame_labels(num_frames, times, size)
        assert len(labels) == VideoGeometry(temporal_patch_size=size).num_tubelets(num_frames)
        joined = "".join(labels)
        names = [f"rame {number}" + (f" sampled at {0.5 * (number - 1):.2f} seconds" if timed else "") for number in
                 range(1, num_frames + 1)]  # fmt: skip
        assert [joined.count(name + " and ") + joined.count(name + ": ") for name in names] == [1] * num_frames
        assert [label.count("\n") for label in labels] == [0] + [1] * (len(labels) - 1)


class TestRetained:
    @settings(max_examples=300, deadline=None)
    @given(tokens=st.integers(1, 2000), tubelets=st.integers(1, 300), rate=st.floats(0, 0.999))
    def test_is_the_papers_formula(self, tokens: int, tubelets: int, rate: float) -> None:
        kept = retained_tokens(tokens, tubelets, rate)
        assert kept == max(tokens, int(tubelets * tokens * (1 - rate)))
        assert tokens <= kept <= tokens * tubelets

    def test_none_pruned_is_all(self) -> None:
        assert all(retained_tokens(size, number, 0.0) == size * number for size in (1, 252) for number in (1, 7, 64))

    def test_counts_frames_as_tubelets(self) -> None:
        assert OMNI.num_tokens(5, (32, 32)) == 3 * 256
        assert NANO_12B.num_tokens(5, (32, 32)) == 5 * 256
        assert VideoGeometry(pruning_rate=0.7).num_tokens(128, (24, 42)) == int(64 * 252 * (1 - 0.7))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 0}, "patch_size of videos is 0"),
        ({"merge_size": 0}, "merge_size of videos is 0"),
        ({"temporal_patch_size": 0}, "temporal_patch_size of videos is 0"),
        ({"num_frames": 0}, "num_frames of videos is 0"),
        ({"target_num_patches": 3}, "target_num_patches of videos is 3"),
        ({"fps": 0.0}, "fps of videos is 0.0"),
        ({"fps": -1.0}, "fps of videos is -1.0"),
        ({"fps": math.nan}, "fps of videos is nan"),
        ({"pruning_rate": 1.0}, "pruning_rate of videos is 1.0"),
        ({"pruning_rate": -0.1}, "pruning_rate of videos is -0.1"),
        ({"pruning_rate": math.nan}, "pruning_rate of videos is nan"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VideoGeometry(**options)
