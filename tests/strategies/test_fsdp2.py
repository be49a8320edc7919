"""FSDP2 is one process, divided: the same losses and the same gradients."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_vlm.strategies import FSDP2Strategy
from tests.strategies.conftest import TIMEOUT

# The worst that was measured.
CLOSE = {"rel": 1e-5, "abs": 0.0}


def fsdp2(**options):
    return FSDP2Strategy(timeout=TIMEOUT, **options)


def assert_same(divided, single):
    assert len(single.losses) == 3
    assert divided.losses == pytest.approx(single.losses, **CLOSE)
    assert divided.norms == pytest.approx(single.norms, **CLOSE)
    assert divided.val == pytest.approx(single.val, **CLOSE)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_two_ranks_train_as_one(run, packing):
    data = {"packing": packing, "batch_tokens": 200} if packing else {}
    accumulate = {"trainer": {"accumulate_grad_batches": 2}} if packing else {}
    single = run(data={"batch_size": 4, **data}, **accumulate)
    divided = run(2, fsdp2, data=data)
    print(single, divided)
    assert_same(divided, single)
