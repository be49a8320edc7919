"""Bad samples on several ranks: any number of ranks leaves out the same ones, listed once; too many stop all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
