"""Packed rows on two ranks: the gradient of one rank, and a ledger that balances over both or stops both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

ROWS = list(range(1, 24))
PACKED = {"packing": True, "batch_tokens": 130}
STAND_IN = {"batch_size": 11}  # 2 x 11 + 1: the last row is on one rank


def test_a_step_has_one_gradient_however_its_samples_are_laid_out(start: Callable[..., Any]) -> None:
    """The whole epoch is one step: padded on one rank, packed on one, packed on two, and with a packed stand-in."""
    options = {"lr": 0.0, "trainer": {"max_epochs": 1, "accumulate_grad_batches": 1000}}
    padded = start(1, **options)
    (expected,) = padded.gradients()
    (loss,) = padded.logged("train/loss").values()
    for ranks, data in ((1, PACKED), (2, PACKED), (2, {**STAND_IN, "collate": "packed"})):
        run = start(ranks, data=data, **options)
        assert sorted(run.rows(0)) == ROWS
        assert list(run.logged("train/loss").values()) == pytest.approx([loss], abs=1e-5)  # measured: 9.5e-7
        for rank in range(ranks):
            (found,) = run.gradients(rank)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)  # measured: 1.2e-7


@pytest.mark.parametrize(
    ("data", "trainer", "seen", "dropped"),
    [
        ({}, {}, 23, 0),
        (STAND_IN, {}, 23, 0),
        ({"sampler": "sequential"}, {}, 23, 0),
        ({"sampler": "length_grouped"}, {}, 23, 0),
        ({"sampler": "token_budget"}, {}, 23, 0),
        (PACKED, {}, 23, 0),
        ({**PACKED, "max_tokens": 96, "overlong": "drop"}, {}, 20, 3),
        ({}, {"limit_train_batches": 3}, 12, 0),
        ({}, {"max_steps": 2}, 8, 0),
    ],
    ids=str,
)
def test_the_ledger_balances_over_two_ranks(
    start: Callable[..., Any], data: dict[str, Any], trainer: dict[str, Any], seen: int, dropped: int
) -> None:
    run = start(2, data=data, trainer={"max_epochs": 1, **trainer})
    assert run.error == ""
    rows = run.rows(0)
    assert len(rows) == len(set(rows)) == seen
    found = {name: list(run.logged(f"data/samples_{name}").values()) for name in ("planned", "seen", "dropped")}
    assert found == {"planned": [23 - dropped], "seen": [seen], "dropped": [dropped]}
    if data is STAND_IN:
        assert run.ranks[1]["batches"][-1]["rows"] == []


def test_the_ledger_balances_when_two_ranks_resume_inside_an_epoch(start: Callable[..., Any]) -> None:
    first = start(2, 3, data=PACKED)
    second = start(2, after=first, data=PACKED)
    assert second.error == ""
    assert sorted(first.rows(0, 3) + second.rows(0)) == sorted(second.rows(1)) == ROWS
    assert list(second.logged("data/samples_seen").values()) == [23 - len(first.rows(0, 3)), 23]


@pytest.mark.parametrize("data", [PACKED, {}], ids=["packed", "shuffle"])
def test_what_one_rank_sees_twice_stops_both(start: Callable[..., Any], data: dict[str, Any]) -> None:
    run = start(2, data=data, faulty=True)
    assert run.error.startswith("the ledger of epoch 0 does not balance: 23 samples planned, 0 seen before, ")
    assert run.error.endswith("a sample was lost or seen twice, please report this with the config")
