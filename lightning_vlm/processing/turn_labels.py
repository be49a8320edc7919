"""Token ids -> labels, by the marks that a chat template sets around assistant turns: for processors that are not ours.

Such a processor returns ids in which media are already expanded, so there are no rendered spans to go by (`labels`
has those, for our own processor). What is left are the template's own tokens: the ones that open an assistant turn and
the one that closes it. They are learned once per tokenizer and template, and found again by comparing whole tensors.
The trade-off: whoever writes those tokens into a question writes a turn. `answer_search` is the last resort for
tokenizers without a template.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_vlm.processing.answer_search import build_labels
from lightning_vlm.processing.thinking_prefix import thinking_prefix_mask
from lightning_vlm.processing.token_search import _decode_single_token, content_end, pattern_starts
from lightning_vlm.schema import IGNORE_INDEX

_log = logging.getLogger(__name__)

_IMSTART_TEMPLATE_PROCESSORS = frozenset(
    {
        "Qwen2VLProcessor",
        "Qwen2_5_VLProcessor",
        "Qwen2_5OmniProcessor",
        "Qwen3VLProcessor",
        "Qwen3VLMoeProcessor",
        "Qwen3OmniMoeProcessor",
    }
)
"""Processors whose turns are ``<|im_start|>assistant\\n ... <|im_end|>``: nothing has to be rendered to know that."""

_SENTINEL = "XSENTINELMARKERX"

Markers = tuple[list[int], int]
_KNOWN: WeakKeyDictionary[Any, dict[tuple[Any, bool], Markers | str]] = WeakKeyDictionary()


def build_labels_from_template(
    input_ids_batch: Tensor,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    processor: Any,
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Labels every assistant turn, its end token included, and nothing else.

    Unlike in NeMo AutoModel the markers are derived once per tokenizer and template, an answer that begins with what
    the marker ends with (a line break) is found, a turn that was cut off does not label padding, and an empty thinking
    prefix of Gemma 4 is not trained on.

    Args:
        input_ids_batch: ``(B, L)`` int64.
        conversations: Messages of each row; read only where the template does not help, see `build_labels`.
        processor: A processor, or its tokenizer.
        attention_mask: ``(B, L)``, 0 for padding. Without it, padding tokens at a row's end count as padding.

    Returns:
        ``(B, L)`` int64, -100 where not trained on, not shifted.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        marker, stop = turn_markers(processor)
    except ValueError as error:
        _warn_once(
            f"the turns of {type(processor).__name__} cannot be told by its template, answers are searched: {error}"
        )
        return build_labels(input_ids_batch, conversations, processor)
    labels = _build_labels_from_markers(
        input_ids_batch,
        marker,
        stop,
        attention_mask=attention_mask,
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        merged_ends=_merged_ends(input_ids_batch, marker, tokenizer),
    )
    for row, messages in zip(labels, conversations):
        if (row == IGNORE_INDEX).all() and any(message.get("role") == "assistant" for message in messages):
            _warn_once(f"no assistant turn of a {type(processor).__name__} sample was found: it is not trained on")
    return labels.masked_fill(thinking_prefix_mask(input_ids_batch, tokenizer), IGNORE_INDEX)


def _build_labels_from_markers(
    input_ids_batch: Tensor,
    assistant_marker: Sequence[int],
    stop_id: int,
    *,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    merged_ends: Sequence[int] = (),
) -> Tensor:
    """Labels what follows each marker, up to and including the first stop token.

    A marker inside a labelled turn opens nothing. A turn without a stop token is labelled to the end of its row, but
    not on padding (in NeMo AutoModel it is: defect 2B.11).

    Args:
        input_ids_batch: ``(B, L)`` int64.
        assistant_marker: Tokens that open an assistant turn.
        stop_id: Token that closes it.
        attention_mask: ``(B, L)``, 0 for padding.
        pad_token_id: Tells padding at a row's end where there is no mask.
        merged_ends: Tokens that may stand for the marker's last one, because the answer's first characters merged with
            it. They belong to the answer.

    Returns:
        ``(B, L)`` int64 labels.

    Raises:
        ValueError: If the marker is empty, which would stand everywhere.
    """
    if not len(assistant_marker):
        raise ValueError("the assistant marker is empty; expected the tokens that open an assistant turn")
    labels = torch.full_like(input_ids_batch, IGNORE_INDEX)
    for number, (row, out) in enumerate(zip(input_ids_batch, labels)):
        mask = None if attention_mask is None else attention_mask[number]
        end = content_end(row, mask, pad_token_id, keep=stop_id)
        last = len(assistant_marker) - 1
        opened = [(place, place + last + 1) for place in pattern_starts(row[:end], assistant_marker).tolist()]
        for token in merged_ends:
            places = pattern_starts(row[:end], [*assistant_marker[:-1], token]).tolist()
            opened += [(place, place + last) for place in places]
        stops = (row[:end] == stop_id).nonzero().flatten() + 1
        position = 0
        for place, start in sorted(opened):
            if place >= position:  # a marker inside a turn is something that the model said
                after = int(torch.searchsorted(stops, start, right=True))
                position = int(stops[after]) if after < len(stops) else end
                out[start:position] = row[start:position]
    return labels


def turn_markers(processor: Any) -> Markers:
    """The tokens that open an assistant turn and the one that closes it: derived once per tokenizer and template.

    Args:
        processor: A processor, or a tokenizer. A processor's own template counts before its tokenizer's.

    Raises:
        ValueError: If the template does not tell.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    own = getattr(processor, "chat_template", None)
    template = own if isinstance(own, str) and own != getattr(tokenizer, "chat_template", None) else None
    by_name = bool(_IMSTART_TEMPLATE_PROCESSORS & {cls.__name__ for cls in type(processor).__mro__})
    key = (template or repr(getattr(tokenizer, "chat_template", None)), by_name)
    try:
        known = _KNOWN.setdefault(tokenizer, {})
    except TypeError:  # a tokenizer that cannot be referred to weakly
        known = {}
    if key not in known:
        try:
            known[key] = _find_markers(tokenizer, template, by_name)
        except Exception as error:  # a template raises what its author chose; the reason is kept instead
            known[key] = str(error) or type(error).__name__
    if isinstance(found := known[key], str):
        raise ValueError(found)
    return found


def _find_markers(tokenizer: Any, template: str | None, by_name: bool) -> Markers:
    if by_name:
        marker, stop = _get_assistant_marker(tokenizer), _get_stop_token_id(tokenizer)
        if marker is not None and stop is not None:
            return marker, stop
        _warn_once("a Qwen processor's tokenizer has no <|im_start|> and <|im_end|>: its template is asked instead")
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError(f"{type(tokenizer).__name__} has no chat template")
    return _derive_turn_markers(tokenizer, template)


def _derive_turn_markers(tokenizer: Any, chat_template: str | None = None) -> Markers:
    """Learns from the chat template what opens and what closes an assistant turn.

    A word that no one writes is rendered as the answer, and found again in the tokens. Where a template opens turns
    differently (an empty ``<think></think>`` in some, or after the generation prompt), the start that all have in
    common is the marker, so none is missed.

    Args:
        tokenizer: Has ``apply_chat_template``; tokens may come as a list, a dict, or transformers' BatchEncoding.
        chat_template: Template in place of the tokenizer's own.

    Returns:
        (tokens of the marker, token of the end).

    Raises:
        ValueError: If the answer is not printed, or nothing is printed before or behind it.
    """
    try:
        marker, stop = _markers_of(tokenizer, chat_template, as_parts=False)
    except Exception as error:  # templates raise what their authors chose; some take lists of parts only
        try:
            marker, stop = _markers_of(tokenizer, chat_template, as_parts=True)
        except Exception:
            raise ValueError(f"no markers in the chat template: {error}") from error
    if not marker or stop is None:
        raise ValueError(
            f"no markers in the chat template: nothing {'precedes' if not marker else 'follows'} an answer"
        )
    return marker, stop


def _markers_of(tokenizer: Any, chat_template: str | None, as_parts: bool) -> tuple[list[int], int | None]:
    """What precedes and what follows an answer; nothing, and ``None``, where there is nothing."""

    def render(*texts: str, prompt: bool = False) -> list[int]:
        roles = ("user", "assistant")
        messages = [
            {"role": roles[turn % 2], "content": [{"type": "text", "text": text}] if as_parts else text}
            for turn, text in enumerate(texts)
        ]
        options: dict[str, Any] = {} if chat_template is None else {"chat_template": chat_template}
        found = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, **options)
        if hasattr(found, "keys"):
            found = found["input_ids"]
        rows = found.tolist() if isinstance(found, Tensor) else list(found)
        return list(rows[0]) if rows and isinstance(rows[0], (list, tuple)) else rows

    question, answered = render("u"), render("u", _SENTINEL)
    header, rest = _around_sentinel(answered, tokenizer, len(question))
    others = []
    try:
        before_second, both = render("u", _SENTINEL, "u"), render("u", _SENTINEL, "u", _SENTINEL)
        others.append(_around_sentinel(both, tokenizer, len(question))[0])
        if both[: len(before_second)] == before_second:
            others.append(_around_sentinel(both, tokenizer, len(before_second))[0])
    except Exception as error:
        _log.debug("the template renders no second turn: %s", error)
    try:
        prompt = render("u", prompt=True)
        others += [prompt[len(question) :]] if prompt[: len(question)] == question else []
    except Exception as error:
        _log.debug("the template renders no generation prompt: %s", error)
    marker = header
    for other in others:
        marker = _common_start(marker, other) or marker
    return marker, rest[0] if rest else None


def _around_sentinel(ids: list[int], tokenizer: Any, start: int) -> tuple[list[int], list[int]]:
    """Tokens between ``start`` and the answer, and those behind the answer."""
    sentinel = list(tokenizer.encode(_SENTINEL, add_special_tokens=False))
    row = torch.tensor(ids)
    for skipped in (0, 1):  # the first token may differ in context, e.g. by a space
        found = [place for place in pattern_starts(row, sentinel[skipped:]).tolist() if place - skipped >= start]
        if found:
            return ids[start : found[0] - skipped], ids[found[0] - skipped + len(sentinel) :]
    raise ValueError("the answer's tokens are not in the rendered conversation")


def _common_start(first: list[int], second: list[int]) -> list[int]:
    length = next((i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))
    return first[:length]


def _get_assistant_marker(tokenizer: Any) -> list[int] | None:
    """``<|im_start|>assistant\\n`` as tokens; ``None`` where a tokenizer does not know the first of them.

    Args:
        tokenizer: The tokenizer.
    """
    start = _token_id(tokenizer, "<|im_start|>")
    return None if start is None else [start, *tokenizer.encode("assistant\n", add_special_tokens=False)]


def _get_stop_token_id(tokenizer: Any) -> int | None:
    """Id of ``<|im_end|>``; ``None`` where a tokenizer does not know it.

    Args:
        tokenizer: The tokenizer.
    """
    return _token_id(tokenizer, "<|im_end|>")


def _token_id(tokenizer: Any, token: str) -> int | None:
    try:
        found = tokenizer.convert_tokens_to_ids(token)
    except (AttributeError, KeyError):
        return None
    return found if isinstance(found, int) and found != getattr(tokenizer, "unk_token_id", None) else None


def _merged_ends(input_ids: Tensor, marker: Sequence[int], tokenizer: Any) -> list[int]:
    r"""Tokens behind all but the marker's last token that begin with its text, e.g. ``\n\n`` for ``\n``."""
    if len(marker) < 2 or not (text := _decode_single_token(tokenizer, marker[-1])) or not text.isspace():
        return []
    following = {
        int(row[place]) for row in input_ids for place in (pattern_starts(row[:-1], marker[:-1]) + len(marker) - 1)
    }
    return [token for token in following - {marker[-1]} if _decode_single_token(tokenizer, token).startswith(text)]


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    _log.warning(message)
