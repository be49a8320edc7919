"""A fit whose rank 1 dies in its second step or is asked to stop. A script; Lightning or SLURM starts the other rank.

``python run_failing.py rows.jsonl fsdp2 error``; the steps it takes are appended to ``steps``, line by line.
"""

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
    """Ends rank 1, asks it or all processes to stop, those of data workers included, or to be requeued."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        if trainer.global_rank != 1 or trainer.global_step != 1 or Path("died").exists():
            return
        Path("died").touch()
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif sys.argv[3] == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif sys.argv[3] == "stop all":
            os.killpg(0, signal.SIGTERM)
        elif sys.argv[3] == "interrupt all":
            os.killpg(0, signal.SIGINT)
        elif sys.argv[3] == "requeue":
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            raise RuntimeError("the memory of rank 1 is full")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step > self.step:
            with Path("steps").open("a") as file:
                file.write(f"{trainer.global_step}\n")


if __name__ == "__main__":
    file, name, how = sys.argv[1:]
    strategy: Any = {"fsdp2": FSDP2Strategy, "pipeline": PipelineStrategy, "ddp": lambda: "ddp"}[name]()
    every = 1 if how in ("kill", "error") else 100  # what a stopped run leaves was written because it was stopped
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=4,
        accumulate_grad_batches=2,
        callbacks=[Fails(), RunCheckpoint("checkpoints", every_n_train_steps=every)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = NemotronVLModule(config=NemotronVLConfig.tiny(pattern="M*"), generate_on_validation=False)
    data = VLMDataModule(train=file, processor=tiny_processor(), batch_size=2, num_workers=1)
    last = Path("checkpoints/last.ckpt")
    trainer.fit(module, datamodule=data, ckpt_path=last if how != "requeue" and last.exists() else None)
