"""Packs: nothing lost, no budget exceeded, about as few as best-fit decreasing, even, and well mixed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_vlm.data.packing import PackBudget, Packs, order_packs, plan_packs, reassign_equals

SPEC = importlib.util.spec_from_file_location(
    "packing_plan", Path(__file__).parents[2] / "benchmarks" / "packing_plan.py"
)
assert SPEC is not None
assert SPEC.loader is not None
benchmark = sys.modules.setdefault("packing_plan", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(benchmark)

ROWS = benchmark.distributions(30_000)
BIG = pytest.mark.parametrize("name", list(ROWS))


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, PackBudget]:
    """Tens to hundreds of samples of any mixture, with no, a loose or a tight budget of patches."""
    count = draw(st.integers(1, 300))
    budget = draw(st.sampled_from([1, 7, 100, 4096]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = draw(st.floats(0.02, 1.0))
    spread = draw(st.sampled_from([0.0, 0.5, 1.0]))
    tokens = np.ceil(budget * largest * (1 - spread * rng.random(count))).astype(np.int64)
    if draw(st.booleans()):
        tokens[rng.random(count) < 0.5] = 1
    patches = np.where(rng.random(count) < draw(st.sampled_from([0.0, 0.3, 1.0])), rng.integers(0, 4 * tokens + 1), 0)
    most = draw(st.sampled_from([None, 1.0, 1.2, 3.0]))
    return tokens, patches, PackBudget(budget, None if most is None else int(most * max(patches.max(), 1)))


def best_fit_decreasing(tokens: np.ndarray, patches: np.ndarray, budget: PackBudget) -> int:
    """The textbook, one by one: largest first, into the open pack with least left."""
    most = budget.patches or max(int(patches.sum()), 1)
    free: list[tuple[int, int]] = []
    for sample in sorted(range(len(tokens)), key=lambda i: -max(tokens[i] / budget.tokens, patches[i] / most)):
        fitting = [i for i, (t, p) in enumerate(free) if t >= tokens[sample] and p >= patches[sample]]
        if fitting:
            pack = min(fitting, key=lambda i: free[i][0] / budget.tokens + free[i][1] / most)
        else:
            free.append((budget.tokens, most))
            pack = len(free) - 1
        free[pack] = free[pack][0] - int(tokens[sample]), free[pack][1] - int(patches[sample])
    return len(free)


def assert_packed(packs: Packs, rows: tuple[np.ndarray, np.ndarray, PackBudget]) -> None:
    tokens, patches, budget = rows
    assert np.array_equal(np.sort(packs.members), np.arange(len(tokens)))
    assert packs.starts[0] == 0
    assert packs.starts[-1] == len(tokens)
    assert (np.diff(packs.starts) > 0).all(), "an empty pack"
    assert (packs.totals(tokens) <= budget.tokens).all()
    assert budget.patches is None or (packs.totals(patches) <= budget.patches).all()


@settings(deadline=None, max_examples=200)
@given(rows=data_sets(), multiple_of=st.sampled_from([1, 2, 5, 8, 64]))
@example(rows=(np.array([5]), np.array([0]), PackBudget(5)), multiple_of=8)
@example(rows=(np.array([5] * 9), np.array([0] * 9), PackBudget(5)), multiple_of=8)
def test_every_sample_once_within_both_budgets(
    rows: tuple[np.ndarray, np.ndarray, PackBudget], multiple_of: int
) -> None:
    packs = plan_packs(*rows, multiple_of)
    assert_packed(packs, rows)
    assert len(packs) % multiple_of == 0 or len(packs) == len(rows[0])
    again = plan_packs(*rows, multiple_of)
    assert np.array_equal(again.members, packs.members)
    assert np.array_equal(again.starts, packs.starts)


@settings(deadline=None, max_examples=150)
@given(rows=data_sets())
def test_no_more_packs_than_best_fit_decreasing(rows: tuple[np.ndarray, np.ndarray, PackBudget]) -> None:
    reference = best_fit_decreasing(*rows)
    assert len(plan_packs(*rows)) <= max(reference + 1, int(1.02 * reference))


@pytest.mark.parametrize("kind", ["thirds", "tiles", "halves", "documents"])
def test_many_samples_that_are_hard_to_pack(kind: str) -> None:
    """Beyond the size at which best fit is tried one by one, where only the bound by totals is at hand."""
    rng = np.random.default_rng(0)
    count = 21_000
    tiles = rng.integers(1, 14, count)
    rows, tightest = {
        "thirds": ((rng.integers(250, 750, count), np.zeros(count, np.int64), PackBudget(1000)), 0.97),
        "tiles": ((tiles * 256 + rng.integers(9, 200, count), tiles * 1024, PackBudget(16384, 16384)), 0.97),
        "halves": ((rng.integers(501, 1001, count), np.zeros(count, np.int64), PackBudget(1000)), 0.0),
        "documents": ((rng.integers(1, 1001, count), tiles * 0 + rng.integers(0, 9, count), PackBudget(1000, 9)), 0.0),
    }[kind]
    packs = plan_packs(*rows)
    assert_packed(packs, rows)
    tokens, patches, budget = rows
    lower = max(tokens.sum() / budget.tokens, patches.sum() / (budget.patches or np.inf))
    assert lower / len(packs) > tightest
    if kind == "halves":
        assert len(packs) == count


@BIG
def test_fill_of_typical_data(name: str) -> None:
    packs = plan_packs(*ROWS[name])
    assert_packed(packs, ROWS[name])
    assert packs.totals(ROWS[name][0]).sum() / (len(packs) * ROWS[name][2].tokens) > 0.99 * benchmark.bound(ROWS[name])


@BIG
@pytest.mark.parametrize("num_samples", [300, 30_000])
def test_slack_is_spread(name: str, num_samples: int) -> None:
    tokens, patches, budget = (*(values[:num_samples] for values in ROWS[name][:2]), ROWS[name][2])
    least = len(plan_packs(tokens, patches, budget))
    packs = plan_packs(tokens, patches, budget, multiple_of=int(1.3 * least))
    assert len(packs) == int(1.3 * least)
    loads = packs.totals(tokens)
    # One document can be more than an even share: it is alone then, or nearly so.
    assert np.quantile(loads, 0.75) < 1.05 * loads.mean() + 300
    assert loads.min() > 0.7 * np.median(loads)
    if patches.any():
        assert packs.totals(patches).std() < 0.1 * packs.totals(patches).mean()


def test_one_pack_of_many_tiny_samples() -> None:
    tokens = np.ones(50_000, dtype=np.int64)
    assert len(plan_packs(tokens, 0 * tokens, PackBudget(50_000))) == 1
    packs = plan_packs(tokens, 0 * tokens, PackBudget(50_000), multiple_of=7)
    assert np.ptp(packs.totals(tokens)) <= 1


def test_narrow_integers_do_not_overflow() -> None:
    tokens = np.full(200, 30_000, dtype=np.int16)
    packs = plan_packs(tokens, np.zeros(200, dtype=np.uint8), PackBudget(6_000_000))
    assert packs.totals(tokens).tolist() == [6_000_000]
    assert packs.totals(tokens / 2).tolist() == [3_000_000]


def test_no_samples() -> None:
    none = np.zeros(0, dtype=np.int64)
    packs = plan_packs(none, none, PackBudget(8), multiple_of=4)
    assert len(packs) == len(packs.totals(none)) == len(list(packs)) == 0
    assert len(reassign_equals(packs, none, none, np.random.default_rng(0))) == 0
    assert len(order_packs(packs.totals(none), 4, np.random.default_rng(0))) == 0


def test_packs_are_a_sequence() -> None:
    packs = Packs(np.array([4, 2, 0, 1, 3]), np.array([0, 2, 5]))
    assert [pack.tolist() for pack in packs] == [[4, 2], [0, 1, 3]]
    assert packs[-1].tolist() == [0, 1, 3]
    with pytest.raises(IndexError, match="pack 2 of 2"):
        packs[2]


@pytest.mark.parametrize(
    ("tokens", "patches", "message"),
    [
        ([4, 9, 10], [0, 0, 0], "sample 1 has 9 tokens and 0 patches; expected at least 1 and 0, at most 8 and 4"),
        ([4, 4, 4], [0, 0, 5], "sample 2 has 4 tokens and 5 patches; expected at least 1 and 0, at most 8 and 4"),
        ([0, 4, 4], [0, 0, 0], "sample 0 has 0 tokens"),
        ([4, 4, 4], [0, -1, 0], "sample 1 has 4 tokens and -1 patches"),
        ([4, 4], [0], "do not go together"),
    ],
)
def test_what_does_not_fit_is_named(tokens: list[int], patches: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_packs(np.array(tokens), np.array(patches), PackBudget(8, 4))


def test_other_arguments_are_checked() -> None:
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(ValueError, match="multiple_of 0"):
        plan_packs(one, one, PackBudget(8), 0)
    with pytest.raises(ValueError, match="world_size is 0"):
        order_packs(one, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="holds nothing"):
        PackBudget(0)


@settings(deadline=None, max_examples=50)
@given(rows=data_sets(), seed=st.integers(0, 9))
def test_equals_are_reassigned_within_their_kind(rows: tuple[np.ndarray, np.ndarray, PackBudget], seed: int) -> None:
    tokens, patches, _ = rows
    packs = plan_packs(*rows)
    drawn = reassign_equals(packs, tokens, patches, np.random.default_rng(seed))
    assert_packed(drawn, rows)
    for values in (tokens, patches):
        assert np.array_equal(values[drawn.members], values[packs.members])
    again = reassign_equals(packs, tokens, patches, np.random.default_rng(seed))
    assert np.array_equal(again.members, drawn.members)


def test_equals_are_drawn_uniformly() -> None:
    tokens = np.array([3, 5, 3, 3, 5, 3, 2])
    packs = plan_packs(tokens, 0 * tokens, PackBudget(8))
    rng = np.random.default_rng(0)
    drawn = np.array([reassign_equals(packs, tokens, 0 * tokens, rng).members for _ in range(4000)])
    places = np.flatnonzero(tokens[packs.members] == 3)
    for sample in np.flatnonzero(tokens == 3):
        frequencies = (drawn[:, places] == sample).mean(0)
        assert np.abs(frequencies - 1 / 4).max() < 0.04, "six standard deviations"


@BIG
@pytest.mark.parametrize("world_size", [2, 8, 64])
@pytest.mark.parametrize("patch_cost", [0.05, 0.25, 1.0])
def test_ranks_of_a_step_cost_the_same(name: str, world_size: int, patch_cost: float) -> None:
    tokens, patches, budget = ROWS[name]
    packs = PLANS.setdefault((name, world_size), plan_packs(tokens, patches, budget, world_size))
    cost = packs.totals(tokens) + patch_cost * packs.totals(patches)
    order = order_packs(cost, world_size, np.random.default_rng(0))
    assert np.array_equal(np.sort(order), np.arange(len(packs)))
    assert benchmark.balance(cost, order, world_size)[0] < 1.10


PLANS: dict[tuple[str, int], Packs] = {}


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5], ids=["alike", "some windows", "sorted through"])
def test_an_epoch_does_not_go_by_size(sigma: float) -> None:
    world_size, num_steps = 8, 400
    cost = np.random.default_rng(0).lognormal(0, sigma, num_steps * world_size)
    by_position = np.zeros(num_steps)
    by_rank = np.zeros(world_size)
    largest = np.zeros(world_size)
    epochs = 60
    for epoch in range(epochs):
        order = order_packs(cost, world_size, np.random.default_rng(epoch))
        steps = cost[order].reshape(num_steps, world_size)
        by_position += steps.mean(1) / epochs
        by_rank += steps.mean(0) / epochs
        largest += np.bincount(steps.argmax(1), minlength=world_size) / (epochs * num_steps)
    # Means over epochs of what is independent of the position: standard errors, five of them.
    error = cost.std() / np.sqrt(epochs)
    assert abs(np.corrcoef(by_position, np.arange(num_steps))[0, 1]) < 5 / np.sqrt(num_steps)
    decile = num_steps // 10
    for part in (by_position[:decile], by_position[-decile:]):
        assert abs(part.mean() - cost.mean()) < 5 * error / np.sqrt(decile)
    assert np.abs(by_rank - cost.mean()).max() < 5 * error / np.sqrt(num_steps)
    assert np.abs(largest - 1 / world_size).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / (epochs * num_steps))


def test_costs_far_apart_are_sorted_until_steps_are_even() -> None:
    cost = np.random.default_rng(0).lognormal(0, 1.0, 64 * 100)
    order = order_packs(cost, 4, np.random.default_rng(0))
    worst, mean = benchmark.balance(cost, order, 4)
    assert mean < 1.01
    assert benchmark.balance(cost, np.arange(len(cost)), 4)[1] > 1.5
    assert worst < 2, "only the very largest have no equals"


@pytest.mark.parametrize(("count", "world_size"), [(10, 4), (3, 4), (7, 1), (1, 1), (8, 4)])
def test_the_partial_step_comes_last(count: int, world_size: int) -> None:
    cost = np.arange(count)
    lasts = set()
    for seed in range(40):
        order = order_packs(cost, world_size, np.random.default_rng(seed))
        assert np.array_equal(np.sort(order), np.arange(count))
        assert np.array_equal(order, order_packs(cost, world_size, np.random.default_rng(seed)))
        lasts.add(int(order[-1]))
    assert len(lasts) > min(count, 4) - 1, "any pack may come last"
