"""Samples -> VLMBatch: right-padded rows, or one packed row. Patches are never padded: they follow on, as clips do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_vlm.schema import (
    IGNORE_INDEX,
    MEDIA_FIELDS,
    Sample,
    VLMBatch,
    count_label_tokens,
    join_media,
    token_types,
)
from lightning_vlm.segments import cu_seqlens_from_lengths


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
        types = token_types(samples)
        return VLMBatch(
            mm_token_type_ids=None if types is None else pad_sequence(types, True, 0),
            input_ids=pad_sequence([sample.input_ids for sample in samples], True, self.pad_token_id),
            labels=labels,
            attention_mask=(torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            num_label_tokens=count_label_tokens(labels),
            **_per_sample(samples, counted),
        )


class PackedCollate:
    """Puts samples one after another into one row, with their boundaries and nothing between them."""

    def __call__(self, samples: Sequence[Sample], counted: bool = True) -> VLMBatch:
        """Makes a packed row.

        Args:
            samples: At least one sample.
            counted: False for a stand-in: its labels are removed.
        """
        labels = torch.cat([sample.labels for sample in samples])[None]
        if not counted:
            labels = torch.full_like(labels, IGNORE_INDEX)
        types = token_types(samples)
        return VLMBatch(
            mm_token_type_ids=None if types is None else torch.cat(types)[None],
            input_ids=torch.cat([sample.input_ids for sample in samples])[None],
            labels=labels,
            attention_mask=None,
            cu_seqlens=cu_seqlens_from_lengths([len(sample) for sample in samples]),
            num_label_tokens=sum(sample.num_label_tokens for sample in samples) if counted else 0,
            **_per_sample(samples, counted),
        )


def blank_sample(token_id: int) -> Sample:
    """What stands for a batch of which every sample is bad: one token, nothing to learn.

    Args:
        token_id: The token.
    """
    return Sample(
        input_ids=torch.tensor([token_id]),
        labels=torch.tensor([IGNORE_INDEX]),
        pixel_values=None,
        image_grid_hw=None,
        prompt_length=1,
        prompt="",
        references=(),
        source="stand-in",
    )


def _per_sample(samples: Sequence[Sample], counted: bool) -> dict[str, Any]:
    """What both kinds of batches hold per sample, and all media in reading order."""
    media: dict[str, Any] = {**dict.fromkeys(MEDIA_FIELDS), **join_media(samples)}
    counts = {"num_images": "image_grid_hw", "num_videos": "video_grid_thw", "num_clips": "input_features"}
    for name, items in counts.items():
        if media[items] is not None or name == "num_images":
            media[name] = torch.tensor([_length(getattr(sample, items)) for sample in samples])
    return {
        **media,
        "prompt_lengths": torch.tensor([sample.prompt_length for sample in samples]),
        "prompts": [sample.prompt for sample in samples],
        "references": [sample.references for sample in samples],
        "sources": [sample.source for sample in samples],
        "counted": torch.full((len(samples),), counted),
    }


def _length(values: Tensor | None) -> int:
    return 0 if values is None else len(values)
