"""Fits on several CPU processes that see each other as ranks, forked from this one: nothing is imported again."""

from __future__ import annotations

import csv
import itertools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.multiprocessing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import DataError

TINY = {"pattern": "M*", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


class Record(L.Callback):
    """Notes each batch and the gradient of each step; raises in the middle of a batch, after its forward pass."""

    def __init__(self, stop_in: int | None) -> None:
        self.stop_in = stop_in
        self.batches: list[dict[str, Any]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rows = [int(source.rpartition(":")[2]) for source, counted in zip(batch.sources, batch.counted) if counted]
        self.batches.append(
            {
                "epoch": trainer.current_epoch,
                "index": batch_idx,
                "of": trainer.num_training_batches,
                "step": trainer.global_step,
                "rows": rows,
                "labels": batch.num_label_tokens,
                "step_labels": batch.step_label_tokens,
            }
        )

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if len(self.batches) - 1 == self.stop_in:
            raise RuntimeError("power cut")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.network.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class Faulty(VLMDataModule):
    """Rank 1 gets its first batch again instead of its second."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        if self.trainer.global_rank == 1:
            planned = loader.plan.batches(loader.position, 1)
            loader._batches.__class__ = type("Faulty", (type(loader._batches),), {"__getitem__": _instead})
            loader._batches.instead = {planned[1]: planned[0]}
        return loader


def _instead(self: Any, planned: Any) -> Any:
    return super(type(self), self).__getitem__(self.instead.get(planned, planned))


def fit(file: Path, folder: Path, ranks: int, stop_in: int | None, ckpt_path: Path | None, options: Any) -> None:
    """One rank of a run."""
    L.seed_everything(7, verbose=False)
    module = NemotronVLModule(
        config=NemotronVLConfig.tiny(**TINY), lr=options.get("lr", 1e-3), generate_on_validation=False
    )
    make = Faulty if options.get("faulty") else VLMDataModule
    if options.get("one_node_lacks_a_file"):  # each rank as on a node of its own
        rank = int(os.environ["RANK"])
        options["data"]["cache_dir"] = str(folder / f"cache{rank}")
        if rank == 1:
            copy = folder / "node1"
            copy.mkdir()
            for path in file.parent.glob("rows.jsonl*"):
                (copy / path.name).write_bytes(path.read_bytes())
            min(copy.glob("*.png")).unlink()
            file = copy / file.name
    data = make(**{"train": str(file), "processor": tiny_processor(), "batch_size": 2, **options.get("data", {})})
    record = Record(stop_in)
    checkpoints = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True, "save_on_exception": True}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=CSVLogger(folder, "metrics"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[record, ModelCheckpoint(folder, "{step}", **{**checkpoints, **options.get("checkpoints", {})})],
        **{"max_epochs": 2, **options.get("trainer", {})},
    )
    error = ""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except (RuntimeError, DataError) as caught:
        error = str(caught)
    written = {"batches": record.batches, "step": trainer.global_step, "error": error}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(written))
    torch.save(record.gradients, folder / f"rank{trainer.global_rank}.pt")


def _rank(index: int, arguments: tuple[Any, ...], ranks: int, port: int) -> None:
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    fit(*arguments)


@dataclass
class Run:
    """What the ranks of a run left in its folder."""

    folder: Path
    ranks: list[dict[str, Any]]

    @property
    def error(self) -> str:
        """How it ended, the same on all ranks."""
        (error,) = {rank["error"] for rank in self.ranks}
        return error

    @property
    def step(self) -> int:
        """Optimizer steps since the first start."""
        return self.ranks[0]["step"]

    def rows(self, epoch: int, batches: int | None = None) -> list[int]:
        """Rows that all ranks saw of an epoch; with ``batches``, in the first ones of this run only."""
        return [
            row for rank in self.ranks for batch in rank["batches"][:batches] if batch["epoch"] == epoch
            for row in batch["rows"]
        ]  # fmt: skip

    def indices(self, epoch: int) -> list[int]:
        """What Lightning counted an epoch's batches as, the same on all ranks."""
        found = [[batch["index"] for batch in rank["batches"] if batch["epoch"] == epoch] for rank in self.ranks]
        assert all(indices == found[0] for indices in found)
        return found[0]

    @property
    def length(self) -> int:
        """Batches of a whole epoch on each rank."""
        return self.ranks[0]["batches"][0]["of"]

    def logged(self, name: str) -> dict[int, float]:
        """Values by step, in the order of logging; no step twice."""
        path = self.folder / "metrics/version_0/metrics.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        values = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        assert len(dict(values)) == len(values)
        return dict(values)

    def weights(self) -> dict[str, torch.Tensor]:
        """At the end."""
        return torch.load(self.folder / "last.ckpt", weights_only=True)["state_dict"]

    def gradients(self, rank: int = 0) -> list[dict[str, torch.Tensor]]:
        """Of each step."""
        return torch.load(self.folder / f"rank{rank}.pt", weights_only=True)


@pytest.fixture
def start(make_task: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """``start(ranks)`` fits 23 rows, from the last checkpoint of the run ``after``, to the end or into a batch."""
    file = make_task(23)
    numbers = itertools.count()

    def start(
        ranks: int, stop_in: int | None = None, after: Run | None = None, ckpt: str = "last", **options: Any
    ) -> Run:
        folder = tmp_path / f"run{next(numbers)}"
        folder.mkdir()
        ckpt_path = None if after is None else after.folder / f"{ckpt}.ckpt"
        arguments = (file, folder, ranks, stop_in, ckpt_path, options)
        if ranks == 1:
            fit(*arguments)
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.start_processes(_rank, (arguments, ranks, port), nprocs=ranks, start_method="fork")
        return Run(folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)])

    return start
