"""What is settled before the first batch: when lengths are measured, what a batch may hold, what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_vlm.data.batching import (
    FixedBatches,
    LengthGroupedBatches,
    PackedBatches,
    SubsetBatches,
    TokenBudgetBatches,
)
from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.packing import PackBudget
from lightning_vlm.data.plan import BatchOptions, DataPlan, in_file_order, plan_data
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import DataError
from lightning_vlm.sources.open import open_sources


@pytest.fixture
def make_plan(make_task: Callable[..., Path], tmp_path: Path) -> Callable[..., DataPlan]:
    """Plans 12 rows of 37 to 99 tokens."""
    file = make_task(12)

    def make(in_order: bool = False, **choices: Any) -> DataPlan:
        options = BatchOptions(**choices)
        dataset = SampleDataset(
            open_sources([file]),
            tiny_processor(),
            MediaPolicy(Path()),
            limit=options.sample_limit,
            overlong=options.overlong,
        )
        options = in_file_order(options) if in_order else options
        return plan_data(dataset, options, cache_dir=tmp_path / "cache", show_progress=False)

    return make


@pytest.mark.parametrize(
    ("choices", "needed"),
    [
        ({}, False),
        ({"sampler": "sequential"}, False),
        ({"max_tokens": 50}, True),  # what is too long is told before training
        ({"batch_tokens": 50}, False),
        ({"overlong": "drop"}, False),  # of what? no number is set
        ({"overlong": "drop", "max_tokens": 50}, True),
        ({"overlong": "downscale_images", "max_tokens": 50}, True),
        ({"overlong": "drop", "batch_tokens": 50}, False),
        ({"sampler": "length_grouped"}, True),
        ({"sampler": "token_budget"}, True),
        ({"packing": True}, True),
        ({"packing": True, "sampler": "sequential"}, True),
    ],
    ids=str,
)
def test_lengths_are_measured_where_a_choice_needs_them(
    make_plan: Callable[..., DataPlan], tmp_path: Path, choices: dict[str, Any], needed: bool
) -> None:
    assert BatchOptions(**choices).needs_lengths == needed
    if choices.get("max_tokens") is None:
        plan = make_plan(**choices)
        assert (plan.lengths is not None) == bool(list((tmp_path / "cache").glob("*.npz"))) == needed
        assert plan.dataset.lengths is plan.lengths, "what was measured is compared with every sample"


@pytest.mark.parametrize(
    ("choices", "limit"),
    [
        ({}, None),
        ({"max_tokens": 50}, SampleLimit(50)),
        ({"batch_tokens": 50, "batch_patches": 9}, None),  # budgets of a batch that has none
        ({"packing": True}, None),
        ({"packing": True, "batch_tokens": 50}, SampleLimit(50)),
        ({"packing": True, "batch_tokens": 50, "max_tokens": 40}, SampleLimit(40)),
        ({"packing": True, "batch_tokens": 50, "max_tokens": 60}, SampleLimit(50)),
        ({"sampler": "token_budget", "batch_tokens": 50, "batch_patches": 9}, SampleLimit(50, 9)),
        ({"packing": True, "batch_patches": 9}, SampleLimit(2**31 - 1, 9)),
    ],
    ids=str,
)
def test_what_no_batch_can_hold_is_too_long(choices: dict[str, Any], limit: SampleLimit | None) -> None:
    options = BatchOptions(**choices)
    assert options.sample_limit == limit == in_file_order(options).sample_limit


@pytest.mark.parametrize(
    ("choices", "kind"),
    [
        ({}, FixedBatches),
        ({"sampler": "sequential"}, FixedBatches),
        ({"sampler": "length_grouped"}, LengthGroupedBatches),
        ({"sampler": "token_budget"}, TokenBudgetBatches),
        ({"packing": True}, PackedBatches),
        ({"packing": True, "sampler": "sequential"}, PackedBatches),
    ],
    ids=str,
)
def test_choices_make_their_batcher(
    make_plan: Callable[..., DataPlan], choices: dict[str, Any], kind: type[Any]
) -> None:
    whole = make_plan(**choices, batch_size=3)
    assert type(whole.batcher) is kind
    first, second = (np.concatenate(whole.batcher.batches(epoch, 1)).tolist() for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert (first == second) == (choices.get("sampler") == "sequential")
    # 5 of 12 rows have more than 67 tokens.
    some = make_plan(**choices, batch_size=3, max_tokens=67, overlong="drop")
    assert type(some.batcher) is SubsetBatches
    assert type(some.batcher.inner) is kind
    assert len(some.overlong.dropped) == 5  # type: ignore[union-attr]
    assert some.overlong is not None
    assert some.overlong.kept.tolist() == [i for i, n in enumerate(some.lengths.tokens) if n <= 67]  # type: ignore
    assert sorted(np.concatenate(some.batcher.batches(0, 1)).tolist()) == some.overlong.kept.tolist()


@pytest.mark.parametrize("sampler", ["token_budget", "packing"])
def test_the_default_budget_holds_batch_size_average_samples_and_the_longest(
    make_plan: Callable[..., DataPlan], sampler: str
) -> None:
    choice = {"packing": True} if sampler == "packing" else {"sampler": sampler}
    tokens = make_plan(**choice).lengths.tokens  # type: ignore[union-attr]
    for batch_size in (1, 2, 7):
        plan = make_plan(**choice, batch_size=batch_size)
        assert plan.budget == PackBudget(max(math.ceil(batch_size * tokens.mean()), int(tokens.max())))
    assert make_plan(**choice, batch_tokens=130, batch_patches=24).budget == PackBudget(130, 24)
    assert make_plan(**choice, batch_patches=24, batch_size=1).budget == PackBudget(int(tokens.max()), 24)
    dropped = make_plan(**choice, batch_size=1, max_tokens=67, overlong="drop").budget
    assert dropped == PackBudget(int(tokens[tokens <= 67].max())), "what is left out decides nothing"
    assert make_plan(sampler="length_grouped", batch_tokens=130).budget is None


def test_too_long_is_refused_before_training(make_plan: Callable[..., DataPlan]) -> None:
    with pytest.raises(DataError, match=r"data.overlong: 5 of 12 samples \(41.7 %\) exceed 67 tokens: .*rows.jsonl:3 "):
        make_plan(packing=True, batch_tokens=67)
    assert make_plan(packing=True, batch_tokens=99).overlong is not None


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"sampler": "length_grouped"},
        {"sampler": "token_budget", "batch_tokens": 130},
        {"sampler": "token_budget", "batch_tokens": 67, "overlong": "drop"},
        {"packing": True, "batch_tokens": 130},
    ],
    ids=str,
)
def test_without_shuffling_every_epoch_is_the_same_and_limits_stay(
    make_plan: Callable[..., DataPlan], choices: dict[str, Any]
) -> None:
    plan, shuffled = make_plan(in_order=True, **choices), make_plan(**choices)
    first, second = (plan.batcher.batches(epoch, 1) for epoch in range(2))
    assert list(map(list, first)) == list(map(list, second))
    assert plan.budget == shuffled.budget
    assert plan.batcher.fingerprint != shuffled.batcher.fingerprint
    seen, same = (sorted(np.concatenate(batches).tolist()) for batches in (first, shuffled.batcher.batches(0, 1)))
    assert seen == same
    if plan.budget is not None and plan.lengths is not None:
        padded = [len(batch) * plan.lengths.tokens[batch].max() for batch in first]
        packed = [plan.lengths.tokens[batch].sum() for batch in first]
        assert max(packed if choices.get("packing") else padded) <= plan.budget.tokens
