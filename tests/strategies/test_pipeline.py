"""A pipeline is one process, divided: the same losses, the same gradients, the same answers."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_vlm.strategies import PipelineStrategy
from tests.strategies.conftest import TIMEOUT

# The worst that was measured.
CLOSE = {"rel": 1e-5, "abs": 0.0}


def pipeline(**options):
    return PipelineStrategy(timeout=TIMEOUT, **options)


def assert_same(divided, single, steps=3):
    assert len(single.losses) == steps
    assert divided.losses == pytest.approx(single.losses, **CLOSE)
    assert divided.norms == pytest.approx(single.norms, **CLOSE)
    assert divided.val == pytest.approx(single.val, **CLOSE)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b"],
)
def test_two_stages_train_as_one_process(run, schedule, packing):
    data = {"packing": packing, "batch_tokens": 200} if packing else {}
    trainer = {"accumulate_grad_batches": 3}
    single = run(data=data, trainer=trainer)
    divided = run(2, partial(pipeline, schedule=schedule), data=data, trainer=trainer)
    assert_same(divided, single)
