"""Nemotron-Parse: an image of a page in, its text with boxes out. It has no chat template.

So what the model is given is known exactly: the task prompt. All that stands behind it is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_vlm.processing.answer_search import _extract_assistant_text
from lightning_vlm.processing.conversation_media import Media, media_of, prepare_conversation
from lightning_vlm.processing.encoded import EncodedSample, to_sample
from lightning_vlm.schema import IGNORE_INDEX

TASK_PROMPT = "</s><s><predict_bbox><predict_classes><output_markdown>"


def encode_nemotron_parse(
    example: Mapping[str, Any], processor: Any, *, task_prompt: str = TASK_PROMPT
) -> EncodedSample:
    """Encodes the first image of a conversation, the task prompt, and the first answer.

    NeMo AutoModel searches the answer in the tokens; here the prompt is known to be what is not trained on.

    Args:
        example: Has ``conversation``; it is not changed.
        processor: The processor; it is remote code of the model's repository.
        task_prompt: What the decoder is given.

    Raises:
        ValueError: If there is no image, or the prompt's tokens do not open the sample.
    """
    conversation = prepare_conversation(example["conversation"])
    images = media_of(conversation).images[:1]
    if not images:
        raise ValueError("the conversation holds no image; Nemotron-Parse reads one page per sample")
    answers = [message for message in conversation if message.get("role") == "assistant"]
    target = _extract_assistant_text(answers[0]) if answers else ""
    output = dict(processor(images=images, text=[task_prompt + target], padding=True, return_tensors="pt"))
    ids = output["input_ids"][0]
    start = _prompt_length(ids.tolist(), task_prompt, processor)
    labels = torch.where(torch.arange(len(ids)) >= start, ids, IGNORE_INDEX)
    return to_sample({**output, "labels": labels[None]}, conversation, processor, Media(images, [], []))


def _prompt_length(ids: list[int], prompt: str, processor: Any) -> int:
    """Tokens up to the end of the prompt, with special tokens before it that the tokenizer adds."""
    own = list(getattr(processor, "tokenizer", processor).encode(prompt, add_special_tokens=False))
    for skipped in range(min(2, len(ids))):
        if own and ids[skipped : skipped + len(own)] == own:
            return skipped + len(own)
    raise ValueError("the tokens of task_prompt do not open the sample; use the tokenizer that belongs to the model")


def require_decoder_tokens(processor: Any) -> None:
    """Refuses a tokenizer that cannot pad or start a decoder.

    Args:
        processor: The processor.

    Raises:
        ValueError: If it has no padding token, or none of a start, a bos or an eos token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad_token_id; expected one, to pad decoder inputs")
    starts = ("decoder_start_token_id", "bos_token_id", "eos_token_id")
    if all(getattr(owner, name, None) is None for owner in (processor, tokenizer) for name in starts):
        raise ValueError(f"{type(tokenizer).__name__} has none of {', '.join(starts)}; expected one")
