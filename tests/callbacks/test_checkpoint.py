"""RunCheckpoint: last.ckpt is always the newest state, the end of the run and an exception included."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.checkpoint import BestCheckpoint, RunCheckpoint
from lightning_vlm.checkpoint.atomic_io import AtomicCheckpointIO
from lightning_vlm.schema import StoppingError


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


class FullDisk:
    """torch.save on a disk that is full from some call on: half of the bytes, then the error."""

    def __init__(self, good: int) -> None:
        self.good, self.save = good, torch.save

    def __call__(self, content: Any, file: Any) -> None:
        self.good -= 1
        if self.good >= 0:
            self.save(content, file)
            return
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_stops_the_run_and_keeps_the_older_checkpoint(
    fit: Callable[..., Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(max_epochs=1).seen
    shutil.rmtree(tmp_path / "checkpoints")
    monkeypatch.setattr(torch, "save", FullDisk(2))  # step 2 and its last.ckpt are written, step 4 is not
    with pytest.raises(
        StoppingError, match=r"step=000004.ckpt: the disk is full, this checkpoint could not be written"
    ):
        fit(max_epochs=1)
    monkeypatch.undo()
    assert saved(tmp_path) == {"step=000002.ckpt": 2, "last.ckpt": 2}
    assert fit(max_epochs=1, ckpt_path="last").seen == whole[4:]


def test_a_full_disk_does_not_spoil_the_file_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"a": torch.ones(3)}, path)
    monkeypatch.setattr(torch, "save", FullDisk(0))
    with pytest.raises(StoppingError, match="the older checkpoint is as it was; make room and resume"):
        io.save_checkpoint({"a": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert torch.equal(io.load_checkpoint(path, weights_only=True)["a"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(AttributeError):  # what is not the disk's fault is told as it is
        io.save_checkpoint({"a": lambda: 0}, path)


def test_a_process_killed_while_it_saves_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    script = (
        "import os, signal, sys, torch\n"
        "from lightning_vlm.checkpoint.atomic_io import AtomicCheckpointIO\n"
        "def save(content, file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = save\n"
        "AtomicCheckpointIO().save_checkpoint({'step': 2}, sys.argv[1])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_the_best_are_kept_beside_the_newest(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    file = make_task(8)
    data = VLMDataModule(train=str(file), val=str(file), processor=processor, batch_size=2)
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    scores = Scores()
    callbacks = [RunCheckpoint(str(folder), 100), BestCheckpoint(str(folder), keep=2), scores]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                        callbacks=callbacks, max_epochs=4, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(NemotronVLModule(config=config, lr=1e-2, generate_on_validation=False), datamodule=data)
    best = sorted(scores.of, key=lambda step: scores.of[step])[:2]
    names = {f"best-step={step:06d}-val_loss={scores.of[step]:.4g}.ckpt" for step in best}
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", *names}


class Scores(L.Callback):
    def __init__(self) -> None:
        self.of: dict[int, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.of[trainer.global_step] = float(trainer.callback_metrics["val/loss"])
