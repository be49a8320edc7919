"""RunRecord: what a checkpoint must know of its run to become a model that can be served, as plain data.

Every `NemotronVLModule` brings one: the settings of the processor that images were trained with, the run's name and
last metrics for the model card, and one sample on which an export can be held against the trained model.
"""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from torch import Tensor

from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import MEDIA_FIELDS, Sample, join_media

_SAMPLES = 4  # looked at, for one with media
_LARGEST_SAMPLE = 32 << 20  # bytes; checkpoints should not grow with the images of a row


class RunRecord(L.Callback):
    """Keeps the record; a run that is continued makes its own anew."""

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._sample: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes a sample of the training data."""
        self._trainer = trainer
        datamodule = trainer.datamodule
        if isinstance(datamodule, VLMDataModule) and isinstance(datamodule.processor, NemotronVLProcessor):
            self._sample = example_inputs(datamodule.probe_samples(_SAMPLES))

    def state_dict(self) -> dict[str, Any]:
        """The record, for the checkpoint."""
        if self._trainer is None:
            return {}
        processor = getattr(self._trainer.datamodule, "processor", None)
        settings = processor.to_dict() if isinstance(processor, NemotronVLProcessor) else None
        return {
            "processor": json.loads(json.dumps(settings)),
            "runs": [
                {"logger": type(logger).__name__, "name": str(logger.name), "version": str(logger.version)}
                for logger in self._trainer.loggers
            ],
            "metrics": {
                name: float(value) for name, value in self._trainer.callback_metrics.items() if value.numel() == 1
            },
            "sample": self._sample,
        }


def example_inputs(samples: list[Sample]) -> dict[str, Tensor] | None:
    """One sample as a model takes it: the one with most kinds of media, and the shortest of those.

    Args:
        samples: To choose among.

    Returns:
        Arguments of `NemotronVL.forward`, a batch of one; ``None`` where none is small enough.
    """

    def inputs(sample: Sample) -> dict[str, Tensor]:
        found = {"input_ids": sample.input_ids[None], **join_media([sample])}
        if sample.mm_token_type_ids is not None:
            found["mm_token_type_ids"] = sample.mm_token_type_ids[None]
        return {name: value.clone() for name, value in found.items()}

    small = [sample for sample in samples if sum(v.nbytes for v in inputs(sample).values()) <= _LARGEST_SAMPLE]
    if not small:
        return None
    kinds = {id(sample): sum(getattr(sample, name) is not None for name in MEDIA_FIELDS) for sample in small}
    return inputs(min(small, key=lambda sample: (-kinds[id(sample)], len(sample))))
