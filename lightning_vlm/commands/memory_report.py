"""What ``plan --memory`` says: the table, the verdict, and one thing to try where a run does not fit.

The advice looks at the largest item alone; it does not try settings out.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from lightning_vlm.commands.memory import GIB, MemoryPlan
from lightning_vlm.models.architecture import LAYER_KINDS, aligned
from lightning_vlm.training.optim import OptimizerName

_NOTES = {
    "weights": "frozen ones and buffers too",
    "gradients": "of what is trained",
    **dict.fromkeys(get_args(OptimizerName), "states"),
    "gathered weights": "FSDP2: the root and two layers",
    "whole gradients": "FSDP2: before they are summed up",
    "DDP's buckets": "a copy of the gradients",
    "autocast": "half-precision copies of matrices",
    "vision": "activations of the tower",
    **dict.fromkeys(("projector", *LAYER_KINDS.values()), "activations"),
    "head": "activations",
    "layer at work": "recomputed, and its gradients",
    "logits": "one chunk of the head",
    "allowance": "CUDA, NCCL, 5 % for gaps",
}

_LAYOUT = ("strategy", "world_size", "stages", "shards", "tensor")


def print_memory(plan: MemoryPlan, as_json: bool = False) -> int:
    """Prints a plan.

    Args:
        plan: The plan.
        as_json: Print for machines: one JSON object.

    Returns:
        Exit code: 0 if it fits, 1 if not, or if that cannot be told.
    """
    print(json.dumps(_data(plan), indent=2) if as_json else f"{_text(plan)}\n\n{verdict(plan)}")
    return 0 if plan.fits else 1


def verdict(plan: MemoryPlan) -> str:
    """One sentence.

    Args:
        plan: The plan.
    """
    worst = plan.worst
    where = f" ({worst.name})" if len(plan.ranks) > 1 else ""
    size = f"{worst.total / GIB:.1f} of {plan.gpu_gib:g} GiB{where}"
    if plan.fits is None:
        return f"cannot tell: {size} without activations; {plan.source}"
    if plan.fits:
        return f"fits: {size}"
    items = sorted((worst.held | worst.activations).items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {number / GIB:.1f}" for name, number in items)
    return f"does not fit: {size}; the largest items are {named}; try {_advice(items[0][0], plan)}"


def _text(plan: MemoryPlan) -> str:
    ranks = plan.ranks
    names = sorted({name for rank in ranks for name in (*rank.held, *rank.activations)}, key=list(_NOTES).index)
    rows = [("GiB per rank", *(rank.name for rank in ranks), "")]
    for name in names:
        numbers = [(rank.held | rank.activations).get(name) for rank in ranks]
        note = _NOTES[name] + (f" ({plan.worst.worker})" if name == "layer at work" else "")
        if name == "gathered weights" and plan.layout.gathering is not None and not plan.layout.gathering.frees_layers:
            note = "FSDP2: all layers at once"
        rows.append((name, *("-" if number is None else f"{number / GIB:.2f}" for number in numbers), note))
    if plan.load is None:
        rows.append(("activations", *("?" for _ in ranks), plan.source))
    rows.append(("allowance", *(f"{rank.allowance / GIB:.2f}" for rank in ranks), _NOTES["allowance"]))
    rows.append(("total", *(f"{rank.total / GIB:.2f}" for rank in ranks), "an upper bound"))
    lines = [f"{plan.layout}; trainer.precision {plan.precision}"]
    if plan.load is not None:
        size = f"{plan.load.tokens:,} tokens, {plan.load.patches:,} patches"
        lines.append(f"micro-batches of at most {size}: {plan.source}")
    return "\n".join([*lines, "", aligned(rows, left=(0, len(rows[0]) - 1))])


def _data(plan: MemoryPlan) -> dict[str, Any]:
    load = plan.load
    return {
        "layout": {name: getattr(plan.layout, name) for name in _LAYOUT},
        "precision": plan.precision,
        "micro_batch": None if load is None else {"tokens": load.tokens, "patches": load.patches},
        "ranks": [
            {
                "name": rank.name,
                "held_bytes": rank.held,
                "activation_bytes": rank.activations if load else None,
                "allowance_bytes": rank.allowance,
                "total_bytes": rank.total,
            }
            for rank in plan.ranks
        ],
        "gpu_memory_bytes": round(plan.gpu_gib * GIB),
        "fits": plan.fits,
        "verdict": verdict(plan),
    }


def _advice(name: str, plan: MemoryPlan) -> str:
    recomputed = plan.model["gradient_checkpointing"]
    parts = ("vision", "audio", "language") if recomputed is True else recomputed or ()
    layout = plan.layout
    name = plan.worst.worker if name == "layer at work" else name
    if name in ("vision", "projector"):
        if "vision" not in parts:
            return "model.gradient_checkpointing: true"
        if plan.model["vision_micro_batch"] is None:
            return "model.vision_micro_batch: 8"
        return "a smaller data.batch_patches"
    if name in plan.worst.activations:  # of the language model
        return "a smaller data.batch_tokens" if "language" in parts else "model.gradient_checkpointing: true"
    if name in ("gathered weights", "whole gradients", "autocast") and layout.gathering is not None:
        if layout.gathering.param_dtype is None and plan.precision != "bf16-true":
            return "param_dtype: bfloat16 of the strategy"
        if layout.strategy == "pipeline":
            return "more stages"
        return "model.lora" if layout.gathering.frees_layers else "reshard_after_forward: true of the strategy"
    return _spread(name, plan)


def _spread(name: str, plan: MemoryPlan) -> str:
    """For what grows with the number of weights."""
    layout = plan.layout
    if layout.strategy in ("single", "ddp"):
        if layout.world_size > 1:
            return "trainer.strategy: fsdp2"
        if name in ("gradients", plan.model["optimizer"]) and plan.model["lora"] is None:
            return "model.lora, or trainer.strategy: fsdp2 on several devices"
        return "trainer.precision: bf16-true" if plan.precision != "bf16-true" else "trainer.strategy: fsdp2"
    if layout.shards < layout.data_ranks:
        return f"shards: null of the strategy: {layout.data_ranks} ranks share one copy instead of {layout.shards}"
    if plan.precision != "bf16-true":
        return "trainer.precision: bf16-true"
    return "more devices" if layout.strategy == "fsdp2" else "more stages"
