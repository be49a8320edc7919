"""BadSamples: names every sample that a run leaves out because it cannot be used, and stops a run with too many.

Every `NemotronVLModule` brings one. Each bad sample is one line of ``bad_samples.jsonl`` in the run folder; the number
of those among the training samples is logged as ``data/bad_samples``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vlm.data.examples import ExampleBatch
from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.schema import DataError, VLMBatch

FILE_NAME = "bad_samples.jsonl"


class BadSamples(L.Callback):
    """Keeps the list; for other datamodules than `VLMDataModule` it does nothing.

    Attributes:
        found: Bad samples of each split that are known on this rank, by their number.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[int, DataError]] = {}
        self._listed: set[tuple[str, str]] = set()
        self._stage: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets the run before."""
        self.found, self._stage = {}, stage

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the list."""
        self._begin(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the list."""
        self._begin(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the list."""
        self._begin(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the list."""
        self._begin(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the list."""
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        """Begins a list, or goes on with that of the run that is resumed; enters what is known before the start.

        Once per run, and not in `setup`: which checkpoint a run goes on from is known only after it.
        """
        datamodule, stage, self._stage = trainer.datamodule, self._stage, None
        if stage is None or not isinstance(datamodule, VLMDataModule):
            return
        path = self._path(trainer)
        if trainer.is_global_zero and stage == "fit" and trainer.ckpt_path is None and path.exists():
            number = next(n for n in range(1, 10_000) if not path.with_suffix(f".{n}.jsonl").exists())
            path.rename(path.with_suffix(f".{number}.jsonl"))
        trainer.strategy.barrier("bad_samples")  # nobody writes into the list of the run before
        records = _records(path)
        self._listed = {(record["split"], record["source"]) for record in records}
        if stage == "fit":  # what the run before found counts on
            self.found["train"] = {
                record["index"]: DataError(*(record[key] for key in ("source", "problem", "fix", "kind")))
                for record in records
                if record["split"] == "train"
            }
        trainer.strategy.barrier("bad_samples")  # nor before everyone has read it
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            self._enter(trainer, split, datamodule.known_bad(split), on_every_rank=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: VLMBatch, batch_idx: int
    ) -> None:
        """Enters the bad samples of a batch.

        Raises:
            DataError: If there are more of them than ``max_bad_fraction`` allows.
        """
        self._enter_batch(trainer, "train", batch)
        # Ranks agree before one of them stops: one that stopped alone would leave the others waiting.
        if trainer.world_size == 1 or (batch_idx + 1) % max(trainer.log_every_n_steps, 1) == 0:
            self._check(trainer, "train")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts, and logs the number.

        Raises:
            DataError: See `on_train_batch_end`.
        """
        if isinstance(trainer.datamodule, VLMDataModule):
            self._check(trainer, "train")
            pl_module.log("data/bad_samples", float(len(self.found.get("train", {}))), rank_zero_only=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: VLMBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Enters the bad samples of a batch: scores are over the others."""
        self._enter_batch(trainer, "val", batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: VLMBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As `on_validation_batch_end`."""
        self._enter_batch(trainer, "test", batch)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: VLMBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As `on_validation_batch_end`: these are not answered."""
        self._enter_batch(trainer, "predict", batch)

    def _enter_batch(self, trainer: L.Trainer, split: str, batch: Any) -> None:
        if (
            isinstance(batch, (VLMBatch, ExampleBatch))
            and batch.skipped
            and isinstance(trainer.datamodule, VLMDataModule)
        ):
            self._enter(trainer, split, dict(batch.skipped))

    def _enter(self, trainer: L.Trainer, split: str, errors: dict[int, DataError], on_every_rank: bool = False) -> None:
        known = self.found.setdefault(split, {})
        new = {index: error for index, error in errors.items() if (split, error.source) not in self._listed}
        known |= errors
        self._listed |= {(split, error.source) for error in new.values()}
        if not new or (on_every_rank and not trainer.is_global_zero):
            return
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not on_every_rank:
            rank_zero_warn(f"{split}: a bad sample was left out: {next(iter(new.values()))} ({path} lists all)")
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn)
            for index, error in new.items():
                record = {
                    "split": split,
                    "index": index,
                    "source": error.source,
                    "kind": error.kind,
                    "problem": error.problem,
                    "fix": error.fix,
                    "epoch": trainer.current_epoch,
                    "step": trainer.global_step,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts.

        Raises:
            DataError: If scores are over too few of the samples.
        """
        self._check(trainer, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As `on_validation_end`."""
        self._check(trainer, "test")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As `on_validation_end`."""
        self._check(trainer, "predict")

    def _check(self, trainer: L.Trainer, split: str) -> None:
        datamodule = trainer.datamodule
        if not isinstance(datamodule, VLMDataModule) or not datamodule.files[split]:
            return
        found = self.found.setdefault(split, {})
        if trainer.world_size > 1:
            everyones: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyones, found)
            for others in everyones:
                found |= others
            found = self.found[split] = dict(sorted(found.items()))  # the same sentence on every rank
        self._listed |= {(split, error.source) for error in found.values()}
        datamodule.bad_samples.check(found, datamodule.num_samples(split), f"data.{split}")

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / FILE_NAME


def _records(path: Path) -> list[dict[str, Any]]:
    """The entries of a list; a last line that was cut off by a kill is none."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in found if isinstance(record, dict) and {"split", "source", "index"} <= set(record)]
