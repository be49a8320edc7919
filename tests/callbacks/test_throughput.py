"""Throughput counts real tokens and images, not padding and not stand-ins."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.throughput import Throughput


class Check(L.Callback):
    """Counts by itself, and slows the loader-to-step gap down by a known time."""

    def __init__(self) -> None:
        self.tokens = self.images = 0
        self.logged: dict[str, float] = {}
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += sum(len(ids[mask.bool()]) for ids, mask in zip(batch.input_ids, batch.attention_mask))
        self.images += 0 if batch.image_grid_hw is None else len(batch.image_grid_hw)
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_rates_are_counts_over_time(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    check = Check()
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Throughput(), check],
    )
    data = VLMDataModule(train=str(make_task(9)), processor=processor, batch_size=3)
    trainer.fit(NemotronVLModule(config=config), datamodule=data)
    assert check.tokens > 0
    # Both rates are over the same time, so their ratio is that of the counts.
    ratio = check.logged["perf/tokens_per_s"] / check.logged["perf/images_per_s"]
    assert ratio == pytest.approx(check.tokens / check.images, rel=1e-4)
    assert check.logged["perf/tokens_per_s"] > check.tokens / (time.perf_counter() - check.start)
    assert 0 <= check.logged["perf/data_wait_frac"] <= 1


@pytest.mark.parametrize(("every", "accumulate"), [(2, 1), (5, 1), (2, 2)])
def test_rates_are_logged_whenever_lightning_logs(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path, every: int, accumulate: int
) -> None:
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    logger = CSVLogger(tmp_path, name="metrics")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=4,
        log_every_n_steps=every,
        accumulate_grad_batches=accumulate,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Throughput()],
    )
    data = VLMDataModule(train=str(make_task(9)), processor=processor, batch_size=3)  # three batches an epoch
    trainer.fit(NemotronVLModule(config=config), datamodule=data)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    logged = {name: [row["step"] for row in rows if row[name]] for name in ("train/loss", "perf/tokens_per_s")}
    assert logged["perf/tokens_per_s"] == logged["train/loss"] != []
