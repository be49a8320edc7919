"""``lightning-vlm plan``: what an epoch consists of, from the data alone; no model and no accelerator is touched."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

from lightning_vlm.datamodule import VLMDataModule


def print_plan(datamodule: VLMDataModule, world_size: int, accumulate_grad_batches: int, picture: Path | None) -> None:
    """Prints samples, batches, fill, steps and the largest batches, and draws their histogram.

    Args:
        datamodule: The data as configured.
        world_size: Data-parallel ranks to plan for.
        accumulate_grad_batches: Micro-batches of an optimizer step.
        picture: PNG file to draw, or ``None``.

    Raises:
        DataError: If the data is not acceptable.
    """
    datamodule.setup("fit")
    summary = datamodule.summary(world_size)
    print(summary.text())
    if accumulate_grad_batches > 1:
        print(f"\n{math.ceil(summary.steps / accumulate_grad_batches):,} optimizer steps per epoch")
    if picture is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno histogram: matplotlib is not installed (pip install matplotlib)")
        return
    summary.draw(picture)
    print(f"\nhistogram: {picture}")


def planned_ranks(trainer: Any) -> int | None:
    """Data-parallel ranks that a Trainer config asks for; ``None`` where only the machine can tell.

    Args:
        trainer: The ``trainer`` part of a config.
    """
    devices = trainer.devices
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if isinstance(devices, str) and re.fullmatch(r"\d+(,\d+)*,?", devices):  # a number, or a list of indices
        devices = len(devices.strip(",").split(",")) if "," in devices else int(devices)
    return devices * trainer.num_nodes if isinstance(devices, int) and devices > 0 else None
