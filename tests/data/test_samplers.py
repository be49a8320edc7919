"""The plan: every sample once, equal steps on every rank, a pure function of its arguments, elastic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.data.batching import (
    Batcher,
    FixedBatches,
    LengthGroupedBatches,
    PackedBatches,
    SubsetBatches,
    TokenBudgetBatches,
)
from lightning_vlm.data.packing import PackBudget
from lightning_vlm.data.samplers import EpochPlan, PlannedBatch, Position

KINDS = ("shuffle", "sequential", "length_grouped", "token_budget", "packed", "subset")


def make_batcher(kind: str, num_samples: int, batch_size: int = 2, seed: int = 0) -> Batcher:
    rng = np.random.default_rng(num_samples)
    tokens, patches = rng.integers(1, 60, num_samples), rng.integers(0, 3, num_samples) * 16
    budget = PackBudget(max(60, 20 * batch_size), 80)
    return {
        "shuffle": lambda: FixedBatches(num_samples, batch_size, True, seed),
        "sequential": lambda: FixedBatches(num_samples, batch_size, False, seed),
        "length_grouped": lambda: LengthGroupedBatches(tokens, batch_size, seed),
        "token_budget": lambda: TokenBudgetBatches(tokens, patches, budget, seed),
        "packed": lambda: PackedBatches(tokens, patches, budget, True, seed),
        "subset": lambda: SubsetBatches(FixedBatches(num_samples, batch_size, True, seed), np.arange(num_samples) * 3),
    }[kind]()


def samples_of(kind: str, num_samples: int) -> list[int]:
    return [index * (3 if kind == "subset" else 1) for index in range(num_samples)]


def counted(ranks: list[list[PlannedBatch]]) -> list[int]:
    return [index for batches in ranks for batch in batches if batch.counted for index in batch.indices]


setups = st.tuples(st.sampled_from(KINDS), st.integers(1, 120), st.integers(1, 6), st.integers(0, 3))


@settings(deadline=None, max_examples=150)
@given(setup=setups, world_size=st.integers(1, 8), epoch=st.integers(0, 3))
def test_every_sample_once_and_equal_steps(setup: tuple[str, int, int, int], world_size: int, epoch: int) -> None:
    kind, num_samples, *_ = setup
    plan = EpochPlan(make_batcher(*setup), world_size)
    ranks = [plan.batches(Position(epoch), rank) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(plan)}
    assert sorted(counted(ranks)) == samples_of(kind, num_samples)
    assert all(batch.indices for batches in ranks for batch in batches)


@settings(deadline=None, max_examples=50)
@given(num_samples=st.integers(1, 200), batch_size=st.integers(1, 9), world_size=st.integers(1, 8))
def test_the_last_fixed_step_is_dealt_out_evenly(num_samples: int, batch_size: int, world_size: int) -> None:
    plan = EpochPlan(FixedBatches(num_samples, batch_size), world_size)
    for step in zip(*(plan.batches(Position(), rank) for rank in range(world_size))):
        sizes = [len(batch.indices) if batch.counted else 0 for batch in step]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size


@settings(deadline=None, max_examples=60)
@given(setup=setups, epoch=st.integers(0, 2))
def test_a_plan_is_a_pure_function(setup: tuple[str, int, int, int], epoch: int) -> None:
    plan, again = (EpochPlan(make_batcher(*setup), 2) for _ in range(2))
    plan.batches(Position(7))  # what was asked before changes nothing
    assert again.batches(Position(epoch), 1) == plan.batches(Position(epoch), 1)
    assert again.fingerprint == plan.fingerprint


@pytest.mark.parametrize("kind", ["shuffle", "length_grouped", "token_budget", "packed"])
def test_epochs_and_seeds_give_unrelated_orders(kind: str) -> None:
    orders = {
        tuple(counted([EpochPlan(make_batcher(kind, 50, seed=seed)).batches(Position(epoch))]))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_sequential_is_in_order() -> None:
    assert counted([EpochPlan(FixedBatches(5, 2, shuffle=False)).batches(Position(3))]) == [0, 1, 2, 3, 4]


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks() -> None:
    one = EpochPlan(FixedBatches(64, 8)).batches(Position())
    plan = EpochPlan(FixedBatches(64, 2), world_size=4)
    four = [plan.batches(Position(), rank) for rank in range(4)]
    for step, batch in enumerate(one):
        assert [index for rank in four for index in rank[step].indices] == list(batch.indices)


# Stopped on some ranks, continued on others


@settings(deadline=None, max_examples=150)
@given(
    setup=setups,
    parts=st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1)), min_size=2, max_size=4),
    epoch=st.integers(0, 2),
)
def test_another_number_of_ranks_sees_exactly_what_was_left(
    setup: tuple[str, int, int, int], parts: list[tuple[int, float]], epoch: int
) -> None:
    """Several stops in one epoch, each followed by another number of ranks."""
    kind, num_samples, *_ = setup
    batcher = make_batcher(*setup)
    position, state, seen = Position(epoch), None, []
    for part, (world_size, share) in enumerate(parts):
        plan = EpochPlan(batcher, world_size)
        if state is not None:
            position = plan.restore(state)
            if position.epoch != epoch:
                break
        ranks = [plan.batches(position, rank) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {len(plan) - position.yielded}, "the epoch ends at its length"
        is_last = part == len(parts) - 1
        taken = len(ranks[0]) if is_last else int(share * len(ranks[0]))
        seen += counted([batches[:taken] for batches in ranks])
        state = plan.state(Position(position.epoch, position.yielded + taken, position.dealt))
    assert sorted(seen) == samples_of(kind, num_samples)


def test_the_same_number_of_ranks_continues_at_its_place() -> None:
    plan = EpochPlan(make_batcher("packed", 50), 3)
    whole = plan.batches(Position(2), 1)
    position = plan.restore(plan.state(Position(2, 4)))
    assert position == Position(2, 4)
    assert plan.batches(position, 1) == whole[4:]


def test_a_state_is_plain_data() -> None:
    state = EpochPlan(FixedBatches(9, 2), 2).state(Position(1, 2, ((4, 1),)))
    assert {type(value) for value in state.values()} == {int, str, list}


@pytest.mark.parametrize(
    "change",
    [{"num_samples": 9}, {"batch_size": 3}, {"shuffle": False}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_position_of_another_plan_is_refused_inside_an_epoch(change: dict[str, object]) -> None:
    base = {"num_samples": 10, "batch_size": 2}
    plan, other = EpochPlan(FixedBatches(**base)), EpochPlan(FixedBatches(**{**base, **change}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stopped after batch 2 of epoch 1 of another plan.*keep data files"):
        other.restore(plan.state(Position(1, 2)))
    assert other.restore(plan.state(Position(1, 5))) == Position(2), "between epochs any plan may go on"


@pytest.mark.parametrize("kind", ["length_grouped", "token_budget", "packed"])
def test_a_changed_length_is_another_plan(kind: str) -> None:
    tokens, patches = np.array([3, 4, 5, 6]), np.zeros(4, np.int64)
    budget = PackBudget(10)
    make = {
        "length_grouped": lambda t: LengthGroupedBatches(t, 2),
        "token_budget": lambda t: TokenBudgetBatches(t, patches, budget),
        "packed": lambda t: PackedBatches(t, patches, budget),
    }[kind]
    assert make(tokens).fingerprint == make(tokens.copy()).fingerprint != make(tokens + [0, 0, 0, 1]).fingerprint


def test_changed_data_is_another_plan() -> None:
    assert EpochPlan(FixedBatches(4, 2), data="a").fingerprint != EpochPlan(FixedBatches(4, 2), data="b").fingerprint
