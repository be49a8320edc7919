"""A run that is asked to stop finishes its batch; several ranks are in tests/strategies/test_failures.py."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.callbacks.checkpoint import RunCheckpoint
from lightning_vlm.processing.tiny import tiny_processor


class AskedToStop(L.Callback):
    """Sends a SIGTERM in the middle of the second step's batch."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ended.append(trainer.global_step)


def fit(file: Path, folder: Path, *callbacks: L.Callback) -> None:
    """Four steps, unless it is stopped."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[RunCheckpoint(str(folder), every_n_train_steps=100), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = NemotronVLModule(config=NemotronVLConfig.tiny(pattern="M"), generate_on_validation=False)
    trainer.fit(module, datamodule=VLMDataModule(train=str(file), processor=tiny_processor(), batch_size=2))


def test_the_batch_is_finished_and_saved(make_task, tmp_path):
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    asked = AskedToStop()
    try:
        with pytest.raises(SIGTERMException):
            fit(make_task(12), tmp_path / "checkpoints", asked)
        after = signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked.ended == [1, 2]
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert heard == [signal.SIGTERM] * 2, "the handler that was there hears it too, and is there again"
    assert callable(after)


def test_a_run_outside_of_the_main_thread_is_left_alone(make_task, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run = threading.Thread(target=fit, args=(make_task(12), tmp_path / "checkpoints"))
    run.start()
    run.join()
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert signal.getsignal(signal.SIGTERM) is before
