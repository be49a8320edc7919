"""Answers searched in token ids: the last resort for labels, where no chat template tells the turns.

The tokens of an answer depend on what stands before it, so its text is searched in the text of the tokens, without
space and without characters that several tokens make up. A short answer also stands in its question, so a place is only
taken if it can be no other: all texts of the conversation, questions too, are laid out in order once as far left and
once as far right as they go, and where both agree, or where one place alone is closed by an end token, that is the
place. What stays open is left unlabelled and said: as long as the texts are in the row, no question is labelled.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.processing.token_search import _decode_single_token, content_end
from lightning_vlm.schema import IGNORE_INDEX

_log = logging.getLogger(__name__)

_STOPS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
_PART_OF_A_CHARACTER = "\ufffd"  # what decoding gives for a token that is not a whole character

Place = tuple[int, int]


@dataclass(slots=True)
class _Piece:
    """One text of a conversation and where it stands, as (start, end) in the row's letters."""

    text: str
    letters: str
    is_answer: bool
    places: list[Place]


class _Row:
    """The letters of a row of tokens, and the token of each letter."""

    def __init__(self, ids: Sequence[int], tokenizer: Any) -> None:
        texts = {token: _decode_single_token(tokenizer, token) for token in set(ids)}
        stops = {token for token in (getattr(tokenizer, "eos_token", None), *_STOPS) if token}
        self.texts = [texts[token] for token in ids]
        self.is_stop = [text.strip() in stops for text in self.texts]
        self.is_blank = [not _letters(text) for text in self.texts]
        self.letters = "".join(_letters(text) for text in self.texts)
        self.token_of = [number for number, text in enumerate(self.texts) for _ in _letters(text)]

    def places(self, letters: str) -> list[Place]:
        found, start = [], self.letters.find(letters)
        while start >= 0:
            found.append((start, start + len(letters)))
            start = self.letters.find(letters, start + 1)
        return found

    def tokens(self, place: Place) -> tuple[Place, bool]:
        """The tokens of a place, with the end token behind it if there is one; and whether there is."""
        start, end = self.token_of[place[0]], self.token_of[place[1] - 1] + 1
        while start and _PART_OF_A_CHARACTER in self.texts[start - 1] and self.is_blank[start - 1]:
            start -= 1
        stop = end
        while stop < len(self.texts) and self.is_blank[stop]:
            stop += 1
        is_closed = stop < len(self.texts) and self.is_stop[stop]
        return ((start, stop + 1) if is_closed else (start, end)), is_closed

    def is_closed(self, place: Place) -> bool:
        ends_a_token = place[1] == len(self.letters) or self.token_of[place[1]] != self.token_of[place[1] - 1]
        return ends_a_token and self.tokens(place)[1]


def _letters(text: str) -> str:
    return "".join(letter for letter in text if not letter.isspace() and letter != _PART_OF_A_CHARACTER)


def build_labels(
    input_ids_batch: Tensor, conversations: Sequence[Sequence[Mapping[str, Any]]], processor: Any
) -> Tensor:
    """Labels the answers that can be found, and the end token behind each.

    NeMo AutoModel takes the first occurrence, which is the question's where the answer stands in it, stops at the first
    answer that it cannot find, and reads the first text part of an answer alone. Here the question is never labelled,
    the answers behind one that is not found are, and all text parts are an answer.

    Args:
        input_ids_batch: ``(B, L)`` int64.
        conversations: Messages of each row.
        processor: A processor, or its tokenizer.

    Returns:
        ``(B, L)`` int64, -100 where not trained on, not shifted.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    labels = torch.full_like(input_ids_batch, IGNORE_INDEX)
    for row, messages, out in zip(input_ids_batch, conversations, labels):
        end = content_end(
            row, None, getattr(tokenizer, "pad_token_id", None), keep=getattr(tokenizer, "eos_token_id", None)
        )
        for start, stop in _answer_places(row[:end].tolist(), messages, tokenizer):
            out[start:stop] = row[start:stop]
    return labels


def _extract_assistant_text(message: Mapping[str, Any]) -> str:
    """All text of a message: its content if that is a string, else its text parts joined.

    Args:
        message: The message.
    """
    return "".join(_texts(message))


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else part.get("text") or "" for part in content if _is_text(part)]


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and part.get("type", "text") == "text")


def _answer_places(ids: list[int], messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Place]:
    row, pieces = _Row(ids, tokenizer), []
    for message in messages:
        is_answer = message.get("role") == "assistant"
        for text in [_extract_assistant_text(message)] if is_answer else _texts(message):
            tokens = tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
            if letters := "".join(_letters(_decode_single_token(tokenizer, token)) for token in tokens):
                pieces.append(_Piece(text, letters, is_answer, row.places(letters)))
    earliest = _lay_out(pieces)
    latest = iter(_latest([piece for piece, place in zip(pieces, earliest) if place is not None]))
    unfound = [piece.letters for piece, place in zip(pieces, earliest) if place is None and not piece.is_answer]
    found = []
    for piece, first in zip(pieces, earliest):
        last = next(latest) if first is not None else None
        if not piece.is_answer:
            continue
        if first is None or last is None:
            _log.warning("an answer is not in the text of its sample and not trained on: %r", piece.text[:80])
        elif any(piece.letters in letters for letters in unfound):
            _log.warning("an answer cannot be told from its question and is not trained on: %r", piece.text[:80])
        elif (place := _only_place(piece, first, last, row)) is None:
            _log.warning("an answer stands in several places and is not trained on: %r", piece.text[:80])
        else:
            found.append(row.tokens(place)[0])
    return found


def _lay_out(pieces: list[_Piece]) -> list[Place | None]:
    """The first place of each piece behind the one before; ``None`` for a piece that has none there."""
    placed: list[Place | None] = []
    position = 0
    for piece in pieces:
        place = next((place for place in piece.places if place[0] >= position), None)
        position = position if place is None else place[1]
        placed.append(place)
    return placed


def _latest(chain: list[_Piece]) -> list[Place]:
    """The last place of each piece before the one behind it; all have one, because all have an earliest."""
    placed: list[Place] = []
    for piece in reversed(chain):
        limit = placed[-1][0] if placed else piece.places[-1][1]
        placed.append(next(place for place in reversed(piece.places) if place[1] <= limit))
    return placed[::-1]


def _only_place(piece: _Piece, first: Place, last: Place, row: _Row) -> Place | None:
    """The one place from the earliest to the latest, or the one of them that is closed."""
    between = [place for place in piece.places if first <= place <= last]
    if len(between) > 1:
        between = [place for place in between if row.is_closed(place)]
    return between[0] if len(between) == 1 else None
