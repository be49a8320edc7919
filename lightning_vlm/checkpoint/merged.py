"""The weights of a LoRA run with its adapters added to them: what is served without knowing of LoRA.

Each weight is merged when it is read, and stays in float32: it is rounded once, to what it is stored in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_vlm.checkpoint.opening import planned_model
from lightning_vlm.checkpoint.trained import TrainedWeights
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.lora import Adapter, Lora, adapters_of, add_adapters, without_adapters
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.schema import DataError


class MergedWeights(TrainedWeights):
    """Trained weights with adapters merged.

    Args:
        trained: Of the adapted model.
        adapters: In it.

    Raises:
        DataError: If the checkpoint lacks one.
    """

    def __init__(self, trained: TrainedWeights, adapters: list[Adapter]) -> None:
        self.path, self.rest, self._trained = trained.path, trained.rest, trained
        if missing := [name for each in adapters for name in (each.base, each.a, each.b) if name not in trained]:
            raise DataError(
                str(trained.path),
                f"its lora settings ask for {missing[0]}, which is not in it",
                "name the checkpoint of another run",
            )
        self._adapters = {without_adapters(adapter.base): adapter for adapter in adapters}
        inside = {name for adapter in adapters for name in (adapter.a, adapter.b)}
        self._names = {without_adapters(name): name for name in trained if name not in inside}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._trained[self._names[name]]
        if (adapter := self._adapters.get(name)) is None:
            return weight
        delta = adapter.delta(self._trained[adapter.a], self._trained[adapter.b])
        return weight.float() + delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._trained.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """What a weight was trained in, which is not that of its sum."""
        return self._trained.dtype(self._names[name])


def lora_of(trained: TrainedWeights) -> Lora | None:
    """The LoRA settings of a run.

    Args:
        trained: Its checkpoint.
    """
    options = trained.hyperparameters.get("lora")
    return Lora(**options) if options else None


def trained_adapters(
    trained: TrainedWeights, lora: Lora, base: Path | None, files: WeightFiles | None
) -> list[Adapter]:
    """The adapters in a checkpoint.

    Args:
        trained: The checkpoint of a LoRA run.
        lora: Its settings.
        base: Folder of the model it began with.
        files: The weights in that folder, if it began with them.
    """
    if base is not None:
        model = planned_model(base, files)
    else:
        with torch.device("meta"):
            model = NemotronVL(NemotronVLConfig.from_dict(trained.hyperparameters["config"]))
    with torch.device("meta"):
        add_adapters(model, lora)
    return adapters_of(model)
