"""The ledger: it balances for every plan, rank and position, and for nothing that is one sample off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_vlm.data import ledger as ledger_module
from lightning_vlm.data.batching import FixedBatches
from lightning_vlm.data.ledger import Ledger, LedgerReport, Tally
from lightning_vlm.data.samplers import EpochPlan, Position

many = st.lists(st.integers(0, 60), max_size=40)


@settings(deadline=None, max_examples=300)
@given(left=many, right=many)
def test_a_tally_tells_collections_apart(left: list[int], right: list[int]) -> None:
    assert (Tally.of(left) == Tally.of(np.array(right, dtype=np.int64))) == (sorted(left) == sorted(right))
    assert Tally.of(left) + Tally.of(right) == Tally.of(left + right)


def test_checksums_of_neighbours_do_not_cancel() -> None:
    """0 and 3 instead of 1 and 2: a sum of the numbers themselves would not see it."""
    assert Tally.of([0, 3]) != Tally.of([1, 2])
    sums = [Tally.of([a, b]).checksum for a in range(300) for b in range(a)]
    assert len(set(sums)) == len(sums)


def test_many_samples_fit_64_bits() -> None:
    """Their checksums travel as int64; 2**31 samples of at most 2**32 - 1 each stay below 2**63."""
    largest = max(Tally.of([index]).checksum for index in range(100_000))
    assert 2**31 < largest < 2**32


def follow(
    plan: EpochPlan, opened: Position, taken: int, fault: Callable[[list[list[int]]], None] = lambda seen: None
) -> LedgerReport:
    """All ranks through an epoch; ``fault`` may change what rank 0 says it saw, batch by batch."""
    kept = np.sort(np.concatenate(plan.batcher.batches(opened.epoch, 1)))
    ledgers = [Ledger(plan, opened, rank, kept) for rank in range(plan.world_size)]
    for rank, ledger in enumerate(ledgers):
        batches = plan.batches(opened, rank)[:taken]
        seen = [list(batch.indices) if batch.counted else [] for batch in batches]
        if rank == 0:
            fault(seen)
        for batch in seen:
            ledger.see(batch)
        ledger.reached += len(batches)
    said: list[list[int]] = []
    for ledger in ledgers:
        ledger.close(lambda numbers: said.append(numbers) or numbers)  # type: ignore[func-returns-value]
    return ledgers[0].close(lambda numbers: np.sum(said, axis=0).tolist())


setups = st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2))


@settings(deadline=None, max_examples=150)
@given(setup=setups, start=st.floats(0, 1), share=st.floats(0, 1), earlier_ranks=st.integers(1, 5))
def test_it_balances_from_any_position_to_any(
    setup: tuple[int, int, int, int], start: float, share: float, earlier_ranks: int
) -> None:
    samples, batch_size, world_size, epoch = setup
    batcher = FixedBatches(samples, batch_size, seed=1)
    earlier, plan = EpochPlan(batcher, earlier_ranks), EpochPlan(batcher, world_size)
    opened = plan.restore(earlier.state(Position(epoch, int(start * len(earlier)))))
    assume(opened.epoch == epoch)
    left = len(plan) - opened.yielded
    taken = int(share * left)
    report = follow(plan, opened, taken)
    assert report.balances
    assert report.planned.count == samples
    assert report.seen.count == sum(
        len(batch.indices)
        for rank in range(world_size)
        for batch in plan.batches(opened, rank)[:taken]
        if batch.counted
    )
    assert report.earlier.count + report.seen.count + report.unreached.count == samples
    assert (report.unreached.count == 0) == (taken == left)


FAULTS: dict[str, Callable[[list[list[int]]], None]] = {
    "one sample lost": lambda seen: seen[1].pop(),  # type: ignore[dict-item, return-value]
    "one sample twice": lambda seen: seen[1].append(seen[0][0]),
    "one sample instead of another": lambda seen: seen[1].__setitem__(0, seen[0][0]),
    "one batch instead of another": lambda seen: seen.__setitem__(1, seen[0]),
    "a stranger": lambda seen: seen[1].__setitem__(0, 999),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("taken", [4, 2])
def test_one_sample_off_does_not_balance(fault: str, world_size: int, taken: int) -> None:
    plan = EpochPlan(FixedBatches(12 * world_size, 3, seed=1), world_size)
    assert follow(plan, Position(), taken).balances
    assert not follow(plan, Position(), taken, FAULTS[fault]).balances


def test_a_rank_that_is_elsewhere_does_not_balance() -> None:
    """The counters say one position, the loader was at another: what an elastic resume could get wrong."""
    plan = EpochPlan(FixedBatches(24, 2), 2)
    ledger = Ledger(plan, Position(0, 2), 0, np.arange(24))
    for batch in plan.batches(Position(0, 1), 0)[:5]:
        ledger.see(batch.indices)
    ledger.reached = len(plan)
    other = Ledger(plan, Position(0, 2), 1, np.arange(24))
    for batch in plan.batches(Position(0, 2), 1):
        other.see(batch.indices)
    other.reached = len(plan)
    said: list[list[int]] = []
    other.close(lambda numbers: said.append(numbers) or numbers)  # type: ignore[func-returns-value]
    assert not ledger.close(lambda numbers: np.add(numbers, said[0]).tolist()).balances


def test_skipped_samples_balance_and_have_reasons() -> None:
    plan = EpochPlan(FixedBatches(10, 5, shuffle=False))
    ledger = Ledger(plan, Position(), 0, np.arange(10))
    ledger.see([0, 1, 2])
    ledger.skip([3, 4], "broken image")
    ledger.reached = 1
    ledger.see([5])
    ledger.skip([6, 7, 8], "broken image")
    ledger.skip([9], "too dark")
    ledger.reached = 2
    report = ledger.close()
    assert report.balances
    assert report.reasons == {"broken image": 5, "too dark": 1}
    assert str(report) == (
        "10 samples planned, 0 seen before, 4 seen, 6 skipped (broken image: 5, too dark: 1), 0 not reached"
    )
    assert not replace(report, skipped=Tally()).balances


def test_a_report_says_what_came_before_and_what_was_not_reached() -> None:
    plan = EpochPlan(FixedBatches(10, 2))
    report = follow(plan, Position(0, 1), 2)
    assert str(report) == "10 samples planned, 2 seen before, 4 seen, 0 skipped, 4 not reached"


def test_when_what_was_seen_is_summed_up_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EpochPlan(FixedBatches(50, 4, seed=1), 2)
    expected = follow(plan, Position(), 3)
    monkeypatch.setattr(ledger_module, "_SUMMED_UP", 6)
    assert follow(plan, Position(), 3) == expected
    assert expected.balances
    assert expected.seen.count == 24
