"""Import and export of weights beside transformers' from_pretrained and save_pretrained: speed and memory, in one run.

    python benchmarks/checkpoint.py [--width 1024] [--rounds 3] [--folder DIR]

A bfloat16 model in the released layout (Mamba, experts, attention; in files of 200 MB) is read, and written from a
training checkpoint. Each way runs in its own process, in turn and several times; the files are in the page cache. The
memory is the most that the process was given by the system, above what it had before, as a multiple of the weights:
transformers maps files, and pages of a mapped file count until the system takes them back. ``save_pretrained`` writes
from a model that is in memory already; its load is not in its time, but in the memory that writing a checkpoint takes.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = {
    "read: transformers, from_pretrained": "from_pretrained",
    "read: ours": "import",
    "write: transformers, save_pretrained": "save_pretrained",
    "write: ours, export": "export",
}


def make(folder: Path, width: int) -> None:
    """Writes the model, as the base and as a checkpoint of a training."""
    import torch

    from lightning_vlm import NemotronVL, NemotronVLConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = NemotronVL(
        NemotronVLConfig.tiny(
            pattern="MEME*EME",
            hidden_size=width,
            vision_hidden_size=width // 2,
            vision_layers=4,
            vocab_size=32_768,
            n_routed_experts=16,
            moe_intermediate_size=width,
        )
    )
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"model_id": str(folder / "base")}}, folder / "last.ckpt")


def measure(way: str, folder: Path) -> dict[str, float]:
    """Runs one way in this process."""
    import torch

    from lightning_vlm import NemotronVL
    from lightning_vlm.checkpoint.opening import open_pretrained
    from lightning_vlm.checkpoint.release import release
    from lightning_vlm.checkpoint.trained import open_trained

    out = folder / f"out-{way}"
    weights = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    torch.set_default_dtype(torch.bfloat16)
    before = _peak()
    if way == "save_pretrained":
        model = NemotronVL.from_pretrained(folder / "base", dtype=torch.bfloat16)
    start = time.perf_counter()
    if way == "from_pretrained":
        model = NemotronVL.from_pretrained(folder / "base", dtype=torch.bfloat16)
        _touch(model)
    elif way == "import":
        model, _ = open_pretrained(folder / "base")
        _touch(model)
    elif way == "save_pretrained":
        model.save_pretrained(out, max_shard_size="200MB")
    else:
        release(open_trained(folder / "last.ckpt"), out, overwrite=True)
    seconds = time.perf_counter() - start
    return {"gb_per_s": weights / seconds / 1e9, "memory": (_peak() - before) / weights, "gb": weights / 1e9}


def _touch(model: Any) -> None:
    """Reads every weight: mapped files are read when they are first looked at."""
    for parameter in model.parameters():
        parameter.view(-1)[::2048].float().sum()


def _peak() -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux hands getrusage's number on to child processes: theirs would begin with the parent's.
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written; a temporary folder by default")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way == "make":
        make(Path(arguments.folder), arguments.width)
        return
    if arguments.way:
        print(json.dumps(measure(arguments.way, Path(arguments.folder))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:

        def run(way: str) -> dict[str, float]:
            command = [sys.executable, __file__, f"--way={way}", f"--folder={folder}", f"--width={arguments.width}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            return json.loads(output.splitlines()[-1]) if output else {}

        run("make")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for _ in range(arguments.rounds):
            for name, way in WAYS.items():
                found[name].append(run(way))
    print(f"{found[next(iter(WAYS))][0]['gb']:.2f} GB of weights, {arguments.rounds} rounds: median (least to most)")
    print(f"{'way':40} {'GB/s':>22} {'peak / weights':>22} {'speed':>6}")
    for name, rounds in found.items():
        cells = []
        for key in ("gb_per_s", "memory"):
            values = [each[key] for each in rounds]
            cells.append(f"{statistics.median(values):6.2f} ({min(values):5.2f} to {max(values):5.2f})")
        peer = next(other for other in WAYS if other.split(":")[0] == name.split(":")[0])
        ratio = statistics.median(a["gb_per_s"] / b["gb_per_s"] for a, b in zip(rounds, found[peer]))
        print(f"{name:40} {cells[0]:>22} {cells[1]:>22} {ratio:6.2f}")


if __name__ == "__main__":
    main()
