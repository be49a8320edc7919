"""EpochLedger: at the end of each epoch, every planned sample is accounted for, or the run stops.

Every `NemotronVLModule` brings one. It logs ``data/samples_planned``, ``data/samples_seen``, ``data/samples_skipped``,
``data/samples_dropped`` and ``data/padding_frac``.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_vlm.data.ledger import Ledger
from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.schema import VLMBatch


class EpochLedger(L.Callback):
    """Keeps the ledger of each epoch; for other datamodules than `VLMDataModule` it does nothing."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None
        self._tokens = self._computed = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: VLMBatch, batch_idx: int
    ) -> None:
        """Opens the ledger at the first batch of an epoch, or where a resumed run goes on in it."""
        if self._ledger is None and isinstance(trainer.datamodule, VLMDataModule):
            self._ledger = trainer.datamodule.ledger(batch_idx)
            self._tokens = self._computed = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: VLMBatch, batch_idx: int
    ) -> None:
        """Enters the batch's samples."""
        if self._ledger is None or batch.indices is None:
            return
        self._ledger.see(batch.indices[batch.counted].tolist())
        for index, error in batch.skipped:
            self._ledger.skip([index], error.kind)
        self._ledger.reached = batch_idx + 1
        self._tokens += batch.num_tokens
        self._computed += batch.input_ids.numel()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the ledger and logs it.

        Raises:
            RuntimeError: If a planned sample was neither seen nor skipped, or one was seen twice, or the loader ended
                before the epoch.
        """
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            return

        def add_up(numbers: list[int]) -> list[int]:
            total = torch.tensor(numbers, dtype=torch.int64, device=trainer.strategy.root_device)
            return trainer.strategy.reduce(total, reduce_op="sum").tolist()

        report = ledger.close(add_up)
        tokens, computed = add_up([self._tokens, self._computed])
        dropped = trainer.datamodule.num_dropped
        counts = {"planned": report.planned, "seen": report.seen, "skipped": report.skipped}
        pl_module.log_dict(
            {
                **{f"data/samples_{name}": float(tally.count) for name, tally in counts.items()},
                "data/samples_dropped": float(dropped),
                "data/padding_frac": 1 - tokens / max(computed, 1),
            }
        )
        if not report.balances:
            raise RuntimeError(
                f"the ledger of epoch {ledger.opened.epoch} does not balance: {report}; a sample was lost or seen "
                "twice, please report this with the config"
            )
        if not _may_end(trainer, ledger.reached):
            raise RuntimeError(
                f"the loader ended epoch {ledger.opened.epoch} after batch {ledger.reached} of "
                f"{trainer.num_training_batches}: {report}; please report this with the config"
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Forgets an epoch that did not end."""
        self._ledger = None


def _may_end(trainer: L.Trainer, reached: int) -> bool:
    """Whether an epoch ends where the Trainer, a callback or the module (by skipping the rest) wanted it to."""
    stopped = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    started = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return stopped or reached >= trainer.num_training_batches or started > reached
