"""Strategies on two CPU processes: what a step costs, how long a pipeline's ranks wait, how fast checkpoints are.

    python benchmarks/strategies.py [--rounds 3] [--width 128]

One thread per process, text of one length. *Steps*: the same eight rows per step under each strategy, as a ratio to
DDP on as many processes. *Bubbles*: the share of a step over m micro-batches in which a rank has nothing to do,
measured as 1 - m * t / T(m), where t, for which a micro-batch keeps the slowest rank busy, is the slope of T between
two numbers of micro-batches. Beside it what theory says of p ranks with v stages each: (p - 1) / (v * m + p - 1)
(GPipe, PipeDream flush, Megatron's interleaving); zero-bubble schedules are to have less than a third of it.
*Checkpoints*: a folder of shards written and read, beside Lightning's own ModelParallelStrategy and a single file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy

WARM_UP, STEPS = 2, 5
ROWS, TOKENS = 8, 256


class Clock(L.Callback):
    """Times of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last, self.step = 0.0, 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Stops the time where a step has ended."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now


def fit(rank: int, ranks: int, port: int, make: Callable[[], Any], folder: Path, options: dict[str, Any]) -> None:
    """One rank of a fit; leaves the median time of a step, and of saving and loading where asked."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    width = options["width"]
    config = NemotronVLConfig.tiny(pattern="M-*-" * 2, hidden_size=width, vision_hidden_size=32, vision_layers=1)
    module = NemotronVLModule(config=config, generate_on_validation=False, freeze=["vision", "projector"])
    data = VLMDataModule(
        train=str(folder / "rows.jsonl"),
        processor=tiny_processor(),
        batch_size=options["batch_size"],
        sampler="sequential",
    )
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=make(),
        max_steps=options.get("steps", WARM_UP + STEPS),
        accumulate_grad_batches=options["accumulate"],
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    found = {"step": statistics.median(clock.times[WARM_UP:] or clock.times)}
    if options.get("checkpoint"):
        path = folder / "saved.ckpt"
        begun = time.perf_counter()
        trainer.save_checkpoint(path)
        found["save"] = time.perf_counter() - begun
        if rank == 0:
            files = path.rglob("*") if path.is_dir() else [path]
            found["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
        begun = time.perf_counter()
        trainer.strategy.load_checkpoint(path)
        found["load"] = time.perf_counter() - begun
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def run(make: Callable[[], Any], ranks: int, folder: Path, **options: Any) -> dict[str, float]:
    """A fit on so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(fit, (ranks, port, make, folder, options), nprocs=ranks, start_method="fork")
    return json.loads((folder / "found.json").read_text())


def auto() -> str:
    return "auto"


def ddp() -> str:
    return "ddp"


def steps(folder: Path, rounds: int, width: int) -> None:
    ways: dict[str, tuple[Callable[[], Any], int, int, int]] = {
        "ddp": (ddp, 2, ROWS // 2, 1),
        "single process, one core": (auto, 1, ROWS, 1),
        "fsdp2": (FSDP2Strategy, 2, ROWS // 2, 1),
        "fsdp2, layers kept gathered": (partial(FSDP2Strategy, reshard_after_forward=False), 2, ROWS // 2, 1),
        "fsdp2, tensor 2": (partial(FSDP2Strategy, tensor=2), 2, ROWS, 1),
        "pipeline, 1f1b, 8 micro-batches": (PipelineStrategy, 2, ROWS // 8, 8),
        "ddp, 4 micro-batches": (ddp, 2, ROWS // 8, 4),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (make, ranks, batch_size, accumulate) in ways.items():
            found = run(make, ranks, folder, batch_size=batch_size, accumulate=accumulate, width=width)
            times[name].append(found["step"])
    print(f"\nsteps of {ROWS} rows of {TOKENS} tokens, {rounds} rounds in turn      time of a step, as a ratio to ddp")
    base = statistics.median(times["ddp"])
    for name, own in times.items():
        print(f"  {name:<42}{statistics.median(own) * 1e3:8.0f} ms   {statistics.median(own) / base:6.2f}")


def bubbles(folder: Path, rounds: int, width: int) -> None:
    schedules = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 2, "zbv": 2}
    print(f"\nbubbles, 2 ranks, {rounds} rounds in turn                    measured    theory")
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, stages in schedules.items():
            make = partial(PipelineStrategy, schedule=name, stages_per_rank=stages)
            for count in (2, 4, 8, 16):
                found = run(make, 2, folder, batch_size=1, accumulate=count, width=width)
                times.setdefault((name, count), []).append(found["step"])
    for name, stages in schedules.items():
        median = {count: statistics.median(times[name, count]) for count in (2, 4, 8, 16)}
        busy = (median[16] - median[4]) / 12
        for count in (2, 4, 8):
            measured, theory = 1 - count * busy / median[count], 1 / (stages * count + 1)
            print(f"  {name:<20}{count:>3} micro-batches {measured:24.2f} {theory:16.2f}")


def lightnings() -> Any:
    """Lightning's own strategy, for the peer's numbers: it saves what this repository's strategy sharded."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Theirs(FSDP2Strategy):
        save_checkpoint = ModelParallelStrategy.save_checkpoint
        load_checkpoint = ModelParallelStrategy.load_checkpoint
        lightning_module_state_dict = ModelParallelStrategy.lightning_module_state_dict
        optimizer_state = ModelParallelStrategy.optimizer_state

    return Theirs()


def checkpoints(folder: Path, rounds: int, width: int) -> None:
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "single file": (auto, 1),
        "fsdp2, Lightning's ModelParallelStrategy": (lightnings, 2),
        "fsdp2": (FSDP2Strategy, 2),
        "pipeline": (PipelineStrategy, 2),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (make, ranks) in ways.items():
            options = {"batch_size": 1, "accumulate": 2, "width": 8 * width, "checkpoint": True, "steps": 1}
            found[name].append(run(make, ranks, folder, **options))
    print(f"\ncheckpoints, {rounds} rounds in turn                          size   written      read")
    for name, runs in found.items():
        size = runs[0]["bytes"]
        speeds = (size / statistics.median(one[what] for one in runs) / 1e9 for what in ("save", "load"))
        print(f"  {name:<44}{size / 1e9:6.2f} GB" + "".join(f"{speed:7.2f} GB/s" for speed in speeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sections", nargs="+", default=["steps", "bubbles", "checkpoints"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "x" * (TOKENS - 40)
        row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        count = ROWS * 2 * (WARM_UP + STEPS + 1) * 2
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
        sections = {"steps": steps, "bubbles": bubbles, "checkpoints": checkpoints}
        for section in arguments.sections:
            sections[section](folder, arguments.rounds, arguments.width)


if __name__ == "__main__":
    main()
