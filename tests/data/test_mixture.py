"""Weights are met exactly, epoch by epoch, however samples are batched and wherever a run is resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.data.batching import FixedBatches, SubsetBatches
from lightning_vlm.data.mixture import CycleBatches, cycle_length, members_by_epoch
from lightning_vlm.data.samplers import EpochPlan, Position
from lightning_vlm.schema import DataError


@pytest.mark.parametrize(
    ("weights", "epochs"),
    [([1.0], 1), ([2, 3], 1), ([0.5, 1], 2), ([0.333, 1], 3), ([0.3], 10), ([1.5, 0.25], 4), ([0.05], 20)],
)
def test_a_cycle_is_as_short_as_the_weights_allow(weights: list[float], epochs: int) -> None:
    assert cycle_length(weights) == epochs


def test_weights_that_no_short_cycle_meets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the weights 1, 0.017 are met exactly only after more than 20 epochs"):
        cycle_length([1, 0.017])


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 0.1]), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_every_row_is_taken_as_often_as_its_weight_says(counts: list[int], weights: list[float], seed: int) -> None:
    each = np.concatenate([np.full(count, weight) for count, weight in zip(counts, weights)])
    indices = np.arange(len(each)) * 2  # some of a larger dataset
    members = members_by_epoch(indices, each, seed)
    taken = Counter(np.concatenate(members).tolist())
    for index, weight in zip(indices.tolist(), each.tolist()):
        assert taken[index] == round(weight * len(members))
        for own in members:  # never more unevenly than the weight itself is
            assert int(np.floor(weight)) <= np.count_nonzero(own == index) <= int(np.ceil(weight))
    sizes = [len(own) for own in members]
    assert max(sizes) - min(sizes) <= 1


def test_which_part_comes_when_follows_from_the_seed() -> None:
    parts = [members_by_epoch(np.arange(40), np.full(40, 0.5), seed) for seed in (0, 0, 1)]
    assert np.array_equal(parts[0][0], parts[1][0])
    assert not np.array_equal(parts[0][0], parts[2][0])
    assert not set(parts[0][0].tolist()) & set(parts[0][1].tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_epochs_have_equally_many_steps(world_size: int, batch_size: int) -> None:
    members = members_by_epoch(np.arange(13), np.full(13, 0.5), 0)
    cycle = CycleBatches([SubsetBatches(FixedBatches(len(own), batch_size), own) for own in members])
    plan = EpochPlan(cycle, world_size)
    for epoch, own in enumerate([*members, *members]):
        ranks = [plan.batches(Position(epoch), rank) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {len(plan)}
        seen = [index for batches in ranks for batch in batches if batch.counted for index in batch.indices]
        assert sorted(seen) == own.tolist()


@pytest.fixture
def mixed(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> Callable[..., VLMDataModule]:
    def make(**options: Any) -> VLMDataModule:
        sources = [{"path": str(make_task(10, "a.jsonl")), "weight": 2.0}, str(make_task(6, "b.jsonl")),
                   {"path": str(make_task(8, "c.jsonl")), "weight": 0.5}]  # fmt: skip
        data = VLMDataModule(train=sources, processor=processor, **{"batch_size": 3, **options})
        data.setup("fit")
        return data

    return make


def rows_of(batches: Any) -> list[str]:
    return [Path(source).name for batch in batches for source in batch.sources]


CHOICES: list[dict[str, Any]] = [{}, {"packing": True}, {"sampler": "length_grouped"}, {"sampler": "token_budget"}]


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_an_epoch_of_the_datamodule_holds_what_the_weights_say(
    mixed: Callable[..., VLMDataModule], options: dict[str, Any]
) -> None:
    data = mixed(**options)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        epochs.append(rows_of(loader))
    for rows in epochs:
        counts = Counter(row.partition(":")[0] for row in rows)
        assert counts == {"a.jsonl": 20, "b.jsonl": 6, "c.jsonl": 4}
    halves = [{row for row in rows if row.startswith("c")} for rows in epochs]
    assert not halves[0] & halves[1]
    assert halves[0] == halves[2]
    assert halves[1] == halves[3]


def test_an_epoch_without_samples_is_refused(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    data = VLMDataModule(train=[{"path": str(make_task(1)), "weight": 0.25}], processor=processor)
    with pytest.raises(DataError, match=r"the weights leave an epoch of the 1 samples empty"):
        data.setup("fit")


def test_evaluation_takes_each_row_once(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    data = VLMDataModule(val=[{"path": str(make_task(6)), "weight": 0.5}], processor=processor, batch_size=2)
    data.setup("validate")
    assert len(rows_of(data.val_dataloader())) == 6


def test_a_bad_sample_that_is_taken_twice_is_counted_twice(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    file = make_task(4)
    next(tmp_path.glob("rows.jsonl-*.png")).unlink()
    data = VLMDataModule(train=[{"path": str(file), "weight": 2}], processor=processor, batch_size=8)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(batch.skipped) == 2
    assert len(batch) == 6


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_it_resumes_inside_any_epoch(mixed: Callable[..., VLMDataModule], options: dict[str, Any]) -> None:
    whole, stopped, resumed = (mixed(**options).train_dataloader() for _ in range(3))
    for loader in (whole, stopped):
        loader.set_epoch(1)
    expected = rows_of(whole)
    iterator = iter(stopped)
    first = rows_of([next(iterator), next(iterator)])
    resumed.load_state_dict(stopped.state_dict())
    assert first + rows_of(resumed) == expected


def test_other_weights_are_another_plan(mixed: Callable[..., VLMDataModule], make_task: Callable[..., Path],
                                        processor: NemotronVLProcessor) -> None:  # fmt: skip
    plain = VLMDataModule(train=[str(make_task(10, "a.jsonl"))], processor=processor, batch_size=3)
    double = VLMDataModule(train=[{"path": str(make_task(10, "a.jsonl")), "weight": 2}], processor=processor,
                           batch_size=3)  # fmt: skip
    for data in (plain, double):
        data.setup("fit")
    assert plain.train_plan().fingerprint != double.train_plan().fingerprint


def test_the_summary_says_that_epochs_differ(mixed: Callable[..., VLMDataModule]) -> None:
    text = mixed(packing=True).summary().text()
    assert "30 (other ones in each of 2 epochs)" in text
