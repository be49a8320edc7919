"""Two CPU processes give the gradients, losses and scores of one: uneven rows, text-only ranks, stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RUN = Path(__file__).with_name("run_fit.py")


def run(file: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(RUN), str(file), str(out), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]


@pytest.fixture
def uneven(write_rows: Callable[..., Path], write_image: Callable[..., str]) -> Path:
    """Nine rows: two ranks of two get (images | text only), then mixed, then one row and a stand-in."""
    rows = []
    for index, num_images in enumerate([1, 2, 0, 0, 1, 0, 2, 1, 1]):
        images = [write_image(f"{index}-{k}.png", 16 + 8 * k, 16, index) for k in range(num_images)]
        answer = "word " * (index % 4) + str(index)
        rows.append(
            {
                "images": images,
                "messages": [
                    {"role": "user", "content": "<image>" * num_images + f"question {index}"},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return write_rows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(uneven: Path, tmp_path: Path, accumulate: int) -> None:
    options = ["--accumulate", str(accumulate)]
    (one,) = run(uneven, tmp_path / "one", "--batch_size", "4", *options)
    two = run(uneven, tmp_path / "two", "--ranks", "2", "--batch_size", "2", *options)

    assert [len(rank["rows"]) for rank in two] == [3, 3], "equal steps on every rank"
    assert sorted((row for rank in two for batch in rank["rows"] for row in batch), key=int) == [
        str(n) for n in range(1, 10)
    ]
    assert two[1]["rows"][-1] == [], "the last row is on one rank, the other runs a stand-in"

    assert (
        len(one["gradients"]) == len(two[0]["gradients"]) == len(two[1]["gradients"]) == (3 if accumulate == 1 else 2)
    )
    for step, expected in enumerate(one["gradients"]):
        for rank in two:
            assert rank["gradients"][step].keys() == expected.keys()
            for name, gradient in expected.items():
                # Measured worst case: 1.2e-7.
                torch.testing.assert_close(rank["gradients"][step][name], gradient, rtol=0, atol=1e-6, msg=name)
    assert two[0]["losses"] == pytest.approx(one["losses"], abs=1e-5, nan_ok=True)

    assert set(two[0]["scores"]) == set(one["scores"])
    assert one["scores"]["val/gen/exact_match"] == pytest.approx(4 / 9), "a counted stand-in would change it"
    for name, value in one["scores"].items():
        assert two[0]["scores"][name] == pytest.approx(value, abs=1e-5), name

    answers = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert len(answers[0].splitlines()) == 9
    assert answers[0] == answers[1]
