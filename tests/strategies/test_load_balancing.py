"""Load balancing of experts is that of one process, wherever the routers are."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy
from lightning_vlm.strategies.stages import divide_by_parameters
from tests.strategies.conftest import TIMEOUT, TINY, assert_same

PACKED = {"packing": True, "batch_tokens": 200}
OPTIONS = {"config": {"pattern": "EEM*-ME"}, "module": {"load_balancing": 50.0}}


def pipeline(**options):
    return PipelineStrategy(timeout=TIMEOUT, **options)


def fsdp2(**options):
    return FSDP2Strategy(timeout=TIMEOUT, **options)


def options_of(accumulate, data=None, **module):
    module = {**OPTIONS["module"], **module}
    return {**OPTIONS, "module": module, "data": data or {}, "trainer": {"accumulate_grad_batches": accumulate}}


def test_both_stages_have_experts():
    model = NemotronVL(NemotronVLConfig.tiny(**TINY | OPTIONS["config"]))
    kinds = model.config.text_config.layers_block_type
    assert all("moe" in kinds[own.start : own.stop] for own in divide_by_parameters(model, 2))


@pytest.mark.parametrize("data", [{}, PACKED], ids=["padded", "packed"])
def test_it_shows_in_the_gradient(reference, data):
    balanced = reference(**options_of(4, data))
    plain = reference(**options_of(4, data, load_balancing=0.0))
    assert balanced.losses[0] == plain.losses[0]
    assert balanced.norms[0] != pytest.approx(plain.norms[0], rel=0.05)
    assert not plain.balances
    assert all(1e-3 < abs(balance - 1) < 1 for balance in balanced.balances)


@pytest.mark.parametrize("strategy", [lambda: "ddp", fsdp2], ids=["ddp", "fsdp2"])
def test_data_parallel_ranks_balance_as_one_process(run, reference, strategy):
    assert_balanced(run(2, strategy, **options_of(2)), reference(**options_of(4)))


def test_shards_balance_packs_as_whole_copies(run, reference):
    assert_balanced(run(2, fsdp2, **options_of(2, PACKED)), reference(2, **options_of(2, PACKED)))


def test_compiled_layers_balance_as_one_process(run, reference):
    config = {"config": {"pattern": "E-"}}
    found = run(2, partial(fsdp2, compile_layers=True), **options_of(2) | config)
    assert_balanced(found, reference(**options_of(4) | config))


def test_tensor_ranks_balance_as_one_process(run, reference):
    assert_balanced(run(2, partial(fsdp2, tensor=2), **options_of(4)), reference(**options_of(4)))


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("data", [{}, PACKED], ids=["padded", "packed"])
def test_stages_balance_as_one_process(run, reference, data, recomputes):
    found = run(2, pipeline, **options_of(4, data, gradient_checkpointing=recomputes))
    assert_balanced(found, reference(**options_of(4, data)))


def test_what_fills_a_pipeline_up_is_not_balanced(run, reference):
    assert_balanced(run(2, pipeline, **options_of(3)), reference(**options_of(3)))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble", "zbv"])
def test_ranks_with_two_stages_each_balance_as_one_process(run, reference, schedule):
    strategy = partial(pipeline, schedule=schedule, stages_per_rank=2)
    assert_balanced(run(2, strategy, **options_of(4)), reference(**options_of(4)))


def test_two_pipelines_balance_as_one_process(run, reference):
    assert_balanced(run(4, pipeline, **options_of(2)), reference(**options_of(4)))


def assert_balanced(divided, expected):
    assert_same(divided, expected)  # the worst that was measured here: 2.4e-7
    assert len(expected.balances) == 3
    assert divided.balances == pytest.approx(expected.balances, rel=1e-5)
