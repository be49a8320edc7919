"""The plan: every sample once, equal steps on every rank, a pure function of its arguments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.data.samplers import EpochPlan

plans = st.builds(
    EpochPlan,
    num_samples=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 8),
    sampler=st.sampled_from(["shuffle", "sequential"]),
    seed=st.integers(0, 5),
)


@settings(deadline=None, max_examples=200)
@given(plan=plans, epoch=st.integers(0, 3))
def test_every_sample_once_and_equal_steps(plan: EpochPlan, epoch: int) -> None:
    ranks = [plan.batches(epoch, rank) for rank in range(plan.world_size)]
    assert {len(batches) for batches in ranks} == {len(plan)}
    counted = [index for batches in ranks for batch in batches if batch.counted for index in batch.indices]
    assert sorted(counted) == list(range(plan.num_samples))
    for batches in ranks:
        assert all(1 <= len(batch.indices) <= plan.batch_size for batch in batches)
    for step in zip(*ranks):
        sizes = [len(batch.indices) if batch.counted else 0 for batch in step]
        assert max(sizes) - min(sizes) <= 1, "a step is dealt out evenly"


@settings(deadline=None, max_examples=50)
@given(plan=plans)
def test_plan_is_a_pure_function(plan: EpochPlan) -> None:
    again = EpochPlan(plan.num_samples, plan.batch_size, plan.world_size, plan.sampler, plan.seed)
    assert again.batches(1, 0) == plan.batches(1, 0)
    assert again.fingerprint == plan.fingerprint


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    orders = {tuple(EpochPlan(50, 1, seed=seed).order(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_sequential_is_in_order() -> None:
    assert EpochPlan(5, 2, sampler="sequential").order(3) == [0, 1, 2, 3, 4]


def test_the_order_of_a_step_does_not_depend_on_the_number_of_ranks() -> None:
    one = EpochPlan(64, 8).batches(0)
    four = [EpochPlan(64, 2, world_size=4).batches(0, rank) for rank in range(4)]
    for step, batch in enumerate(one):
        assert [index for rank in four for index in rank[step].indices] == list(batch.indices)


@pytest.mark.parametrize(
    "change",
    [{"num_samples": 9}, {"batch_size": 3}, {"world_size": 2}, {"sampler": "sequential"}, {"seed": 1}, {"data": "x"}],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_changes_with_everything_that_moves_samples(change: dict[str, object]) -> None:
    base = {"num_samples": 10, "batch_size": 2}
    assert EpochPlan(**base).fingerprint != EpochPlan(**{**base, **change}).fingerprint  # type: ignore[arg-type]


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        EpochPlan(4, 0)
