"""The overlays of `configs/strategy` from the command line: processes of Lightning's and torchrun's, one checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_vlm.data.synthetic import write_digits

ROOT = Path(__file__).parents[2]
FIT = ["fit", "--config", "configs/experiment/digits.yaml", "--trainer.accelerator", "cpu", "--data.batch_size", "4"]
SHORT = ["--trainer.limit_val_batches", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lightning_vlm"]


@pytest.mark.slow
def test_a_run_goes_on_from_strategy_to_strategy(tmp_path):
    write_digits(tmp_path / "data" / "digits", progress=False)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    last = tmp_path / "runs/digits/checkpoints/last.ckpt"

    def fit(start: list[str], steps: int, *more: str) -> str:
        arguments = [*FIT, *more, *SHORT, "--trainer.max_steps", str(steps)]
        done = subprocess.run(
            [*start, *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    command = [str(Path(sys.executable).parent / "lightning-vlm")]
    assert shutil.which(command[0])
    fit(command, 2, "--config", "configs/strategy/pipeline.yaml")
    assert (last / ".metadata").is_file()
    told = fit(command, 4, "--trainer.accumulate_grad_batches", "4", "--ckpt_path", "last")
    assert "step 3 moved" in told
    assert last.is_file()
    accumulate = ["--trainer.accumulate_grad_batches", "2"]
    told = fit(TORCHRUN, 6, "--config", "configs/strategy/fsdp2.yaml", *accumulate, "--ckpt_path", "last")
    assert "step 5 moved" in told
    assert "sync_dist" not in told, "what is logged is the same on all ranks"
    assert (last / ".metadata").is_file()
