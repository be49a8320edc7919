"""A pipeline is one process, divided: the same losses and gradients with every schedule and any number of stages."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_vlm.strategies import PipelineStrategy
from tests.strategies.conftest import TIMEOUT, assert_same

PACKED = {"packing": True, "batch_tokens": 200}
EIGHT = {"pattern": "ME*-M*ME"}


def pipeline(**options):
    return PipelineStrategy(timeout=TIMEOUT, **options)


@pytest.mark.parametrize("data", [{}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_two_stages_train_as_one_process(run, reference, schedule, data):
    options = {"data": data, "trainer": {"accumulate_grad_batches": 3}}
    assert_same(run(2, partial(pipeline, schedule=schedule), **options), reference(**options))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble", "zbv"])
def test_ranks_with_two_stages_each_train_as_one_process(run, reference, schedule):
    options = {"trainer": {"accumulate_grad_batches": 4}, "config": EIGHT, "data": PACKED}
    assert_same(run(2, partial(pipeline, schedule=schedule, stages_per_rank=2), **options), reference(**options))


def test_four_stages_train_as_one_process(run, reference):
    options = {"trainer": {"accumulate_grad_batches": 4}}
    assert_same(run(4, partial(pipeline, stages=4), **options), reference(**options))


@pytest.mark.parametrize("shards", [2, 1], ids=["shards", "copies"])
@pytest.mark.parametrize("data", [{}, PACKED], ids=["padded", "packed"])
def test_two_pipelines_train_as_two_processes(run, reference, shards, data):
    options = {"data": data, "trainer": {"accumulate_grad_batches": 2}}
    assert_same(run(4, partial(pipeline, shards=shards), **options), reference(2, **options))


def test_a_step_that_ends_with_the_epoch_has_fewer_micro_batches(run, make_task):
    options = {"file": make_task(7, "few.jsonl"), "trainer": {"accumulate_grad_batches": 3, "max_epochs": 2}}
    assert_same(run(2, pipeline, **options), run(**options))
