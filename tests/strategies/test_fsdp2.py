"""FSDP2 is DDP, divided: the same losses and gradients."""

from __future__ import annotations

import logging
from functools import partial

import lightning as L
import pytest
from torch._C import _distributed_c10d

from lightning_vlm.strategies import FSDP2Strategy
from tests.strategies.conftest import TIMEOUT, assert_same


def fsdp2(**options):
    return FSDP2Strategy(timeout=TIMEOUT, **options)


def test_two_ranks_train_as_one_process(run, reference):
    assert_same(run(2, fsdp2), reference(data={"batch_size": 4}))


def test_packs_on_two_ranks_train_as_with_ddp(run, reference):
    options = {"data": {"packing": True, "batch_tokens": 200}, "trainer": {"accumulate_grad_batches": 2}}
    assert_same(run(2, fsdp2, **options), reference(2, **options))


@pytest.mark.parametrize(
    "options", [{"shards": 2}, {"shards": 1}, {"reshard_after_forward": False}], ids=lambda options: str(options)
)
def test_four_ranks_share_one_copy_or_several(run, reference, options):
    data = {"data": {"batch_size": 1}}
    assert_same(run(4, partial(fsdp2, **options), **data), reference(data={"batch_size": 4}))


def test_one_device_is_one_shard(run, reference):
    assert_same(run(1, fsdp2), reference())


@pytest.mark.parametrize("data", [{}, {"packing": True, "batch_tokens": 200}], ids=["padded", "packed"])
def test_two_ranks_compute_each_layer_together(run, reference, data):
    options = {"data": data, "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}}
    assert_same(run(2, partial(fsdp2, tensor=2), **options), reference(**options))


def test_shards_of_parts_of_layers(run, reference):
    options = {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}}
    assert_same(run(4, partial(fsdp2, tensor=2), **options), reference(2, **options))


class Orderly(L.Callback):
    """PyTorch has nothing to complain of: no collective is left open, and no norm is summed up in several steps."""

    def __init__(self):
        self.said = []

    def on_fit_start(self, trainer, pl_module):
        logger = logging.getLogger("torch.distributed.tensor._redistribute")
        logger.addFilter(lambda record: self.said.append(record.getMessage()) or True)

    def on_train_start(self, trainer, pl_module):
        self.check()

    def on_train_end(self, trainer, pl_module):
        self.check()

    def check(self):
        assert _distributed_c10d._get_work_registry_size() == 0
        assert self.said == []


@pytest.mark.parametrize(("ranks", "options"), [(2, {}), (4, {"shards": 2}), (4, {"shards": 1})])
def test_layers_in_parts_leave_nothing_open(run, ranks, options):
    data = {"packing": True, "batch_tokens": 200}  # packed rows are probed before training, for no logits
    trainer = {"gradient_clip_val": 0.5, "max_steps": 1}
    run(ranks, partial(fsdp2, tensor=2, **options), data=data, trainer=trainer, callbacks=[Orderly()])


def test_weights_may_be_gathered_in_half_precision(run, reference):
    divided = run(2, partial(fsdp2, param_dtype="bfloat16"))
    assert_same(divided, reference(data={"batch_size": 4}), rel=2e-2)
    assert divided.losses != reference(data={"batch_size": 4}).losses


def test_shards_may_stay_on_the_cpu(run, reference):
    """Where all is on the CPU nothing is moved: this shows that the option works, not that it saves memory."""
    assert_same(run(2, partial(fsdp2, cpu_offload=True)), reference(data={"batch_size": 4}))


def test_layers_may_be_compiled(run, reference):
    assert_same(
        run(2, partial(fsdp2, compile_layers=True), config={"pattern": "-*"}),
        reference(data={"batch_size": 4}, config={"pattern": "-*"}),
    )
