"""WeightEMA: the average by its formula, nothing but what is trained in it, saved, resumed and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.averaging import WeightEMA
from lightning_vlm.callbacks.checkpoint import RunCheckpoint
from lightning_vlm.checkpoint.trained import open_trained
from lightning_vlm.schema import StoppingError

DECAY = 0.8


class Weights(L.Callback):
    """Weights after each optimizer step, and while validating."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.steps.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.validated.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})


@pytest.fixture
def fit(make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path) -> Callable[..., Any]:
    file = make_task(8)

    def run(
        epochs: int, ckpt_path: str | None = None, precision: Any = "32-true", others: Any = (), **options: Any
    ) -> tuple[NemotronVLModule, Weights]:
        weights = Weights()
        L.seed_everything(0, verbose=False)
        config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
        module = NemotronVLModule(config=config, freeze=["vision"], lr=1e-2, warmup=0, generate_on_validation=False,
                                  min_lr_ratio=1.0, **options)  # fmt: skip
        # Lightning has the swap for validation come first, and checkpoints last.
        saving = RunCheckpoint(str(tmp_path / "checkpoints"), every_n_train_steps=3)
        callbacks = [WeightEMA(DECAY), weights, *others, saving]
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                            callbacks=callbacks, max_epochs=epochs, precision=precision,
                            num_sanity_val_steps=0)  # fmt: skip
        data = VLMDataModule(train=str(file), val=str(file), processor=processor, batch_size=2, eval_batch_size=8)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module, weights

    return run


def test_the_average_is_validated_saved_and_left(fit: Callable[..., Any], tmp_path: Path) -> None:
    module, weights = fit(1)
    average = dict(weights.steps[0])
    for step in weights.steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * step[name] for name in average}
    frozen = {name for name in average if name.startswith("model.vision_model.")}
    for name, value in module.named_parameters():
        if name in frozen:
            assert torch.equal(value, weights.steps[0][name]), name
        else:
            torch.testing.assert_close(value.detach(), average[name], rtol=0, atol=1e-6)
            assert torch.equal(value, weights.validated[0][name])
    assert not torch.equal(
        module.network.language_model.lm_head.weight, weights.steps[-1]["model.language_model.lm_head.weight"]
    )
    exported = open_trained(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(exported["language_model.lm_head.weight"], module.network.language_model.lm_head.weight)


def test_frozen_weights_are_not_copied(fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[tuple[str, bool]] = []
    setup = WeightEMA.setup

    def look(self: WeightEMA, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        setup(self, trainer, pl_module, stage)
        averaged = dict(self._average_model.module.named_parameters())
        shared.extend((name, averaged[name] is value) for name, value in pl_module.named_parameters())

    monkeypatch.setattr(WeightEMA, "setup", look)
    fit(1)
    assert all(
        is_shared == name.startswith("model.vision_model.") or "layer_scale" in name for name, is_shared in shared
    )
    assert any(is_shared for _, is_shared in shared)


def test_a_resumed_run_has_the_same_average(fit: Callable[..., Any], tmp_path: Path) -> None:
    whole, steps = fit(2)
    fit(1)
    resumed, rest = fit(2, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert torch.equal(
        rest.steps[-1]["model.language_model.lm_head.weight"], steps.steps[-1]["model.language_model.lm_head.weight"]
    )
    for name, value in whole.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name


class Interrupt(L.Callback):
    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        raise RuntimeError("power cut")


def test_an_interrupted_validation_is_saved_as_the_training_was(fit: Callable[..., Any], tmp_path: Path) -> None:
    name, kept = "model.language_model.lm_head.weight", Weights()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(1, others=[kept, Interrupt()])
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert torch.equal(saved["current_model_state"][name], kept.steps[-1][name])
    assert torch.equal(saved["state_dict"][name], kept.validated[0][name])


def test_half_precision_is_refused(fit: Callable[..., Any]) -> None:
    with pytest.raises(StoppingError, match=r"with trainer.precision bf16-true, which would round its steps away; set"):
        fit(1, precision="bf16-true")


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_that_is_no_share_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay:g}; expected a number above 0 and below 1"):
        WeightEMA(decay)
