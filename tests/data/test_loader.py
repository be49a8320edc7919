"""The loader's position, its look-ahead over an optimizer step, and errors of workers."""

from __future__ import annotations

import weakref

import pytest
import torch

from lightning_vlm.data.batching import FixedBatches
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.data.loader import ResumableLoader
from lightning_vlm.data.samplers import EpochPlan, Position
from lightning_vlm.schema import DataError, Sample


class Samples:
    """Sample ``i`` has ``i + 2`` tokens, all labelled; ``bad`` raises."""

    def __init__(self, count: int, bad: int | None = None) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index == self.bad:
            raise DataError(f"rows.jsonl:{index}", "the image is broken", "replace it")
        ids = torch.full((index + 2,), 7)
        return Sample(ids, ids.clone(), None, None, 1, "", ("",), f"rows.jsonl:{index}")


def loader(count: int = 13, batch_size: int = 2, **options: object) -> ResumableLoader:
    plan = EpochPlan(FixedBatches(count, batch_size, seed=3))
    return ResumableLoader(Samples(count), plan, PaddedCollate(0), **options)  # type: ignore[arg-type]


def rows(batches: object) -> list[list[str]]:
    return [batch.sources for batch in batches]  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 5, 6])
def test_continues_where_the_consumer_was(workers: int, position: int) -> None:
    whole = rows(loader())
    first = loader(num_workers=workers)
    iterator = iter(first)
    for _ in range(position):
        next(iterator)
    second = loader(num_workers=workers)
    second.load_state_dict(first.state_dict())
    assert rows(second) == whole[position:]


def test_a_finished_epoch_continues_with_the_next() -> None:
    first = loader()
    list(first)
    second, third = loader(), loader()
    second.load_state_dict(first.state_dict())
    third.set_epoch(1)
    assert rows(second) == rows(third) != rows(loader())


def test_state_restored_after_the_iterator_was_made_still_counts() -> None:
    whole = rows(loader())
    late = loader()
    iterator = iter(late)
    late.load_state_dict(late.plan.state(Position(0, 3)))
    assert rows(iterator) == whole[3:]


def test_setting_the_restored_epoch_keeps_the_position() -> None:
    resumed = loader()
    resumed.load_state_dict(resumed.plan.state(Position(2, 4)))
    resumed.set_epoch(2)
    assert len(rows(resumed)) == 3
    assert len(resumed) == 7, "the length stays that of a whole epoch"


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 100])
@pytest.mark.parametrize("start", [0, 3])
def test_each_micro_batch_knows_the_label_tokens_of_its_step(micro_batches: int, start: int) -> None:
    data = loader(micro_batches=lambda: micro_batches)
    start -= start % micro_batches
    data.load_state_dict(data.plan.state(Position(0, start)))
    batches = list(data)
    for first in range(0, len(batches), micro_batches):
        step = batches[first : first + micro_batches]
        assert {batch.step_label_tokens for batch in step} == {sum(batch.num_label_tokens for batch in step)}


def test_batches_beyond_the_limit_are_neither_read_nor_counted() -> None:
    data = loader(micro_batches=lambda: 2, stop=lambda: 3)
    batches = list(data)
    assert len(batches) == 3
    assert batches[2].step_label_tokens == batches[2].num_label_tokens


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_its_own_sentence(workers: int) -> None:
    plan = EpochPlan(FixedBatches(6, 2, shuffle=False))
    data = ResumableLoader(Samples(6, bad=3), plan, PaddedCollate(0), num_workers=workers)
    iterator = iter(data)
    next(iterator)
    with pytest.raises(DataError) as caught:
        next(iterator)
    assert str(caught.value) == "rows.jsonl:3: the image is broken; replace it."


def test_another_plan_is_refused_inside_an_epoch_and_welcome_between_epochs() -> None:
    data = loader()
    with pytest.raises(ValueError, match="another plan"):
        data.load_state_dict({"epoch": 1, "yielded": 3, "batches": 9, "fingerprint": "other"})
    with pytest.raises(ValueError, match="another plan"):  # further than this plan is long, yet not finished
        data.load_state_dict({"epoch": 1, "yielded": 8, "batches": 9, "fingerprint": "other"})
    data.load_state_dict({"epoch": 1, "yielded": 9, "batches": 9, "fingerprint": "other"})
    assert data.position.epoch == 2


def test_a_used_batch_is_not_held() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    for batch in loader(batch_size=1, micro_batches=lambda: 6):
        alive.add(batch.input_ids)
        del batch
        most = max(most, len(alive))
    assert most <= 1
