"""Rendered spans -> input_ids and labels. This is where labels are made.

The joined text is tokenised once, exactly as at inference, and a token is trained on iff it holds a character
of a trained span. Labels are aligned with the input; the model shifts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.processing.chat import Span
from lightning_vlm.schema import IGNORE_INDEX, TEXT


def tokenize_spans(tokenizer: Any, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Tokenises spans and labels the trained ones.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed).
        spans: Rendered text in order; no special tokens are added to it.

    Returns:
        ``input_ids`` and ``labels``, both ``(L,)`` int64; labels are -100 outside trained spans.

    Raises:
        ValueError: If the tokenizer gives no character offsets.
    """
    _require_fast(tokenizer)
    text = "".join(span.text for span in spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = torch.zeros(len(text) + 1, dtype=torch.bool)
    position = 0
    for span in spans:
        trained[position : position + len(span.text)] = span.trained
        position += len(span.text)

    input_ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
    # A token that straddles the start of a trained span counts: it holds the answer's first characters.
    cumulative = torch.nn.functional.pad(trained.cumsum(0), (1, 0))
    is_trained = cumulative[offsets[:, 1]] > cumulative[offsets[:, 0]]
    return input_ids, input_ids.where(is_trained, IGNORE_INDEX)


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of `tokenize_spans` for the same text, without labels: for its length.

    Args:
        tokenizer: A fast tokenizer.
        text: Rendered text; no special tokens are added to it.

    Raises:
        ValueError: If the tokenizer gives no character offsets.
    """
    _require_fast(tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def cut_text(input_ids: Tensor, labels: Tensor, max_tokens: int, kept_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cuts a sample's end off, or leaves it whole where that would cut an image or all that is learned.

    Args:
        input_ids: ``(L,)``.
        labels: ``(L,)``.
        max_tokens: Tokens to keep.
        kept_ids: Tokens of images, none of which may be cut off.

    Returns:
        The first ``max_tokens`` of both, or both as they were.
    """
    tail = input_ids[max_tokens:]
    cuts_image = torch.isin(tail, torch.tensor(kept_ids)).any()
    learns = (labels[1:max_tokens] != IGNORE_INDEX).any()
    if not len(tail) or cuts_image or not learns:
        return input_ids, labels
    return input_ids[:max_tokens].clone(), labels[:max_tokens].clone()


def _require_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer (tokenizer.json)"
        )


def last_answer_start(labels: Tensor, token_types: Tensor) -> int:
    """Index of the first token of the last answer: of the last trained run, in which media may stand.

    Args:
        labels: ``(L,)``.
        token_types: ``(L,)`` ``mm_token_type_ids``. Placeholders are never trained on; they belong to what opens them.

    Returns:
        The index; ``L`` if nothing is trained on.
    """
    places = torch.arange(len(labels))
    opened_by = places.where(token_types == TEXT, 0).cummax(0).values
    trained = (labels != IGNORE_INDEX)[opened_by]
    starts = trained & ~torch.nn.functional.pad(trained[:-1], (1, 0))
    found = starts.nonzero().flatten()
    return int(found[-1]) if len(found) else len(labels)


def before_last_answer(spans: list[Span]) -> list[Span]:
    """The spans before the last trained one; all without one.

    Args:
        spans: Rendered text in order.
    """
    trained = [index for index, span in enumerate(spans) if span.trained]
    return spans[: trained[-1]] if trained else spans
