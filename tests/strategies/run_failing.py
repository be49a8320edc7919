"""A fit whose rank 1 dies in its second step, by a kill or an error. A script; Lightning starts the other rank."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.callbacks.checkpoint import RunCheckpoint
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy


class Fails(L.Callback):
    """Ends rank 1."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            Path("died").touch()
            if sys.argv[3] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the memory of rank 1 is full")


if __name__ == "__main__":
    strategy = {"fsdp2": FSDP2Strategy, "pipeline": PipelineStrategy}[sys.argv[2]]()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=4,
        accumulate_grad_batches=2,
        callbacks=[Fails(), RunCheckpoint("checkpoints", every_n_train_steps=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = NemotronVLModule(config=NemotronVLConfig.tiny(pattern="M*"), generate_on_validation=False)
    trainer.fit(module, datamodule=VLMDataModule(train=sys.argv[1], processor=tiny_processor(), batch_size=2))
