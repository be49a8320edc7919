"""The card of an exported model: where its weights come from, how it was trained, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_vlm.checkpoint.source import is_repository
from lightning_vlm.checkpoint.trained import TrainedWeights

_SETTINGS = ("lr", "weight_decay", "betas", "warmup", "min_lr_ratio", "freeze", "from_scratch", "lora", "init")


def model_card(trained: TrainedWeights, title: str, num_bytes: int, notes: Sequence[str] = ()) -> str:
    """The card as Markdown with the hub's front matter.

    Args:
        trained: The checkpoint.
        title: Of the model.
        num_bytes: Of its weights.
        notes: What whoever serves it should know.
    """
    options, record = trained.hyperparameters, trained.record
    base = options.get("model_id")
    front = ["---", "pipeline_tag: image-text-to-text", "tags: [lightning-vlm]"]
    if base is not None and is_repository(base):
        front.append(f"base_model: {base}")
    elif base is not None:
        base = Path(base).absolute().name  # where it lay is nobody's business
    facts: list[tuple[str, Any]] = [
        ("trained from", base if base is not None else "a config, with random weights"),
        ("optimizer steps", trained.rest.get("global_step")),
        ("epochs", trained.rest.get("epoch")),
        ("weights", f"{num_bytes / 1e9:.2f} GB"),
        *((run["logger"], f"{run['name']} / {run['version']}") for run in record.get("runs", [])),
        *((name, options[name]) for name in _SETTINGS if options.get(name) is not None),
    ]
    lines = [*front, "---", "", f"# {title}", "", *_table(("training", ""), facts)]
    if metrics := record.get("metrics"):
        lines += ["", *_table(("metric", "last value"), [(name, f"{value:.6g}") for name, value in metrics.items()])]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"| {header[0]} | {header[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
