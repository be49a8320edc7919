"""The check tells what moved, waits where it must, and stops where what moved contradicts the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks import trainable_check
from lightning_vlm.callbacks.trainable_check import TrainableError
from lightning_vlm.training import movement

TINY = {"pattern": "M*", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed, warnings too."""
    lines: list[str] = []
    for name in ("rank_zero_info", "rank_zero_warn"):
        monkeypatch.setattr(trainable_check, name, lines.append)
    return lines


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each look at the weights takes in."""
    counts: list[int] = []
    real = movement.fingerprints

    def count(parameters: Any, device: Any) -> Any:
        counts.append(len(parameters))
        return real(parameters, device)

    for module in (movement, trainable_check):
        monkeypatch.setattr(module, "fingerprints", count)
    return counts


@pytest.fixture
def fit(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> Callable[..., NemotronVLModule]:
    """One epoch of six rows, with images in some; ``texts`` first brings batches without."""

    def run(*callbacks: L.Callback, file: Path | None = None, trainer: Any = None, **options: Any) -> NemotronVLModule:
        L.seed_everything(3, verbose=False)
        cls = options.pop("cls", NemotronVLModule)
        config = NemotronVLConfig.tiny(**{**TINY, **options.pop("config", {})})
        module = cls(config=config, generate_on_validation=False, **{"lr": 1e-3, "warmup": 0, **options})
        data = VLMDataModule(train=str(file or make_task(6)), processor=processor, batch_size=2, sampler="sequential")
        fitter = L.Trainer(
            **{
                "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks),
                **(trainer or {}),
            }
        )  # fmt: skip
        fitter.fit(module, datamodule=data)
        return module

    return run


def steps(told: list[str]) -> list[str]:
    return [line for line in told if line.startswith("step ")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_good_run_says_once_what_moved(fit: Any, told: list[str], looks: list[int], optimizer: str, accumulate: int):
    fit(freeze=["language"], optimizer=optimizer, trainer={"accumulate_grad_batches": accumulate, "max_epochs": 2})
    assert "language/frozen" in told[0]
    assert "vision/no_decay" in told[0]
    (line,) = steps(told)
    assert line.startswith("step 1 moved 19 of 19 tensors of vision, 3 of 3 tensors of projector; all ")
    assert "frozen ones stayed" in line
    assert len(looks) == 2, "before the first step and after it, never again"


def test_the_table_goes_to_the_logger(fit: Any, tmp_path: Path) -> None:
    fit(
        freeze=["vision"], lr={"projector": 1e-4, "language": 1e-5},
        trainer={"logger": CSVLogger(tmp_path, "run", 0)},
    )  # fmt: skip
    text = (tmp_path / "run/version_0/hparams.yaml").read_text()
    logged = yaml.safe_load(text.replace("!!python/tuple", ""))  # betas
    assert logged["parameters"]["projector"]["lr"] == 1e-4
    assert logged["parameters"]["vision/frozen"]["trainable"] == 0
    assert logged["freeze"] == ["vision"], "beside the module's own"


def test_it_waits_for_the_end_of_a_warm_up_from_zero(fit: Any, told: list[str], looks: list[int]) -> None:
    fit(warmup=2, trainer={"max_epochs": 2})
    assert steps(told)[0].startswith("step 2 moved ")
    assert len(looks) == 2
    told.clear()
    looks.clear()
    fit(lr=0.0)
    assert not steps(told)
    assert len(looks) == 1, "nothing was to move"


def text_then_images(write_rows: Callable[..., Path], write_image: Callable[..., str], batches: int) -> Path:
    rows = [{"messages": _turns(f"question {number}")} for number in range(2 * batches)]
    for number in range(2):
        rows.append({"messages": _turns("<image>what?"), "images": [write_image(f"{number}.png", seed=number)]})
    return write_rows(rows)


def _turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "word word"}]


def test_parts_that_no_medium_has_reached_are_waited_for(
    fit: Any, told: list[str], looks: list[int], write_rows: Callable[..., Path], write_image: Callable[..., str]
) -> None:
    config = {"vocab_size": 266, "audio_token_id": 263}
    fit(file=text_then_images(write_rows, write_image, 2), config=config, trainer={"max_epochs": 2})
    first, second = steps(told)
    waiting = "audio, audio/no_decay, audio_projector, audio_projector/no_decay"
    assert "step 1 moved 16 of 16 tensors of language; " in first or "tensors of language; all 2 frozen" in first
    assert f"seen to move: {waiting}, projector, projector/no_decay, vision, vision/no_decay" in first
    assert second.startswith("step 3 moved ")
    assert second.endswith(f"seen to move: {waiting}")
    assert len(looks) == 3, "the sound tower is not looked at in the second epoch either"


class Detached(NemotronVLModule):
    """A projector that the loss does not depend on."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            inside = self.network.multi_modal_projector.forward
            self.network.multi_modal_projector.forward = lambda *args: inside(*args).detach()


@pytest.mark.parametrize("texts", [0, 2])
@pytest.mark.parametrize("frozen", [["vision"], []], ids=["projector", "both"])
def test_a_part_that_is_detached_stops_the_run(
    fit: Any, write_rows: Callable[..., Path], write_image: Callable[..., str], frozen: list[str], texts: int
) -> None:
    """At the first step with an image, not before."""
    message = rf"'projector.* got no gradient by step {texts + 1}, in none of its tensors \(.*although the step reached"
    with pytest.raises(TrainableError, match=message) as told_of:
        fit(cls=Detached, freeze=frozen, file=text_then_images(write_rows, write_image, texts))
    assert ("vision" in str(told_of.value)) == (not frozen)


class Zeroed(L.Callback):
    """A projector whose gradient is zero, for a number of steps."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step < self.number:
            for parameter in pl_module.network.multi_modal_projector.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()


def test_gradients_of_zero_are_borne_twice(fit: Any, told: list[str], make_task: Callable[..., Path]) -> None:
    """The images of a batch may stand after its labels. Weight decay moves the matrices: that is not training."""
    fit(Zeroed(2), trainer={"max_epochs": 2})
    first, second = steps(told)
    assert "projector" in first.partition("seen to move: ")[2]
    assert second.startswith("step 3 moved 3 of 3 tensors of projector")
    with pytest.raises(TrainableError, match=r"'projector.*, 'projector.*' got no gradient by step 3, in none of its"):
        fit(Zeroed(100), trainer={"max_epochs": 4})


class Meddles(L.Callback):
    """Writes to a frozen parameter."""

    def __init__(self, element: float) -> None:
        self.element = element

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            pl_module.network.vision_model.encoder.layer[0].mlp.fc1.weight[3, 5] += self.element


def test_a_frozen_parameter_that_moves_stops_the_run(fit: Any) -> None:
    name = "vision_model.encoder.layer.0.mlp.fc1.weight"
    with pytest.raises(
        TrainableError, match=rf"step 1 moved {name}, which is frozen; expected frozen parameters to st"
    ):
        fit(Meddles(1e-6), freeze=["vision"])
    fit(Meddles(0.0), freeze=["vision"])
    fit(Meddles(1e-6))  # not frozen


def test_updates_that_are_rounded_away_are_a_warning(fit: Any, told: list[str]) -> None:
    """A norm's weight of 1 takes no update below 0.004 in bfloat16, nor one below 6e-8 in float32."""
    fit(lr=1e-5, config={"pattern": "*"}, trainer={"precision": "bf16-true"})
    (warning,) = [line for line in told if "rounded away" in line and "language" in line]
    assert warning.startswith(
        "group 'language/no_decay' did not move in step 1: its learning rate, 1e-05, is too small "
    )
    assert "for bfloat16" in warning
    told.clear()
    fit(lr=1e-5, warmup=3, config={"pattern": "*"}, trainer={"precision": "bf16-true", "max_epochs": 2})
    (warning,) = [line for line in told if "rounded away" in line and "language" in line]
    assert "in step 4" in warning, "while the rate rises it is waited for"
    told.clear()
    fit(lr=1e-5, config={"pattern": "*"})
    assert not [line for line in told if "rounded away" in line]


class Overflows(L.Callback):
    """As float16 training does, which Lightning has on GPUs only: the first step is left out, and the scale lowered."""

    class Scaler:
        scale = 2.0

        def get_scale(self) -> float:
            return self.scale

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            trainer.precision_plugin.scaler = self.scaler = self.Scaler()
            self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            with torch.no_grad():
                for parameter, value in zip(pl_module.parameters(), self.before):
                    parameter.copy_(value)
        self.scaler.scale = 1.0


def test_a_step_that_overflows_is_not_judged(fit: Any, told: list[str]) -> None:
    fit(Overflows())
    assert steps(told)[0].startswith("step 2 moved ")
    assert not [line for line in told if "rounded away" in line]


def test_the_table_of_a_resumed_run_is_that_of_its_checkpoint(
    fit: Any, told: list[str], tmp_path: Path, make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    """A state of the optimizer brings its learning rates with it."""
    file = make_task(6)
    fit(lr=1e-3, file=file).trainer.save_checkpoint(tmp_path / "x.ckpt")
    told.clear()
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), lr=5e-3, generate_on_validation=False)
    data = VLMDataModule(train=str(file), processor=processor, batch_size=2, sampler="sequential")
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "x.ckpt")
    table, line = told
    assert "0.001" in table
    assert "0.005" not in table
    assert line.startswith("step 4 moved ")
