"""Bad samples on several ranks: any number of ranks leaves out the same ones, listed once; too many stop all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.multiprocessing

from lightning_vlm.data.bad_samples import BadSamples
from lightning_vlm.data.examples import ExampleBatch
from lightning_vlm.data.screening import BadSamplePolicy
from lightning_vlm.schema import DataError

DATA = {"batch_size": 2, "max_bad_fraction": 0.2}


@pytest.fixture
def damage(tmp_path: Path) -> Callable[..., set[int]]:
    """Breaks the pixels of some images, which no header shows; returns the lines of their rows."""

    def damage(count: int) -> set[int]:
        lines = set()
        for image in sorted(tmp_path.glob("rows.jsonl-*-0.png"))[:count]:
            content = bytearray(image.read_bytes())
            content[60] ^= 0xFF
            image.write_bytes(content)
            lines.add(int(image.name.split("-")[1]) + 1)
        return lines

    return damage


def records(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_ranks_leave_out_the_same(start: Callable[..., Any], damage: Callable[..., set[int]], packing: bool) -> None:
    bad = damage(4)
    options = {"data": {**DATA, "packing": packing}}
    for ranks in (1, 2):
        run = start(ranks, **options)
        assert run.error == ""
        for epoch in (0, 1):
            assert sorted(run.rows(epoch)) == [row for row in range(1, 24) if row not in bad]
        found = records(run)
        assert sorted(int(record["source"].rpartition(":")[2]) for record in found) == sorted(bad), "each once"
        assert list(run.logged("data/bad_samples").values()) == [4.0, 4.0]
        assert list(run.logged("data/samples_skipped").values()) == [4.0, 4.0]
        assert list(run.logged("data/samples_seen").values()) == [19.0, 19.0]


@pytest.mark.slow
def test_a_rank_of_bad_samples_alone_keeps_step(start: Callable[..., Any], damage: Callable[..., set[int]]) -> None:
    bad = damage(6)
    run = start(2, data={"batch_size": 1, "max_bad_fraction": 0.5})
    assert run.error == ""
    assert [len(rank["batches"]) for rank in run.ranks] == [24, 24]
    assert sorted(run.rows(0)) == [row for row in range(1, 24) if row not in bad]
    weights = run.weights()
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


@pytest.mark.slow
def test_too_many_stop_all_ranks(start: Callable[..., Any], damage: Callable[..., set[int]]) -> None:
    damage(6)
    run = start(2, data={"batch_size": 2, "max_bad_fraction": 0.1})
    assert run.error.startswith("data.train: ")
    assert "cannot be used, expected at most max_bad_fraction = 10 %" in run.error


@pytest.mark.slow
def test_ranks_that_found_other_data_stop(start: Callable[..., Any]) -> None:
    run = start(2, one_node_lacks_a_file=True, data={"batch_size": 2, "max_bad_fraction": 0.2, "verify": "headers"})
    errors = {rank["error"] for rank in run.ranks}
    assert all(error.startswith("data.train: rank ") for error in errors)
    assert all("expected the same data on every node" in error for error in errors)


class Data:
    """What the list asks of a datamodule: a million samples, of which ``num_known`` were bad before the start."""

    files: ClassVar[dict[str, list[str]]] = {"train": ["rows.jsonl"]}
    bad_samples = BadSamplePolicy(max_fraction=1.0)

    def __init__(self, num_known: int, file: str) -> None:
        self.known = {index: self.error(index, file) for index in range(0, 2 * num_known, 2)}

    @staticmethod
    def error(index: int, file: str = "rows.jsonl") -> DataError:
        return DataError(f"{file}:{index + 1}", "bad", "remove it")

    def known_bad(self, split: str) -> dict[int, DataError]:
        return self.known if split == "train" else {}

    def num_samples(self, split: str) -> int:
        return 1_000_000


def _exchange(rank: int, folder: Path, other_paths: bool) -> None:
    """One of two ranks: a start, three looks at what the other has found, and a sentence."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = Data(2000, f"node{rank}/rows.jsonl" if other_paths else "rows.jsonl")
    strategy = SimpleNamespace(barrier=lambda name: torch.distributed.barrier())
    trainer: Any = SimpleNamespace(
        world_size=2, is_global_zero=rank == 0, local_rank=rank, datamodule=data, callbacks=[], ckpt_path=None,
        log_every_n_steps=1, current_epoch=0, global_step=0, default_root_dir=folder, strategy=strategy,
    )  # fmt: skip
    sizes: list[int] = []
    gather = torch.distributed.all_gather_object

    def measured(found: list[Any], own: Any) -> None:
        sizes.append(len(pickle.dumps(own)))
        gather(found, own)

    torch.distributed.all_gather_object = measured
    BadSamples.attach(trainer, data)
    (bad,) = trainer.callbacks
    bad.setup(trainer, None, "fit")
    bad.on_train_start(trainer, None)
    for step in range(3):
        batch = ExampleBatch({})
        index = 2 * step + 1
        batch.skipped = [(index, data.error(index))] if rank == step % 2 else []
        bad.on_train_batch_end(trainer, None, None, batch, step)
    found = bad.found["train"]
    written = {"sizes": sizes, "found": [[index, error.source] for index, error in found.items()]}
    (folder / f"{rank}.json").write_text(json.dumps(written))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("other_paths", [False, True])
def test_ranks_tell_each_other_only_what_is_new(tmp_path: Path, other_paths: bool) -> None:
    """Where nodes name the same rows differently, all is told once; the lists are equal on all ranks either way."""
    torch.multiprocessing.start_processes(_exchange, (tmp_path, other_paths), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["found"] == second["found"]
    assert [index for index, _ in first["found"]] == sorted([*range(0, 4000, 2), 1, 3, 5])
    for rank in (first, second):
        assert sum(size > 2000 for size in rank["sizes"]) == int(other_paths), rank["sizes"]
        assert len(rank["sizes"]) == 3 + int(other_paths)
    lines = [json.loads(line)["source"] for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 2003
