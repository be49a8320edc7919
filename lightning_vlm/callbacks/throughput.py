"""Throughput: real tokens and images per second, and the share of time spent waiting for data.

Padding is not counted. The rates cover the batches since the last logged step, over all ranks. Waiting is the time
between two batches: loading, and whatever else runs there, such as saving a checkpoint.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from lightning_vlm.schema import VLMBatch
from lightning_vlm.strategies.ranks import data_ranks


class Throughput(L.Callback):
    """Logs ``perf/tokens_per_s``, ``perf/images_per_s`` and ``perf/data_wait_frac`` when the Trainer logs."""

    def __init__(self) -> None:
        self._tokens = self._images = 0
        self._wait_s = 0.0
        self._window_start = self._last_end = 0.0
        self._logged_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._restart(time.perf_counter())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves validation out of the training rates."""
        self._restart(time.perf_counter())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: VLMBatch, batch_idx: int
    ) -> None:
        """Counts the time since the last batch ended as waiting."""
        self._wait_s += time.perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: VLMBatch, batch_idx: int
    ) -> None:
        """Counts a batch; logs and starts a new window when the Trainer logs."""
        if batch.counted.any():
            self._tokens += batch.num_tokens
            self._images += int(batch.num_images.sum())
        now = self._last_end = time.perf_counter()
        step = trainer.global_step  # what Lightning's own logging counts, over epochs and accumulated batches
        if step % max(trainer.log_every_n_steps, 1) or step == self._logged_step:
            return
        self._logged_step = step
        elapsed = now - self._window_start
        ranks, _ = data_ranks(trainer)
        pl_module.log_dict(
            {
                "perf/tokens_per_s": self._tokens * ranks / elapsed,
                "perf/images_per_s": self._images * ranks / elapsed,
                "perf/data_wait_frac": self._wait_s / elapsed,
            },
            on_step=True,
            on_epoch=False,
        )
        self._restart(now)

    def _restart(self, now: float) -> None:
        self._tokens = self._images = 0
        self._wait_s = 0.0
        self._window_start = self._last_end = now
