"""Runs one fit with any number of CPU processes and saves what a test compares. Started as a script."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.callbacks.predictions import PredictionTable
from lightning_vlm.processing.tiny import tiny_processor


class Record(L.Callback):
    """Keeps gradients of every step and the rows that each rank saw."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.rows: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([s.rpartition(":")[2] for s, counted in zip(batch.sources, batch.counted) if counted])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.network.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics.get("train/loss", "nan")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    arguments = parser.parse_args()

    L.seed_everything(3, verbose=False)
    config = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    module = NemotronVLModule(config=config, lr=0.0, generate_on_validation=True, max_new_tokens=3)
    data = VLMDataModule(
        train=arguments.file,
        val=arguments.file,
        predict=arguments.file,
        processor=tiny_processor(),
        batch_size=arguments.batch_size,
        sampler="sequential",
    )
    # Right answers on even lines, so that the scores to compare are neither 0 nor 1.
    module.answer = lambda batch: [  # type: ignore[method-assign]
        references[0] if int(source.rpartition(":")[2]) % 2 == 0 else "?"
        for source, references in zip(batch.sources, batch.references)
    ]
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=arguments.ranks,
        strategy="ddp" if arguments.ranks > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=arguments.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,  # the default: it must not disturb our plan
        default_root_dir=arguments.out,
        callbacks=[record, PredictionTable()],
    )
    trainer.fit(module, datamodule=data)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    del module.answer
    trainer.predict(module, datamodule=data, return_predictions=False)
    torch.save(
        {"gradients": record.gradients, "losses": record.losses, "rows": record.rows, "scores": scores},
        arguments.out / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
