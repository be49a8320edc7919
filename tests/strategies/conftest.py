"""Fits of a few steps under any strategy, on forked CPU processes that see each other as ranks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.multiprocessing

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.strategies.ranks import data_ranks

TINY = {"pattern": "ME*-", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


class Steps(L.Callback):
    """Notes the loss, the norm of the gradient and the balance of experts of each step, the rows, and validation."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.balances: list[float] = []
        self.rows: list[list[int]] = []
        self.val: list[float] = []
        self.answers: dict[str, str] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([int(s.rpartition(":")[2]) for s, counted in zip(batch.sources, batch.counted) if counted])
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True
        if trainer.global_step > self.step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
            if "train/load_balance" in trainer.callback_metrics:
                self.balances.append(float(trainer.callback_metrics["train/load_balance"]))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:
            self.answers |= {s: a for s, a, c in zip(batch.sources, outputs["answers"], batch.counted) if c}

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.val.append(float(trainer.callback_metrics["val/loss"]))


@dataclass
class Fit:
    """What the ranks of a fit left in its folder."""

    folder: Path
    ranks: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Of each step, the same on all ranks."""
        return self._same("losses")

    @property
    def norms(self) -> list[float]:
        """Of each step's gradient, the same on all ranks."""
        return self._same("norms")

    @property
    def balances(self) -> list[float]:
        """Of each step's experts, the same on all ranks; none where they are not balanced."""
        return self._same("balances")

    @property
    def val(self) -> list[float]:
        """Validation losses, the same on all ranks."""
        return self._same("val")

    @property
    def rows(self) -> list[int]:
        """Of all batches of all ranks with data of their own, in the order of the batches."""
        own = {rank["data_rank"]: rank["rows"] for rank in self.ranks}
        return [row for batches in zip(*own.values()) for batch in batches for row in batch]

    @property
    def predictions(self) -> str:
        """What ``predict`` wrote."""
        path = self.folder / "predictions.jsonl"
        return path.read_text() if path.exists() else ""

    @property
    def answers(self) -> dict[str, str]:
        """The last answers of validation, of all ranks."""
        return {Path(row).name: text for rank in self.ranks for row, text in rank["answers"].items()}

    def _same(self, name: str) -> list[float]:
        for rank in self.ranks:
            assert rank[name] == self.ranks[0][name], (name, [rank[name] for rank in self.ranks])
        return self.ranks[0][name]


def fit(file: Path, folder: Path, make_strategy: Callable[[], Any], options: dict[str, Any]) -> None:
    """One rank of a fit."""
    L.seed_everything(7, verbose=False)
    module = {"lr": 1e-2, "warmup": 0, "generate_on_validation": False, **options.get("module", {})}
    if "model_id" not in module:
        module["config"] = NemotronVLConfig.tiny(**{**TINY, **options.get("config", {})})
    data = {"train": str(file), "processor": tiny_processor(), "batch_size": 2, "sampler": "sequential"}
    data |= options.get("data", {})
    steps = Steps(options.get("stop_at"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=make_strategy(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[steps, *options.get("callbacks", [])],
        **{"max_steps": 3, "num_sanity_val_steps": 0, **options.get("trainer", {})},
    )
    network = NemotronVLModule(**module)
    datamodule = VLMDataModule(**data)
    trainer.fit(network, datamodule=datamodule, ckpt_path=options.get("ckpt_path"))
    if "predict" in data:
        trainer.predict(network, datamodule=datamodule, return_predictions=False)
    if "save" in options:
        trainer.save_checkpoint(options["save"])
    names = ("losses", "norms", "balances", "rows", "val", "answers")
    written: dict[str, Any] = {name: getattr(steps, name) for name in names}
    written["data_rank"] = data_ranks(trainer)[1]
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(written))


def _rank(index: int, arguments: tuple[Any, ...], ranks: int, port: int) -> None:
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    fit(*arguments)


@pytest.fixture
def run(make_task: Callable[..., Path], tmp_path: Path) -> Callable[..., Fit]:
    """``run(ranks, make_strategy)`` fits 24 rows, some with images; further options by name."""
    file = make_task(24)

    def run(ranks: int = 1, make_strategy: Callable[[], Any] = lambda: "auto", **options: Any) -> Fit:
        folder = tmp_path / f"fit{len(list(tmp_path.glob('fit*')))}"
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (options.pop("file", file), folder, make_strategy, options)
        if ranks == 1 and make_strategy() == "auto":
            fit(*arguments)
        else:
            torch.multiprocessing.start_processes(_rank, (arguments, ranks, port), nprocs=ranks, start_method="fork")
        return Fit(folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)])

    return run


_FOUND: dict[str, Fit] = {}


@pytest.fixture
def reference(run: Callable[..., Fit]) -> Callable[..., Fit]:
    """What one process finds, or DDP on so many; looked up where several tests want the same."""

    def reference(ranks: int = 1, **options: Any) -> Fit:
        key = repr((ranks, options))
        if key not in _FOUND:
            _FOUND[key] = run(ranks, (lambda: "auto") if ranks == 1 else (lambda: "ddp"), **options)
        return _FOUND[key]

    return reference


def assert_same(divided: Fit, expected: Fit, steps: int = 3, rel: float = 1e-5) -> None:
    """Losses, norms of gradients, validation losses, answers and predictions.

    The worst that was measured in float32: losses 2.1e-7, norms 5.4e-7, relative.
    """
    assert len(expected.losses) == steps
    for name in ("losses", "norms", "val"):
        assert getattr(divided, name) == pytest.approx(getattr(expected, name), rel=rel, abs=0.0), name
    assert divided.answers == expected.answers
    assert _without_folders(divided.predictions) == _without_folders(expected.predictions)


def _without_folders(lines: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return [{**row, "source": Path(row["source"]).name} for row in rows]


TIMEOUT = timedelta(seconds=60)
