"""The card of an exported model: where its weights come from, how it was trained, what was measured.

By its tag an export is known from other folders: what a user keeps in one that only looks like it is not replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from lightning_vlm.checkpoint.source import is_repository
from lightning_vlm.checkpoint.trained import TrainedWeights

CARD = "README.md"
TAG = "lightning-vlm"

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
    front = ["---", "pipeline_tag: image-text-to-text", f"tags: [{TAG}]"]
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


def has_card(folder: Path) -> bool:
    """Whether a folder is an export, of a model or of adapters.

    Args:
        folder: Any.
    """
    try:
        front = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return False
    tags = front.get("tags")
    return isinstance(tags, list) and TAG in tags


def _table(header: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"| {header[0]} | {header[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
