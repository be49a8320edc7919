"""Planning sequence packs for a million samples: ours, and NeMo AutoModel's greedy knapsack where it is at hand.

    python benchmarks/packing_plan.py
    python benchmarks/packing_plan.py --peer-python PATH    # a Python that has nemo_automodel

One process, one thread, the same lengths for both. The plan is made once, ``epoch`` is what every later epoch costs
(`reassign_equals` and `order_packs`); the peer has one plan for all epochs. ``fill`` is tokens / (packs * budget);
``bound`` is the fill if a fraction of a pack were never lost in either budget, which no planner reaches. ``worst`` and
``mean`` are the costliest rank of a step against the mean of the step, over all whole steps, for the given world sizes,
where a pack costs its tokens plus a quarter per patch. The peer knows no budget of patches: ``over`` counts the packs
that exceed it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_vlm.data.packing import PackBudget, Packs, order_packs, plan_packs, reassign_equals

Rows = tuple[np.ndarray, np.ndarray, PackBudget]
"""Tokens per sample, patches per sample, budget."""

WORLD_SIZES = (2, 8, 64)
PATCH_COST = 0.25

PEER = """
import json, sys, time
import numpy as np
from nemo_automodel.components.datasets.vlm.neat_packing_vlm import greedy_knapsack_vt_balanced

folder, repeats = sys.argv[1], int(sys.argv[3])
rows = np.load(folder + "/rows.npz")
tokens, patches, budget = rows["tokens"].tolist(), rows["patches"].tolist(), int(sys.argv[2])
seconds = []
for _ in range(repeats):
    start = time.perf_counter()
    bins = greedy_knapsack_vt_balanced(tokens, budget, patches)
    seconds.append(time.perf_counter() - start)
np.savez(
    folder + "/bins.npz",
    members=np.concatenate([np.asarray(members) for members in bins]),
    starts=np.cumsum([0] + [len(members) for members in bins]),
)
print(json.dumps(min(seconds)))
"""


def distributions(count: int, seed: int = 0) -> dict[str, Rows]:
    """Made-up but typical lengths.

    ``captions``: text of about 600 tokens, log-normal, in packs of 8192. ``long_tail``: 95 % short answers of about 150
    tokens, 5 % documents with a Pareto tail up to the whole pack of 16384. ``visual``: half of the rows have a picture
    of 256 to 3328 tokens and four times as many patches, all have some text; both budgets bind.

    Args:
        count: Samples of each.
        seed: Seed.
    """
    rng = np.random.default_rng(seed)
    none = np.zeros(count, dtype=np.int64)

    def lognormal(mean: float, sigma: float, low: int, high: int) -> np.ndarray:
        return np.clip(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count), low, high).astype(np.int64)

    captions = lognormal(600, 0.8, 4, 8192)
    documents = np.clip(rng.pareto(1.0, count) * 1500 + 500, 500, 16384).astype(np.int64)
    long_tail = np.where(rng.random(count) < 0.05, documents, lognormal(150, 0.5, 12, 16384))
    picture = np.where(rng.random(count) < 0.5, lognormal(950, 0.6, 256, 3328), 0)
    visual = picture + lognormal(450, 0.9, 8, 8000)
    # As scarce as tokens, in whole KiB, so that neither budget is a formality.
    patches = max(round(4 * picture.sum() / visual.sum() * 16), 13) * 1024
    return {
        "captions": (captions, none, PackBudget(8192)),
        "long_tail": (long_tail, none, PackBudget(16384)),
        "visual": (visual, 4 * picture, PackBudget(16384, patches)),
    }


def bound(rows: Rows) -> float:
    """Fill (of tokens) if packs could be filled to the last token or patch."""
    tokens, patches, budget = rows
    packs = tokens.sum() / budget.tokens
    return float(packs / max(packs, patches.sum() / budget.patches if budget.patches else 0))


def balance(cost: np.ndarray, order: np.ndarray, world_size: int) -> tuple[float, float]:
    """Highest cost / mean cost of a step: the worst step, and the average over steps."""
    steps = cost[order][: len(order) // world_size * world_size].reshape(-1, world_size)
    ratio = steps.max(1) / steps.mean(1)
    return float(ratio.max()), float(ratio.mean())


def describe(packs: Packs, rows: Rows) -> dict[str, float]:
    """Packs, fill, and packs over a budget."""
    tokens, patches, budget = rows
    over = packs.totals(tokens) > budget.tokens
    if budget.patches is not None:
        over |= packs.totals(patches) > budget.patches
    return {"packs": len(packs), "fill": tokens.sum() / (len(packs) * budget.tokens), "over": int(over.sum())}


def measure_ours(rows: Rows, repeats: int = 3) -> dict[str, float]:
    """Seconds of the plan and of an epoch (best of ``repeats``), and what came out."""
    tokens, patches, budget = rows
    plan, epoch = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        packs = plan_packs(tokens, patches, budget)
        plan.append(time.perf_counter() - start)
        start = time.perf_counter()
        again = reassign_equals(packs, tokens, patches, np.random.default_rng(1))
        order_packs(again.totals(tokens) + PATCH_COST * again.totals(patches), 8, np.random.default_rng(1))
        epoch.append(time.perf_counter() - start)
    result = {"plan_s": min(plan), "epoch_s": min(epoch), **describe(packs, rows)}
    for world_size in WORLD_SIZES:
        # With the world size known the packs are a multiple of it, as a trainer plans them.
        packs = plan_packs(tokens, patches, budget, world_size)
        cost = packs.totals(tokens) + PATCH_COST * packs.totals(patches)
        order = order_packs(cost, world_size, np.random.default_rng(1))
        result[f"worst_{world_size}"], result[f"mean_{world_size}"] = balance(cost, order, world_size)
    return result


def measure_peer(rows: Rows, python: str | Path, repeats: int = 3) -> dict[str, float] | None:
    """The same of NeMo AutoModel's `greedy_knapsack_vt_balanced` under another interpreter; None if it fails."""
    tokens, patches, budget = rows
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "rows.npz", tokens=tokens, patches=patches)
        command = [str(python), "-c", PEER, folder, str(budget.tokens), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
            return None
        with np.load(Path(folder) / "bins.npz") as bins:
            packs = Packs(bins["members"], bins["starts"])
    result = {"plan_s": json.loads(done.stdout.splitlines()[-1]), "epoch_s": math.nan, **describe(packs, rows)}
    cost = packs.totals(tokens) + PATCH_COST * packs.totals(patches)
    for world_size in WORLD_SIZES:
        # Its order is by patches, dealt out to the ranks one after the other.
        result[f"worst_{world_size}"], result[f"mean_{world_size}"] = balance(cost, np.arange(len(packs)), world_size)
    return result


def line(name: str, who: str, result: Mapping[str, float], most: float) -> str:
    ranks = "".join(f"{result[f'worst_{n}']:9.3f} {result[f'mean_{n}']:5.3f}" for n in WORLD_SIZES)
    return (
        f"{name:10} {who:5} {result['plan_s']:7.2f} {result['epoch_s']:7.3f} {result['packs']:7.0f} "
        f"{result['fill']:7.4f} {most:7.4f} {result['over']:6.0f}{ranks}"
    )


def print_table(samples: int, peer_python: str | Path | None, repeats: int = 3) -> None:
    """Measures all distributions and prints them, line by line."""
    ranks = "".join(f"{f'worst/{n}':>9} {'mean':>5}" for n in WORLD_SIZES)
    print(f"{'':10} {'':5} {'plan s':>7} {'epoch s':>7} {'packs':>7} {'fill':>7} {'bound':>7} {'over':>6}{ranks}")
    for name, rows in distributions(samples).items():
        print(line(name, "ours", measure_ours(rows, repeats), bound(rows)), flush=True)
        if peer_python and (peer := measure_peer(rows, peer_python, repeats)):
            print(line(name, "peer", peer, bound(rows)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, help="interpreter that has nemo_automodel")
    arguments = parser.parse_args()
    print_table(arguments.samples, arguments.peer_python, arguments.repeats)


if __name__ == "__main__":
    main()
