"""RunCheckpoint: last.ckpt is always the newest state, the end of the run and an exception included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.checkpoint import RunCheckpoint


class StopAfter(L.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            raise RuntimeError("power cut")


class Rows(L.Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += batch.sources


@pytest.fixture
def fit(make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path) -> Callable[..., Rows]:
    file = make_task(10)  # five batches an epoch

    def run(*callbacks: L.Callback, ckpt_path: str | None = None, **options: Any) -> Rows:
        rows = Rows()
        config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RunCheckpoint(str(tmp_path / "checkpoints"), every_n_train_steps=2), rows, *callbacks],
            **options,
        )
        data = VLMDataModule(train=str(file), processor=processor, batch_size=2)
        trainer.fit(NemotronVLModule(config=config), datamodule=data, ckpt_path=ckpt_path)
        return rows

    return run


def saved(tmp_path: Path) -> dict[str, int]:
    return {
        path.name: torch.load(path, weights_only=True)["global_step"] for path in (tmp_path / "checkpoints").iterdir()
    }


def test_the_end_of_the_run_is_saved(fit: Callable[..., Rows], tmp_path: Path) -> None:
    fit(max_epochs=1)
    assert saved(tmp_path) == {"step=000004.ckpt": 4, "last.ckpt": 5}


def test_a_finished_run_continues_with_the_next_epoch(fit: Callable[..., Rows], tmp_path: Path) -> None:
    whole = fit(max_epochs=2).seen
    fit(max_epochs=1)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 5, (
        "nothing is taken back"
    )
    assert fit(max_epochs=2, ckpt_path="last").seen == whole[10:]


def test_an_exception_is_saved_and_continued(fit: Callable[..., Rows], tmp_path: Path) -> None:
    whole = fit(max_epochs=1).seen
    with pytest.raises(RuntimeError, match="power cut"):
        fit(StopAfter(3), max_epochs=1)
    assert saved(tmp_path)["last.ckpt"] == 3
    assert fit(max_epochs=1, ckpt_path="last").seen == whole[6:]


def test_a_second_run_replaces_last(fit: Callable[..., Rows], tmp_path: Path) -> None:
    fit(max_epochs=1)
    fit(max_epochs=2)
    assert saved(tmp_path) == {"step=000010.ckpt": 10, "last.ckpt": 10}
