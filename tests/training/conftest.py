"""Two real processes for what ranks must agree on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.twins import shake

__all__ = ["shake", "two_ranks"]

_BEFORE = """
import json, sys
import torch
from torch import distributed as dist
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def report(value):
    print("REPORT " + json.dumps(value), flush=True)
"""
_AFTER = """
dist.barrier()  # a rank that leaves first would take the connection away from the other
dist.destroy_process_group()
"""


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[[str], list[Any]]:
    """Runs source, with ``rank`` and ``report`` defined, in two processes joined by gloo; returns reports."""

    def run(source: str) -> list[Any]:
        script, rendezvous = tmp_path / "rank.py", tmp_path / "rendezvous"
        script.write_text(_BEFORE + source + _AFTER)
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(rendezvous)], stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        return [
            json.loads(line.removeprefix("REPORT "))
            for output in outputs
            for line in output.splitlines()
            if line.startswith("REPORT ")
        ]

    return run
