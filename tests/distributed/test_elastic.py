"""A run that was stopped inside an epoch continues it on another number of ranks: every sample once, counters right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

ROWS = list(range(1, 24))
DATA: dict[str, dict[str, Any]] = {"packed": {"packing": True, "batch_tokens": 130}, "shuffle": {}}


def assert_counters(first: Any, second: Any, done: int) -> None:
    """Epoch 0 was stopped with ``done`` batches of each rank in the weights, and continued by another run to its end.

    Every row is seen once over both runs, Lightning's index ends where the epoch is long, the ledger says how many
    were seen, the loggers' steps go on without a gap or a repetition, and the next epoch is a whole one.
    """
    earlier = first.rows(0, done)
    assert second.error == ""
    assert sorted(earlier + second.rows(0)) == ROWS
    indices = second.indices(0)
    assert indices == list(range(indices[0], second.length)), "the epoch ends at its length"
    assert sorted(second.rows(1)) == ROWS
    assert second.indices(1) == list(range(second.length))
    planned, seen = second.logged("data/samples_planned"), second.logged("data/samples_seen")
    assert list(planned.values()) == [len(ROWS)] * 2
    assert list(seen.values()) == [len(ROWS) - len(earlier), len(ROWS)]
    assert [*first.logged("train/loss"), *second.logged("train/loss")] == list(range(second.step))


@pytest.mark.parametrize(
    ("kind", "before", "after", "stop_in"),
    [
        ("packed", 2, 1, 3),
        ("packed", 1, 2, 5),
        ("packed", 2, 1, 7),  # one step is left
        ("packed", 2, 4, 3),
        ("shuffle", 2, 1, 5),
        ("shuffle", 1, 2, 1),  # more steps are left than two ranks have in an epoch of their own, less one
    ],
)
def test_another_number_of_ranks_goes_on(
    start: Callable[..., Any], kind: str, before: int, after: int, stop_in: int
) -> None:
    first = start(before, stop_in, data=DATA[kind])
    assert first.error == "power cut"
    second = start(after, after=first, data=DATA[kind])
    assert_counters(first, second, stop_in)
    assert second.step == stop_in + len(second.indices(0)) + second.length


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_accumulated_steps_go_on(start: Callable[..., Any], before: int, after: int) -> None:
    """The remaining batches are counted from the epoch's end, so the first step of the new ranks may be a short one."""
    options = {"trainer": {"accumulate_grad_batches": 2}, "data": DATA["packed"]}
    first = start(before, 3, **options)
    second = start(after, after=first, **options)
    assert_counters(first, second, 2)  # the third batch is in no step
    for rank in second.ranks:
        for step in range(first.step, second.step):
            batches = [batch for batch in rank["batches"] if batch["step"] == step]
            assert {batch["index"] // 2 for batch in batches} == {batches[0]["index"] // 2}
            assert {batch["step_labels"] for batch in batches} == {sum(batch["labels"] for batch in batches)}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_of_the_last_batch_is_followed_by_a_whole_epoch(
    start: Callable[..., Any], before: int, after: int
) -> None:
    """It was written before Lightning counted the epoch as done: on fewer ranks the epoch is longer, and not done."""
    first = start(before, trainer={"max_epochs": 1})
    assert sorted(first.rows(0)) == ROWS
    second = start(after, after=first, ckpt=f"step={first.length}")
    assert second.error == ""
    assert second.indices(0) == []
    assert second.indices(1) == list(range(second.length))
    assert sorted(second.rows(1)) == ROWS
    assert [*first.logged("train/loss"), *second.logged("train/loss")] == list(range(second.step))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_what_max_steps_left_of_an_epoch_goes_on(start: Callable[..., Any], before: int, after: int) -> None:
    """The only checkpoint is the one of the epoch's end, as Lightning sees it."""
    at_the_end = {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True}
    first = start(before, data=DATA["packed"], trainer={"max_steps": 3}, checkpoints=at_the_end)
    assert first.error == ""
    assert list(first.logged("data/samples_seen").values()) == [len(first.rows(0))]
    second = start(after, after=first, data=DATA["packed"])
    assert_counters(first, second, 3)


@pytest.mark.parametrize("kind", list(DATA))
def test_crash_after_crash_on_changing_ranks(start: Callable[..., Any], kind: str) -> None:
    """2 ranks, then 1 that crashes in what the 2 have left, then 1 again, then 2, then 1 to the end."""
    run, seen, steps = None, [], []
    for ranks, stop_in, done in ((2, 2, 2), (1, 0, 0), (1, 2, 2), (2, 2, 2)):
        run = start(ranks, stop_in, after=run, data=DATA[kind])
        assert run.error == "power cut"
        assert {batch["epoch"] for batch in run.ranks[0]["batches"]} == {0}
        seen += run.rows(0, done)
        steps += run.logged("train/loss")
    assert 0 < len(seen) < len(ROWS)
    last = start(1, after=run, data=DATA[kind])
    assert last.error == ""
    assert sorted(seen + last.rows(0)) == sorted(last.rows(1)) == ROWS
    assert last.indices(0)[-1] + 1 == last.length
    assert list(last.logged("data/samples_seen").values()) == [len(ROWS) - len(seen), len(ROWS)]
    assert [*steps, *last.logged("train/loss")] == list(range(last.step))


def test_a_crash_in_the_part_that_was_dealt_out_anew_is_exact(start: Callable[..., Any]) -> None:
    first = start(2, 3, data=DATA["packed"])
    whole = start(1, after=first, data=DATA["packed"])
    crashed = start(1, 4, after=first, data=DATA["packed"], checkpoints={"every_n_train_steps": 1000})
    resumed = start(1, after=crashed, data=DATA["packed"])
    for name, expected in whole.weights().items():
        assert torch.equal(resumed.weights()[name], expected), name
