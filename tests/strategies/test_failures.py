"""A rank that dies takes the run with it, soon, and is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "run_failing.py"
SENTENCES = {"kill": "local rank 1 was ended by SIGKILL; look there", "error": "the memory of rank 1 is full"}


@pytest.mark.slow
@pytest.mark.parametrize("how", SENTENCES)
@pytest.mark.parametrize("strategy", ["fsdp2", "pipeline"])
def test_the_others_end_with_the_cause(make_task, tmp_path, strategy, how):
    file, log = make_task(24), tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file), strategy, how],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            code = process.wait(timeout=60 + 60)  # starting two processes takes its time
        finally:
            process.kill()
    assert code != 0
    died = (tmp_path / "died").stat().st_mtime
    assert time.time() - died < 60
    assert SENTENCES[how] in log.read_text()
    assert (tmp_path / "checkpoints" / "last.ckpt" / "meta.pt").is_file(), "that of the first step"
