"""A rank that dies takes the run with it, soon, and is named; one that is asked to stop lets all of them save."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "run_failing.py"
SENTENCES = {  # Lightning watches the processes that it has started too, and may be the first to see it
    "kill": ("local rank 1 was ended by SIGKILL; look there", "terminated with code -9"),
    "error": ("the memory of rank 1 is full",),
}


def start(file: Path, folder: Path, strategy: str, how: str) -> tuple[int, str]:
    """Runs the script in a folder.

    Returns:
        What it ended with, and what it said.
    """
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file), strategy, how],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a signal to all of its processes is none to these tests
        )
        try:
            code = process.wait(timeout=60 + 60)  # starting two processes takes its time
        finally:
            process.kill()
    return code, log.read_text()


def steps_in(folder: Path) -> list[int]:
    """The steps that were taken."""
    return [int(line) for line in (folder / "steps").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "how"),
    [("fsdp2", "kill"), ("fsdp2", "error"), ("pipeline", "kill"), ("pipeline", "error"), ("ddp", "error")],
)
def test_the_others_end_with_the_cause(make_task, tmp_path, strategy, how):
    code, said = start(make_task(24), tmp_path, strategy, how)
    assert code != 0
    died = (tmp_path / "died").stat().st_mtime
    assert time.time() - died < 60
    assert any(sentence in said for sentence in SENTENCES[how])
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert (last if strategy == "ddp" else last / "meta.pt").is_file(), "that of the first step"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "how", "expected"),
    [
        ("ddp", "stop", (0, "An SIGTERMException was raised")),  # which is a SystemExit
        ("fsdp2", "stop all", (0, "An SIGTERMException was raised")),
        ("pipeline", "stop all", (0, "An SIGTERMException was raised")),
        ("fsdp2", "interrupt all", (1, "stopping after this batch, all ranks together")),
    ],
)
def test_all_ranks_stop_together_and_save(make_task, tmp_path, strategy, how, expected):
    file = make_task(40)
    code, said = start(file, tmp_path, strategy, how)
    assert code == expected[0], said
    assert expected[1] in said
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert steps_in(tmp_path) == [1]
    code, said = start(file, tmp_path, strategy, how)
    assert code == 0, said
    assert steps_in(tmp_path) == [1, 2, 3, 4]


SCONTROL = """#!/bin/sh
echo "$@" >> scontrol.log
kill -TERM $PPID
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "pipeline"])
def test_slurm_requeues_a_run_that_goes_on(make_task, tmp_path, strategy):
    """With the variables of ``srun`` and a ``scontrol`` that does what SLURM does then: it ends the processes."""
    file, programs = make_task(40), tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "scontrol").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODEID": 0, "JOB_ID": 17, "JOB_NAME": "train"}
    env = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    env |= {"SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{programs}:{os.environ['PATH']}"}

    def srun() -> None:
        tasks = []
        for rank in range(2):
            with (tmp_path / f"log{rank}").open("w") as log:
                command = [sys.executable, str(SCRIPT), str(file), strategy, "requeue"]
                own = env | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
                tasks.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=own))
        try:
            for rank, task in enumerate(tasks):
                assert task.wait(timeout=120) == 0, (tmp_path / f"log{rank}").read_text()
        finally:
            for task in tasks:
                task.kill()

    srun()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    assert steps_in(tmp_path) == [1, 2], "the batch after that in which it was asked ends the second step"
    srun()
    assert steps_in(tmp_path) == [1, 2, 2, 3, 4]
    assert "hpc_ckpt_1.ckpt" in (tmp_path / "log0").read_text()
