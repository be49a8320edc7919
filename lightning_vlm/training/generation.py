"""A batch -> the model's own answers to its prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.row_media import prompt_media
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import VLMBatch


def left_padded_prompts(batch: VLMBatch, pad_token_id: int) -> dict[str, Tensor]:
    """Cuts each row at its answer and moves the padding to the left, where generation needs it.

    Args:
        batch: A padded batch.
        pad_token_id: Padding, masked.

    Returns:
        ``input_ids`` and ``attention_mask``, both ``(B, longest prompt)``, and ``mm_token_type_ids`` if the
        batch has them.
    """
    width = int(batch.prompt_lengths.max())
    columns = torch.arange(width, device=batch.input_ids.device) - (width - batch.prompt_lengths[:, None])
    mask = columns >= 0
    columns = columns.clamp(min=0)
    prompts = {"input_ids": batch.input_ids.gather(1, columns).where(mask, pad_token_id), "attention_mask": mask.long()}
    if batch.mm_token_type_ids is not None:
        prompts["mm_token_type_ids"] = batch.mm_token_type_ids.gather(1, columns) * mask
    return prompts


@torch.no_grad()
def generate_answers(
    model: NemotronVL,
    processor: NemotronVLProcessor,
    batch: VLMBatch,
    max_new_tokens: int,
    in_step: bool = False,
    options: dict[str, Any] | None = None,
) -> list[str]:
    """Answers to the prompts of a batch, greedy ones unless the options say otherwise.

    Args:
        model: The model, in eval mode.
        processor: Gives the stop token and the decoding.
        batch: A padded batch.
        max_new_tokens: Longest answer.
        in_step: All ranks must run the same number of forward passes (sharded parameters).
        options: Further arguments of transformers' ``generate``, e.g. ``{"do_sample": True, "temperature": 0.6}``;
            where they name one that is given here (``max_new_tokens``, ``eos_token_id``), they win.

    Returns:
        ``B`` texts without special tokens.

    Raises:
        ValueError: If the options ask for several answers to a prompt.
    """
    options = options or {}
    if (number := options.get("num_return_sequences") or 1) != 1:  # the second would be taken for the next row's
        raise ValueError(f"generation.num_return_sequences is {number}; expected 1, an answer per prompt: leave it out")
    tokenizer = processor.tokenizer
    prompts = left_padded_prompts(batch, processor.pad_token_id)
    media = prompt_media(model.config, prompts["input_ids"], prompts.get("mm_token_type_ids"), {**batch.media_inputs()})
    generated = model.generate(
        **prompts,
        **{name: value for name, value in media.items() if value is not None},
        synced_gpus=in_step,
        **{
            "max_new_tokens": max_new_tokens,
            "pad_token_id": processor.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "do_sample": False,
            **options,
        },
    )
    return tokenizer.batch_decode(generated[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
