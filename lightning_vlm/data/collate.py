"""Samples -> VLMBatch by right padding. Images are never padded: their patches are concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_vlm.schema import IGNORE_INDEX, Sample, VLMBatch, count_label_tokens


class PaddedCollate:
    """Pads a batch to its longest sample.

    Args:
        pad_token_id: Fills ``input_ids``; masked and unlabelled, so any id would do.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample], counted: bool = True) -> VLMBatch:
        """Makes a batch.

        Args:
            samples: At least one sample.
            counted: False for a stand-in batch: its labels are removed, so it adds nothing to loss or scores.
        """
        lengths = torch.tensor([len(sample) for sample in samples])
        labels = pad_sequence([sample.labels for sample in samples], True, IGNORE_INDEX)
        if not counted:
            labels = torch.full_like(labels, IGNORE_INDEX)
        grids = [sample.image_grid_hw for sample in samples if sample.image_grid_hw is not None]
        patches = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        return VLMBatch(
            input_ids=pad_sequence([sample.input_ids for sample in samples], True, self.pad_token_id),
            labels=labels,
            attention_mask=(torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            pixel_values=torch.cat(patches) if patches else None,
            image_grid_hw=torch.cat(grids) if grids else None,
            num_images=torch.tensor(
                [0 if sample.image_grid_hw is None else len(sample.image_grid_hw) for sample in samples]
            ),
            prompt_lengths=torch.tensor([sample.prompt_length for sample in samples]),
            prompts=[sample.prompt for sample in samples],
            references=[sample.references for sample in samples],
            sources=[sample.source for sample in samples],
            counted=torch.full((len(samples),), counted),
            num_label_tokens=count_label_tokens(labels),
        )
