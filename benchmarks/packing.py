"""What packing costs and buys: training, the Mamba scan, planning and collating, each beside its peer in one run.

    python benchmarks/packing.py
    python benchmarks/packing.py --peer-python PATH    # a Python that has nemo_automodel: its planner and collater too

Every measurement runs in a process of its own, ways take turns, and the best of each is printed; memory is the
process's peak above its state before. Ratios are ours over theirs.

training    label tokens per second of forward, backward and AdamW, batches made beforehand, padded and packed, the same
            model and the same mean number of samples per step: on the digits demo's training mixture, and on short
            answers with a tail of long ones.
scan        the Mamba2 recurrence, forward and backward, on the same tensors: transformers' PyTorch path (one document,
            it knows no boundaries) and ours (boundaries). With --device cuda also the installed kernels.
collate     four packs of 16384 tokens into a batch: ours, and NeMo AutoModel's dense mask.
planning    see benchmarks/packing_plan.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import packing_plan

PACK = 16384
PACKS = 4

PEER_COLLATE = """
import json, resource, sys, time
import torch
from nemo_automodel.components.datasets.vlm.collate_fns import neat_packed_vlm_collater

torch.set_num_threads(2)
size, count = int(sys.argv[1]), int(sys.argv[2])
ids = torch.arange(size) // 512 + 1
pack = {
    "input_ids": torch.arange(size), "labels": torch.arange(size), "attention_mask": ids,
    "position_ids": torch.arange(size) % 512, "mm_token_type_ids": torch.zeros(size, dtype=torch.long),
    "seq_lens": [512] * (size // 512), "pixel_values": None, "image_grid_thw": None, "n_images": 0, "n_videos": 0,
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
batch = neat_packed_vlm_collater([dict(pack) for _ in range(count)], attn_implementation="sdpa")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "mib": (peak - before) / 1024}))
"""


def best_of(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run after one to warm up, and the process's memory above where it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "mib": (peak - before) / 1024}


def write_mixture(mixture: str, folder: Path) -> list[str]:
    """Writes a mixture's rows, all with images of the demo or all text; returns the files."""
    if mixture == "demo":
        from lightning_vlm.data.synthetic import write_digits

        write_digits(folder, progress=False)
        return [str(path) for path in sorted((folder / "train").glob("*.jsonl"))]
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(400) < 0.1, rng.pareto(1.2, 400) * 300 + 300, rng.lognormal(4, 0.5, 400)).astype(int)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "say it again"},
                {"role": "assistant", "content": "word " * (min(length, 2000) // 5 + 1)},
            ]
        }
        for length in lengths
    ]
    file = folder / "long_tail.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return [str(file)]


def measure_training(mixture: str, packing: bool, steps: int = 12) -> dict[str, float]:
    """Trains on the first batches of an epoch."""
    import torch

    from lightning_vlm import NemotronVL, NemotronVLConfig, VLMDataModule
    from lightning_vlm.processing.tiny import tiny_processor

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = write_mixture(mixture, Path(folder))
        data = VLMDataModule(
            train=files, processor=tiny_processor(), batch_size=16, packing=packing, cache_dir=folder + "/cache"
        )
        data.setup("fit")
        batches = [batch for batch, _ in zip(data.train_dataloader(), range(steps))]
    model = NemotronVL(NemotronVLConfig.tiny()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    total = sum(batch.num_label_tokens for batch in batches)

    def run() -> None:
        for batch in batches:
            model(
                **batch.model_inputs(), labels=batch.labels, num_items_in_batch=1, skip_logits=True, use_cache=False
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    measured = best_of(run, 3)
    real = sum(batch.num_tokens for batch in batches)
    computed = sum(batch.input_ids.numel() for batch in batches)
    return {"rate": total / measured["seconds"], "padding": 1 - real / computed, **measured}


def measure_scan(way: str, tokens: int, device: str, repeats: int = 5) -> dict[str, float]:
    """One scan of Nemotron-Nano's head and state sizes, an eighth of its heads; chunk size 128, as released."""
    import torch
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    from lightning_vlm.ops.choice import Choice
    from lightning_vlm.ops.mamba import scan
    from lightning_vlm.segments import documents_from_lengths

    torch.manual_seed(0)
    heads, width, state, groups = 16, 64, 128, 1
    x, B, C = torch.randn(tokens, heads, width), torch.randn(tokens, groups, state), torch.randn(tokens, groups, state)
    dt, A, D = torch.rand(tokens, heads) * 0.1, -torch.rand(heads) * 4, torch.randn(heads)
    inputs = [tensor.to(device).requires_grad_() for tensor in (x, dt, A, B, C, D)]
    documents = documents_from_lengths([tokens // 8 - 3] * 7 + [tokens - 7 * (tokens // 8 - 3)], device)
    weight = torch.randn(tokens, heads, width, device=device)

    def run() -> None:
        if way == "transformers":
            x, dt, A, B, C, D = inputs
            y = mamba2_chunk_scan(x[None], dt[None], A, B[None], C[None], 128, D=D)[0]
        else:
            y = scan(*inputs, documents, Choice(way, "measured"))
        torch.autograd.grad(y, inputs, weight)
        if device == "cuda":
            torch.cuda.synchronize()

    return best_of(run, repeats)


def measure_collate(repeats: int = 3) -> dict[str, float]:
    """Four packs, as batches of a loader: rows side by side are four micro-batches here, one row each."""
    import torch

    from lightning_vlm.data.collate import PackedCollate
    from lightning_vlm.schema import Sample

    ids = torch.arange(512)
    sample = Sample(ids, ids, None, None, 1, "", ("",), "row")
    collate = PackedCollate()
    return best_of(lambda: [collate([sample] * (PACK // 512)) for _ in range(PACKS)], repeats)


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "training": lambda mixture, way: measure_training(mixture, way == "packed"),
    "scan": lambda way, tokens, device: measure_scan(way, int(tokens), device),
    "collate": lambda: measure_collate(),
}


def in_own_process(*arguments: str) -> dict[str, float]:
    """Runs one measurement."""
    command = [sys.executable, __file__, "--measure", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def in_turn(ways: list[list[str]], rounds: int) -> list[dict[str, float]]:
    """The best of each way over several rounds in which they take turns."""
    results: list[list[dict[str, float]]] = [[] for _ in ways]
    for _ in range(rounds):
        for result, way in zip(results, ways):
            result.append(in_own_process(*way))
    return [min(result, key=lambda measured: measured["seconds"]) for result in results]


def training(rounds: int) -> None:
    """Prints padded and packed training."""
    print(f"\n{'training':<34}{'label tokens/s':>16}{'padding':>18}{'ratio':>8}")
    for mixture in ("demo", "long_tail"):
        padded, packed = in_turn([["training", mixture, way] for way in ("padded", "packed")], rounds)
        for way, measured in (("padded", padded), ("packed", packed)):
            ratio = measured["rate"] / padded["rate"]
            print(f"{mixture + ', ' + way:<34}{measured['rate']:>16,.0f}{measured['padding']:>18.1%}{ratio:>8.2f}")


def scans(tokens: int, device: str, rounds: int) -> None:
    """Prints the scans."""
    import torch

    from lightning_vlm.ops.mamba import obstacle

    names = ["torch", *(name for name in ("mamba_ssm", "fla") if not obstacle(name, torch.device(device)))]
    ways = ["transformers", *names]
    measured = in_turn([["scan", way, str(tokens), device] for way in ways], rounds)
    print(f"\n{f'scan, {tokens} tokens, {device}':<34}{'ms':>16}{'MiB':>18}{'time':>8}{'memory':>8}")
    for way, result in zip(ways, measured):
        memory = result["mib"] / max(measured[0]["mib"], 1e-9)
        print(
            f"{way if way == 'transformers' else 'ours, ' + way:<34}{result['seconds'] * 1e3:>16.0f}"
            f"{result['mib']:>18.0f}{result['seconds'] / measured[0]['seconds']:>8.2f}{memory:>8.2f}"
        )


def collates(peer_python: str | None) -> None:
    """Prints the collates."""
    ours = in_own_process("collate")
    print(f"\n{f'collate, {PACKS} packs of {PACK}':<34}{'ms':>16}{'MiB':>18}{'time':>8}{'memory':>8}")
    print(f"{'ours':<34}{ours['seconds'] * 1e3:>16.2f}{ours['mib']:>18.2f}")
    if peer_python is None:
        return
    command = [peer_python, "-c", PEER_COLLATE, str(PACK), str(PACKS)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    peer = json.loads(run.stdout.splitlines()[-1])
    slower, larger = peer["seconds"] / ours["seconds"], peer["mib"] / max(ours["mib"], 1 / 256)
    row = f"{'NeMo AutoModel, dense mask':<34}{peer['seconds'] * 1e3:>16.0f}{peer['mib']:>18.0f}"
    print(f"{row}{slower:>7.0f}x{larger:>7.0f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has nemo_automodel")
    parser.add_argument("--sections", nargs="+", default=["training", "scan", "collate", "planning"])
    parser.add_argument("--tokens", type=int, default=4096, help="of a scan")
    parser.add_argument("--samples", type=int, default=1_000_000, help="that are planned")
    parser.add_argument("--device", default="cpu", help="of the scans")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        section, *arguments = options.measure
        print(json.dumps(MEASURES[section](*arguments)))
        return
    if "training" in options.sections:
        training(options.rounds)
    if "scan" in options.sections:
        scans(options.tokens, options.device, options.rounds)
    if "collate" in options.sections:
        collates(options.peer_python)
    if "planning" in options.sections:
        print()
        packing_plan.print_table(options.samples, options.peer_python)


if __name__ == "__main__":
    main()
