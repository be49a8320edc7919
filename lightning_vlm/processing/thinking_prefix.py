"""Gemma 4's empty thinking channel: put behind every opening of a model turn, and kept out of the labels.

Its instruction-tuned models write ``<|channel>thought\\n<channel|>`` before they answer. Without it in the training
rows the first label contradicts what the model is sure of. It is a prefix that is given, not an answer that is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_vlm.processing.token_search import content_end, pattern_starts
from lightning_vlm.schema import IGNORE_INDEX

_GEMMA4_MODEL_TURN = "<|turn>model\n"
_GEMMA4_THINKING_PREFIX = "<|channel>thought\n<channel|>"


def gemma4_inject_thinking_prefix(batch: dict[str, Tensor], processor: Any) -> dict[str, Tensor]:
    """Puts the prefix behind every ``<|turn>model\\n`` that does not have it yet.

    The inserted tokens are visible and not trained on (in NeMo AutoModel they are: defect 2B.12), and padding at the
    end of a row is not carried along.

    Args:
        batch: ``input_ids`` ``(B, L)``; every other tensor of that shape is extended too: ``attention_mask`` by 1,
            ``labels`` by -100, the others by 0. It is changed in place.
        processor: A processor, or its tokenizer. One that does not know the tokens changes nothing.

    Returns:
        The same dict, with rows right-padded to the longest.
    """
    return _inject_thinking_prefix_tokens(batch, getattr(processor, "tokenizer", processor))


def _inject_thinking_prefix_tokens(batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """See `gemma4_inject_thinking_prefix`.

    Args:
        batch: As there.
        tokenizer: The tokenizer.
    """
    marker, prefix = _tokens(tokenizer)
    input_ids = batch["input_ids"]
    if not marker or not prefix:
        return batch
    fills = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    inserted = {"attention_mask": 1, "labels": IGNORE_INDEX}
    mask = batch.get("attention_mask")
    ends = [content_end(row, None if mask is None else mask[number], None) for number, row in enumerate(input_ids)]
    places = []
    for row, end in zip(input_ids, ends):
        done = set(pattern_starts(row[:end], [*marker, *prefix]).tolist())
        starts = [
            start for start in _apart(pattern_starts(row[:end], marker).tolist(), len(marker)) if start not in done
        ]
        places.append([start + len(marker) for start in starts])
    if not any(places):
        return batch
    width = max(end + len(prefix) * len(own) for end, own in zip(ends, places))
    keys = [key for key, value in batch.items() if isinstance(value, Tensor) and value.shape == input_ids.shape]
    for key in keys:
        new = torch.tensor(prefix) if key == "input_ids" else torch.full((len(prefix),), inserted.get(key, 0))
        rows = []
        for row, end, own in zip(batch[key], ends, places):
            parts = torch.tensor_split(row[:end], own)
            joined = [parts[0], *(piece for part in parts[1:] for piece in (new.to(row), part))]
            row = torch.cat(joined)
            rows.append(pad(row, (0, width - len(row)), value=fills.get(key, 0)))
        batch[key] = torch.stack(rows)
    return batch


def thinking_prefix_mask(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """``(B, L)`` bool: True on prefixes that stand right behind the opening of a model turn.

    Args:
        input_ids: ``(B, L)``.
        tokenizer: The tokenizer; no token of one that is not Gemma 4's is True.
    """
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    marker, prefix = _tokens(tokenizer)
    if marker and prefix:
        for row, out in zip(input_ids, found):
            starts = pattern_starts(row, [*marker, *prefix]) + len(marker)
            out[(starts[:, None] + torch.arange(len(prefix))).flatten()] = True
    return found


def _tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the opening and of the prefix; empty unless their brackets are tokens of their own."""
    convert: Callable[[str], Any] | None = getattr(tokenizer, "convert_tokens_to_ids", None)
    unknown = (None, getattr(tokenizer, "unk_token_id", None))
    if convert is not None and any(convert(token) in unknown for token in ("<|turn>", "<|channel>", "<channel|>")):
        return [], []
    texts = (_GEMMA4_MODEL_TURN, _GEMMA4_THINKING_PREFIX)
    opening, prefix = (list(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return opening, prefix


def _apart(starts: Sequence[int], length: int) -> list[int]:
    """Those that do not overlap the one before, left to right."""
    kept: list[int] = []
    for start in starts:
        if not kept or start >= kept[-1] + length:
            kept.append(start)
    return kept
