"""Overlong samples are refused, left out or scaled, as asked; whatever happens to them is said with names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.lengths import LengthTable, measure_lengths
from lightning_vlm.data.overlong import find_overlong, report_overlong
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import DataError
from lightning_vlm.sources.open import open_sources


def table_of(tokens: list[int], patches: list[int] | None = None, scaled: list[int] | None = None) -> LengthTable:
    patches = patches or [0] * len(tokens)
    return LengthTable(
        np.array(tokens, np.int32),
        np.array(patches, np.int32),
        (np.array(patches) > 0).astype(np.int32),
        np.zeros(len(tokens), np.int32),
        np.zeros(len(tokens), np.int32),
        np.array(scaled or [0] * len(tokens), np.bool_),
        np.zeros(len(tokens), np.bool_),
    )


@pytest.fixture
def dataset(write_rows: Callable[..., Path]) -> SampleDataset:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_rows([{"messages": turns}] * 10)
    return SampleDataset(open_sources([path]), tiny_processor(), MediaPolicy(Path()))


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (SampleLimit(100), []),
        (SampleLimit(50), [1]),
        (SampleLimit(49), [0, 1]),
        (SampleLimit(100, 20), []),
        (SampleLimit(100, 19), [2]),
        (SampleLimit(50, 5), [1, 2]),
    ],
    ids=str,
)
def test_overlong_is_beyond_either_bound(limit: SampleLimit, found: list[int]) -> None:
    assert find_overlong(table_of([50, 51, 3], [0, 4, 20]), limit).tolist() == found


@pytest.mark.parametrize("policy", ["error", "drop", "downscale_images"])
def test_nothing_overlong_is_nothing_to_say(dataset: SampleDataset, policy: Any) -> None:
    report = report_overlong(dataset, table_of([50] * 10), SampleLimit(50), policy)
    assert report.kept.tolist() == list(range(10))
    assert report.dropped.tolist() == []
    assert report.num_scaled == 0
    assert report.message == ""


class TestError:
    def test_names_the_first_five_the_share_and_the_longest(self, dataset: SampleDataset) -> None:
        path = dataset.sources[0].path
        table = table_of([60, 9, 61, 62, 9, 1063, 64, 65, 9, 66], [0] * 9 + [16])
        with pytest.raises(DataError) as caught:
            report_overlong(dataset, table, SampleLimit(50, 20), "error")
        assert str(caught.value) == (
            f"data.overlong: 7 of 10 samples (70.0 %) exceed 50 tokens and 20 vision patches: {path}:1 (60 tokens, "
            f"0 patches), {path}:3 (61 tokens, 0 patches), {path}:4 (62 tokens, 0 patches), {path}:6 (1,063 tokens, "
            f"0 patches), {path}:7 (64 tokens, 0 patches) and 2 more, the longest being {path}:6 (1,063 tokens, "
            "0 patches); raise the limit, drop these samples (overlong: drop) or downscale_images "
            "(overlong: downscale_images)."
        )

    def test_of_one_sample(self, dataset: SampleDataset) -> None:
        with pytest.raises(DataError) as caught:
            report_overlong(dataset, table_of([9] * 9 + [60]), SampleLimit(50), "error")
        assert str(caught.value) == (
            f"data.overlong: 1 of 10 samples (10.0 %) exceeds 50 tokens: {dataset.sources[0].path}:10 (60 tokens, "
            "0 patches); raise the limit, or drop these samples (overlong: drop)."
        )

    def test_the_longest_is_the_one_that_exceeds_most_in_its_own_unit(self, dataset: SampleDataset) -> None:
        table = table_of([60, 9, 9, *[9] * 7], [0, 50, 0, *[0] * 7])
        with pytest.raises(DataError, match=r"the longest being .*:2 \(9 tokens, 50 patches\)"):
            report_overlong(dataset, table, SampleLimit(50, 20), "error")


class TestVideos:
    @pytest.mark.parametrize("policy", ["error", "drop", "truncate_text", "downscale_images"])
    @pytest.mark.parametrize("with_video", [0, 1])
    def test_can_be_shown_shorter(self, dataset: SampleDataset, policy: Any, with_video: int) -> None:
        table = table_of([60] * 10)
        table.videos[-1] = with_video
        words = "show fewer frames or prune them (processor_options.video: num_frames, fps, pruning_rate)"
        with pytest.raises(DataError) as caught:
            report_overlong(dataset, table, SampleLimit(50), policy)
        assert (words in caught.value.fix) is bool(with_video)
        assert caught.value.fix.startswith("raise the limit")
        assert not caught.value.fix.endswith((",", " "))


class TestDrop:
    def test_keeps_the_others_and_says_what_is_left_out(self, dataset: SampleDataset) -> None:
        path = dataset.sources[0].path
        report = report_overlong(dataset, table_of([9, 60, 9, 9, 70, *[9] * 5]), SampleLimit(50), "drop")
        assert report.kept.tolist() == [0, 2, 3, 5, 6, 7, 8, 9]
        assert report.dropped.tolist() == [1, 4]
        assert report.message == (
            f"2 of 10 samples (20.0 %) exceed 50 tokens and will not be trained on: {path}:2 (60 tokens, 0 patches), "
            f"{path}:5 (70 tokens, 0 patches), the longest being {path}:5 (70 tokens, 0 patches)"
        )

    def test_of_everything_is_refused(self, dataset: SampleDataset) -> None:
        with pytest.raises(DataError, match=r"10 of 10 samples \(100.0 %\) exceed 50 tokens: .*; raise the limit\."):
            report_overlong(dataset, table_of([60] * 10), SampleLimit(50), "drop")

    def test_tells_a_small_share(self, dataset: SampleDataset) -> None:
        report = report_overlong(dataset, table_of([60] + [9] * 4999), SampleLimit(50), "drop")
        assert "1 of 5,000 samples (less than 0.1 %)" in report.message


class TestDownscale:
    def test_says_how_many_were_scaled(self, dataset: SampleDataset) -> None:
        table = table_of([50] * 10, [8] * 10, scaled=[1, 0, 1] + [0] * 7)
        report = report_overlong(dataset, table, SampleLimit(50), "downscale_images")
        assert report.num_scaled == 2
        assert report.message == "the images of 2 of 10 samples (20.0 %) were made smaller to fit 50 tokens"
        assert len(report.kept) == 10

    def test_refuses_what_does_not_fit_even_so(self, dataset: SampleDataset) -> None:
        table = table_of([60] + [50] * 9, [8] * 10, scaled=[1] * 10)
        with pytest.raises(
            DataError,
            match=r"1 of 10 samples \(10.0 %\) exceeds 50 tokens even with the smallest images: .*rows.jsonl:1 ",
        ):
            report_overlong(dataset, table, SampleLimit(50), "downscale_images")


def test_unknown_policy(dataset: SampleDataset) -> None:
    with pytest.raises(ValueError, match="overlong='truncate' is unknown"):
        report_overlong(dataset, table_of([9] * 10), SampleLimit(50), "truncate")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_from_rows_to_samples_that_all_fit(
    make_task: Callable[..., Path], write_image: Callable[..., str], tmp_path: Path, mode: str
) -> None:
    path = make_task(12)
    for index in (2, 5, 8, 11):
        write_image(f"rows.jsonl-{index}-1.png", 100, 130, index)
    processor = tiny_processor(mode=mode, tile_size=16)
    limit = {"dynamic": SampleLimit(120), "static": SampleLimit(10**6, 50)}[mode]

    def make(**options: Any) -> SampleDataset:
        return SampleDataset(open_sources([path]), processor, MediaPolicy(Path()), limit=limit, **options)

    def measure(samples: SampleDataset) -> LengthTable:
        return measure_lengths(samples, 0, tmp_path / "cache", show_progress=False)

    whole = make()
    with pytest.raises(DataError, match=rf"4 of 12 samples \(33.3 %\) exceed {limit}: "):
        report_overlong(whole, measure(whole), limit, "error")
    dropped = report_overlong(whole, measure(whole), limit, "drop")
    assert dropped.dropped.tolist() == [2, 5, 8, 11]
    checked = make(overlong="drop", lengths=measure(whole))
    assert [len(checked[int(index)]) for index in dropped.kept] == measure(whole).tokens[dropped.kept].tolist()
    for index in dropped.dropped:
        with pytest.raises(DataError, match=f"{re.escape(str(path))}:{index + 1}: .* expected at most {limit};"):
            checked[int(index)]

    scaling = make(overlong="downscale_images")
    table = measure(scaling)
    report = report_overlong(scaling, table, limit, "downscale_images")
    assert report.num_scaled == 4
    checked = scaling.with_lengths(table)
    for index in report.kept:
        sample = checked[int(index)]
        assert limit.holds(len(sample), 0 if sample.pixel_values is None else len(sample.pixel_values))
