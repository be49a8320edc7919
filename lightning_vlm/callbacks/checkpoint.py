"""RunCheckpoint and BestCheckpoint: Lightning's ModelCheckpoint with the settings under which no night is lost.

It saves every so many steps, at the end of the run, which ModelCheckpoint leaves out when the number of steps is not
a multiple, and at any exception, SIGTERM included. (With several ranks at SIGTERM and Ctrl-C, where all stop together,
see `StopSignals`; an error of one leaves the others waiting.) ``last.ckpt`` is always the newest of them; a second run
in the same folder replaces it instead of writing ``last-v1.ckpt`` beside it. A checkpoint is whole or not there
(`AtomicCheckpointIO`, `lightning_vlm.strategies.checkpoints`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_vlm.callbacks.stop_signals import StoppedTogether
from lightning_vlm.checkpoint.atomic_io import use_whole_files


class _WholeFiles(ModelCheckpoint):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sees to it that files are whole (`AtomicCheckpointIO`), unless the user chose who writes them."""
        super().setup(trainer, pl_module, stage)
        use_whole_files(trainer.strategy)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves, unless other ranks would have to join in and may not: at a signal all stop, but not at an error."""
        if trainer.world_size > 1 and not isinstance(exception, (SIGTERMException, StoppedTogether)):
            return
        super().on_exception(trainer, pl_module, exception)


class RunCheckpoint(_WholeFiles):
    """Saves what a run can continue from.

    Args:
        dirpath: Folder of the checkpoints.
        every_n_train_steps: Optimizer steps between two checkpoints.
        keep: How many of them are kept besides ``last.ckpt``.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 500, keep: int = 1) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step={step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            monitor="step",  # newest first
            mode="max",
            save_top_k=keep,
            save_last=True,
            save_on_exception=True,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of the run as ``last.ckpt``."""
        if not trainer.fast_dev_run:
            path = Path(self.dirpath or ".") / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(path, weights_only=False)
            self.last_model_path = str(path)


class BestCheckpoint(_WholeFiles):
    """Keeps the checkpoints with the best values of a metric, beside those of `RunCheckpoint`.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: The metric, as it is logged in validation.
        mode: Whether ``min`` or ``max`` of it is best.
        keep: How many are kept.
    """

    def __init__(
        self, dirpath: str, monitor: str = "val/loss", mode: Literal["min", "max"] = "min", keep: int = 1
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=f"best-step={{step:06d}}-{monitor.replace('/', '_')}={{{monitor}:.4g}}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=keep,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
