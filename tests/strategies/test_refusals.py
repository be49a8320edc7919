"""What cannot work stops before training, with the sentence that helps."""

from __future__ import annotations

import lightning as L
import pytest

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.callbacks.averaging import WeightEMA
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy
from lightning_vlm.strategies.stages import balance
from tests.fixtures.released_folders import write_omni
from tests.fixtures.twins import make_theirs, shake
from tests.strategies.conftest import TIMEOUT

__all__ = ["make_theirs", "shake"]


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (PipelineStrategy, {"schedule": "2f2b"}, "strategy.schedule is '2f2b'; expected one of gpipe, 1f1b"),
        (PipelineStrategy, {"stages_per_rank": 2}, "schedule 1f1b has one stage on each rank; set it to 1"),
        (PipelineStrategy, {"schedule": "zbv"}, "stages_per_rank is 1, but schedule zbv has 2; set it to 2"),
        (PipelineStrategy, {"stages": 0}, "strategy.stages is 0; expected at least 1"),
        (FSDP2Strategy, {"shards": 0}, "strategy.shards is 0; expected at least 1"),
        (FSDP2Strategy, {"param_dtype": "bf16"}, "strategy.param_dtype is 'bf16'; expected float32, bfloat16"),
    ],
)
def test_wrong_options_are_told_before_there_are_processes(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


def test_too_many_stages_for_the_layers():
    with pytest.raises(ValueError, match="the language model has 3 layers, too few for 4 stages of a pipeline"):
        balance([1, 1, 1], 4)


@pytest.mark.parametrize(
    ("ranks", "make", "options", "sentence"),
    [
        (2, lambda: PipelineStrategy(4, timeout=TIMEOUT), {}, "stages=4, shards=1 and tensor=1 need a multiple of 4"),
        (3, lambda: FSDP2Strategy(2, timeout=TIMEOUT), {}, "shards=2 and tensor=1 need a multiple of 2 processes"),
        (2, lambda: PipelineStrategy(timeout=TIMEOUT), {"module": {"optimizer": "adamw8bit"}}, "do not divide"),
        (2, lambda: FSDP2Strategy(timeout=TIMEOUT), {"module": {"optimizer": "adamw8bit"}}, "do not divide"),
        (3, lambda: FSDP2Strategy(tensor=3, timeout=TIMEOUT), {}, "num_attention_heads is 4, which it does not divide"),
        (
            2,
            lambda: FSDP2Strategy(tensor=2, timeout=TIMEOUT),
            {"module": {"lora": {"rank": 2, "alpha": 4, "language": ["attention"]}}},
            "lora does not work with strategy.tensor above 1",
        ),
        (2, lambda: PipelineStrategy(timeout=TIMEOUT), {"trainer": {"precision": "16-mixed"}}, "16-mixed"),
        (2, lambda: PipelineStrategy(timeout=TIMEOUT), {"callbacks": [WeightEMA()]}, "WeightEMA does not work with"),
    ],
)
def test_combinations_that_cannot_work_stop_at_the_start(run, ranks, make, options, sentence):
    with pytest.raises(Exception, match=sentence):
        run(ranks, make, **options)


def test_gradients_of_two_precisions_in_one_unit(run, make_theirs, tmp_path):
    write_omni(tmp_path / "base", make_theirs("M*-", sound=True))
    lora = {"rank": 2, "alpha": 4, "audio_projector": "lora", "projector": "full", "language": ["attention"]}
    options = {"module": {"model_id": str(tmp_path / "base"), "lora": lora}, "trainer": {"precision": "bf16-true"}}
    with pytest.raises(Exception, match="sums up gradients of one precision at once, and here it would be"):
        run(2, lambda: FSDP2Strategy(timeout=TIMEOUT), data={"processor": str(tmp_path / "base")}, **options)


def test_a_model_that_was_made_before(run):
    class Early(L.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.model = NemotronVL(NemotronVLConfig.tiny(pattern="M*", hidden_size=32))

    with pytest.raises(Exception, match="got a NemotronVLModule whose model is not divided"):
        run(2, lambda: FSDP2Strategy(timeout=TIMEOUT), callbacks=[Early()])
