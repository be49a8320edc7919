"""BadSamples: names every sample that a run leaves out because it cannot be used, and stops a run with too many.

`VLMDataModule` brings it to whatever Trainer it serves, so it watches any LightningModule. Each bad sample is one line
of ``bad_samples.jsonl`` in the run folder; the number of those among the training samples is logged as
``data/bad_samples``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vlm.data.examples import ExampleBatch
from lightning_vlm.data.screening import BadSamplePolicy
from lightning_vlm.schema import DataError, VLMBatch

FILE_NAME = "bad_samples.jsonl"


class Screened(Protocol):
    """What the list asks of the datamodule whose bad samples it keeps."""

    @property
    def files(self) -> Mapping[str, Sequence[Any]]:
        """The sources of each split."""

    @property
    def bad_samples(self) -> BadSamplePolicy:
        """What bad samples may do to the run."""

    def known_bad(self, split: str) -> dict[int, DataError]:
        """Those that were found before they were needed."""

    def num_samples(self, split: str) -> int:
        """Samples of a split, bad ones included."""


class BadSamples(L.Callback):
    """Keeps the list of the datamodule that it is attached to; in a run with another, or none, it does nothing.

    Attributes:
        found: Bad samples of each split that are known on this rank, by their number.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[int, DataError]] = {}
        self._datamodule: Screened | None = None
        self._news: dict[str, dict[int, DataError]] = {}  # found on this rank since the ranks told each other
        self._agreed: set[str] = set()  # splits of which all ranks are known to have the same list
        self._listed: set[tuple[str, str]] = set()
        self._stage: str | None = None

    @classmethod
    def attach(cls, trainer: L.Trainer, datamodule: Screened) -> None:
        """Sees to it that a Trainer keeps the list of the datamodule it runs on, once: a callback it has serves on.

        Args:
            trainer: Whose run begins; its callbacks have not been set up yet.
            datamodule: Its datamodule; nothing happens if it has come to another one since.
        """
        if trainer.datamodule is not datamodule:
            return
        kept = next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)
        if kept is None:
            kept = cls()
            trainer.callbacks.insert(0, kept)  # before checkpoints, which run last
        kept._datamodule = datamodule

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets the run before."""
        self.found, self._news, self._agreed, self._stage = {}, {}, set(), stage

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
        datamodule, stage, self._stage = self._watched(trainer), self._stage, None
        if stage is None or datamodule is None:
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
        if trainer.local_rank == 0 and path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")  # a kill cut the last line off; later, it might be one that another rank is writing
        trainer.strategy.barrier("bad_samples")  # nor before everyone has read it
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            self._enter(trainer, split, datamodule.known_bad(split), on_every_rank=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
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
        if self._watched(trainer) is not None:
            self._check(trainer, "train")
            pl_module.log("data/bad_samples", float(len(self.found.get("train", {}))), rank_zero_only=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
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
        batch: Any,
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
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As `on_validation_batch_end`: these are not answered."""
        self._enter_batch(trainer, "predict", batch)

    def _enter_batch(self, trainer: L.Trainer, split: str, batch: Any) -> None:
        if isinstance(batch, (VLMBatch, ExampleBatch)) and batch.skipped and self._watched(trainer) is not None:
            self._enter(trainer, split, dict(batch.skipped))

    def _enter(self, trainer: L.Trainer, split: str, errors: dict[int, DataError], on_every_rank: bool = False) -> None:
        known = self.found.setdefault(split, {})
        new = {index: error for index, error in errors.items() if (split, error.source) not in self._listed}
        if not on_every_rank:
            news = {index: error for index, error in errors.items() if index not in known}
            self._news.setdefault(split, {}).update(news)
        known |= errors
        self._listed |= {(split, error.source) for error in new.values()}
        if not new or (on_every_rank and not trainer.is_global_zero):
            return
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not on_every_rank:
            rank_zero_warn(f"{split}: a sample cannot be used: {next(iter(new.values()))} ({path} lists all)")
        with path.open("a", encoding="utf-8") as file:
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
        datamodule = self._watched(trainer)
        if datamodule is None or not datamodule.files[split]:
            return
        if trainer.world_size > 1:
            self._exchange(trainer.world_size, split)
        datamodule.bad_samples.check(self.found.get(split, {}), datamodule.num_samples(split), f"data.{split}")

    def _exchange(self, world_size: int, split: str) -> None:
        """Tells the other ranks what was found here and hears what they found: the same list on all, in one order.

        Only news travels. What all ranks should know alike, from the data and from the list of a resumed run, is
        compared once by its hash; it travels only where nodes have files of their own that differ.
        """
        known, news = self.found.setdefault(split, {}), self._news.pop(split, {})
        common = "" if split in self._agreed else _digest({i: error for i, error in known.items() if i not in news})
        told = _gathered((common, news), world_size)
        if len({digest for digest, _ in told}) > 1:
            told = _gathered((common, known), world_size)
        heard = [others for _, others in told if others]
        for others in heard:
            known |= others
            self._listed |= {(split, error.source) for error in others.values()}
        if heard or split not in self._agreed:
            self.found[split] = dict(sorted(known.items()))  # the same sentence on every rank
        self._agreed.add(split)

    def _watched(self, trainer: L.Trainer) -> Screened | None:
        """The datamodule, if the run that is under way is on its data."""
        return self._datamodule if trainer.datamodule is self._datamodule else None

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / FILE_NAME


def _gathered(own: tuple[str, dict[int, DataError]], world_size: int) -> list[tuple[str, dict[int, DataError]]]:
    everyones: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyones, own)
    return everyones


def _digest(errors: Mapping[int, DataError]) -> str:
    digest = hashlib.sha256()
    for index, error in sorted(errors.items()):
        digest.update(repr((index, error.args)).encode(errors="backslashreplace"))
    return digest.hexdigest()


def _records(path: Path) -> list[dict[str, Any]]:
    """The entries of a list; a last line that was cut off by a kill is none."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in found if isinstance(record, dict) and {"split", "source", "index"} <= set(record)]
