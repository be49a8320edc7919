"""``lightning-vlm describe``: the model of a run in numbers, before a weight is read or allocated.

The network is made by the module that a run would make, on the meta device, from its config alone: a model of any size
is described in seconds on any machine, with the parts frozen that the run freezes. Training memory is what follows from
the numbers of weights; activations depend on the batches, and sharding on the strategy.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from lightning_vlm.models.architecture import Architecture, aligned, describe_architecture, format_bytes, save_text
from lightning_vlm.models.lora import has_adapters
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.module import NemotronVLModule
from lightning_vlm.schema import DataError
from lightning_vlm.training.optimizers import state_bytes

# Lightning keeps weights in this dtype; with "mixed" precision they stay float32, and only computing is in half.
_DTYPES = {
    **dict.fromkeys(("64-true", "64"), torch.float64),
    **dict.fromkeys(("bf16-true", "transformer-engine"), torch.bfloat16),
    **dict.fromkeys(("16-true", "transformer-engine-float16"), torch.float16),
}
_STATES = {
    "adamw": "2 for each trainable parameter, in its dtype",
    "adamw8bit": "2 bytes for each trainable parameter, and a scale of 4 for 256 of them; small tensors as adamw",
    "muon": "1 for each hidden matrix, 2 for other trainable parameters, in their dtype",
}


def planned_network(options: dict[str, Any], precision: str | int | None) -> NemotronVL:
    """The network of a run on the meta device.

    Args:
        options: Of `NemotronVLModule`.
        precision: Of the Trainer.

    Raises:
        DataError: If the model's folder holds no config, or one that describes no model.
        ValueError: If the options do not fit each other.
    """
    module = NemotronVLModule(**{**options, "init": "random"})  # random: of a folder, its config is read alone
    with torch.device("meta"):
        network = module.network
    return network.to(dtype=_DTYPES.get(str(precision), torch.float32))


def print_description(
    network: NemotronVL,
    precision: str | int | None = None,
    detailed: bool = False,
    as_json: bool = False,
    save: str | os.PathLike[str] | None = None,
    optimizer: str = "adamw",
) -> None:
    """Prints what a model consists of, and what memory its training takes.

    Args:
        network: The model, frozen as in the run.
        precision: Of the Trainer, for the first line.
        detailed: Also the inside of its parts.
        as_json: Print for machines: one JSON object.
        save: Where to write the same text, besides.
        optimizer: Of the run.

    Raises:
        DataError: If the file cannot be written.
    """
    architecture = describe_architecture(network, detailed)
    precision = str(precision or "32-true")
    dtype = str(_DTYPES.get(precision, torch.float32)).removeprefix("torch.")
    memory = training_memory(architecture, state_bytes(network, optimizer), optimizer)
    if as_json:
        data = {"precision": precision, "dtype": dtype, **architecture.to_dict(), "training_memory_bytes": memory}
        text = json.dumps(data, indent=2)
    else:
        width = _DTYPES.get(precision, torch.float32).itemsize
        adapters = ", of adapters 4 (float32)" if width < 4 and has_adapters(network) else ""
        text = (
            f"trainer.precision {precision}: {width} bytes a parameter ({dtype}){adapters}; no weights were read\n\n"
            f"{architecture}\n\n{_memory_text(memory)}"
        )
    print(text)
    if save is not None:
        try:
            save_text(text, save)
        except OSError as error:
            raise DataError(
                "--save", f"{os.fspath(save)!r} cannot be written ({error.strerror})", "name another"
            ) from error


def training_memory(architecture: Architecture, states: int, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes of a training's weights, gradients and optimizer states on one device that holds all of them.

    Args:
        architecture: The model, frozen as in the run.
        states: Bytes of the optimizer's states.
        optimizer: Its name.
    """
    total = architecture.total
    parts = {
        "weights": total.parameter_bytes + total.fixed_bytes,
        "gradients": total.trainable_bytes,
        optimizer: states,
    }
    return {**parts, "total": sum(parts.values())}


def _memory_text(memory: dict[str, int]) -> str:
    formulas = {
        "weights": "parameters and fixed values",
        "gradients": "one for each trainable parameter, in its dtype",
        **{name: text for name, text in _STATES.items() if name in memory},
        "total": "activations come on top; sharding over devices is not considered",
    }
    header = ("training", "memory", "")
    return aligned([header, *((name, format_bytes(memory[name]), formulas[name]) for name in formulas)], left=(0, 2))
