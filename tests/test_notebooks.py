"""Each notebook runs from top to bottom, keeps its pictures, and shows what it says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def printed(notebook: Any) -> str:
    return "".join(output.get("text", "") for output in outputs(notebook))


def learns(text: str) -> None:
    match = re.search(r"held-out exact match: ([\d.]+)", text)
    assert match
    assert float(match[1]) > 0.8


def isolates(text: str) -> None:
    changes = dict(re.findall(r"(.+): the largest change of another document is (\S+)", text))
    assert float(changes["position_ids, as usual"]) > 0.1, "the leak is there to be seen"
    assert float(changes["cu_seqlens, ours"]) == 0
    match = re.search(r"([\d.]+) % fewer tokens to compute than padded batches", text)
    assert match
    assert float(match[1]) > 25


def survives(text: str) -> None:
    assert "missing file: " in text
    assert "names 7 of 7 broken rows and no other" in text


def prunes(text: str) -> None:
    match = re.search(r"first tubelet, (\d+)% are where something moved \((\d+)% of all places\)", text)
    assert match
    assert int(match[1]) > 90 > 3 * int(match[2])
    assert "EVS at 80 %: 724 tokens, 102 of them pictures" in text  # max(64, int(8 * 64 * 0.2)) = 102


def exports(text: str) -> None:
    assert "verified: logits of a sample of the training data are equal bit by bit" in text
    assert re.search(r"largest difference of [\d,]+ logits: 0\n", text)
    before, after = re.findall(r"held-out exact match (?:with adapters|of the merged folder): ([\d.]+)", text)
    assert before == after
    assert float(after) > 0.8


def divides(text: str) -> None:
    assert "8, FSDP2: fits: " in text
    assert "8, DDP: does not fit: " in text
    idle = dict(re.findall(r"(\w[\w ]*): (0\.\d+) of the time idle", text))
    assert idle["GPipe"] == idle["1F1B"] == re.findall(r"theory of GPipe and 1F1B: (\S+)", text)[0]
    assert float(idle["zero bubble"]) < float(idle["1F1B"]) / 2
    match = re.search(r"largest relative difference of 8 losses: (\S+)", text)
    assert match
    assert float(match[1]) < 1e-5


CLAIMS = {
    "01_train_on_a_laptop": learns,
    "02_packing_and_isolation": isolates,
    "03_your_data": survives,
    "04_tiles_video_evs": prunes,
    "05_finetune_and_export": exports,
    "06_many_devices": divides,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it, and threads would wait for each other
    monkeypatch.setitem(os.environ, "PYTHONWARNINGS", "ignore")
    kept = nbformat.read(path, as_version=4)
    assert pictures(kept) >= 4, "the notebook is committed with its pictures"

    run = nbformat.read(path, as_version=4)
    NotebookClient(
        run, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    assert pictures(run) == pictures(kept)
    for notebook in (kept, run):
        CLAIMS[path.stem](printed(notebook))
