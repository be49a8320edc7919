"""A pipeline is one process, divided: the same losses and gradients with every schedule and any number of stages."""

from __future__ import annotations

import os
from functools import partial

import lightning as L
import pytest

from lightning_vlm.data import dataset
from lightning_vlm.media.load import load_image
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


def test_stages_may_be_balanced_by_measured_time(run, reference):
    options = {"trainer": {"accumulate_grad_batches": 2}, "config": EIGHT}
    assert_same(run(2, partial(pipeline, balance="time"), **options), reference(**options))


def test_one_stage_on_each_rank_may_fill_its_bubbles(run, reference):
    options = {"trainer": {"accumulate_grad_batches": 4}}
    assert_same(run(2, partial(pipeline, schedule="zero_bubble"), **options), reference(**options))


def test_later_stages_load_no_media(run, make_task, tmp_path):
    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            media = batch.pixel_values is not None
            (tmp_path / f"rank{trainer.global_rank}-{batch_idx}-{media}-{int(batch.num_images.sum())}").touch()

    def count(*args, **kwargs):
        with (tmp_path / f"decoded{os.environ['RANK']}").open("a") as file:
            file.write("x")
        return load_image(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load_image", count)
        run(2, pipeline, callbacks=[Seen()], trainer={"accumulate_grad_batches": 2}, data={"num_workers": 0})
    seen = sorted(path.name for path in tmp_path.glob("rank*"))
    assert any("rank0" in name and "True" in name for name in seen)
    assert not any("rank1" in name and "True" in name for name in seen)
    with_images = [{name.rpartition("-")[2] for name in seen if f"rank{rank}" in name} for rank in (0, 1)]
    assert with_images[0] == with_images[1] != {"0"}, "they know how many there are"
    first, second = ((tmp_path / f"decoded{rank}").stat().st_size for rank in (0, 1))
    assert second <= 4, "the images of two examples that a run keeps for its export"
    assert first > 8


class LosesAPlaceholder(L.Callback):
    """Turns a placeholder of the first row with an image into text."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        places = (batch.input_ids == pl_module.network.config.image_token_id).nonzero()
        if len(places):
            batch.input_ids[tuple(places[0])] = 7


def test_a_row_whose_media_do_not_fit_is_named(run):
    with pytest.raises(Exception, match=r"rows\.jsonl:2: .* placeholder"):
        run(2, pipeline, trainer={"accumulate_grad_batches": 2}, callbacks=[LosesAPlaceholder()])
