"""A row -> Conversation, for the formats that people have.

Three are told apart by their key or by name: ``messages`` (OpenAI, Hugging Face: text or a list of parts),
``conversations`` (LLaVA, ShareGPT: ``from`` / ``value``), and plain columns that the user maps. Nothing is guessed:
roles must be known, media and their slots agree in number (`slots`), and there must be something to learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from lightning_vlm.schema import ROLES, Conversation, DataError, MediaRef, Part, Role, Text, Turn, VideoRef
from lightning_vlm.sources.slots import (
    IMAGE,
    MEDIA_KINDS,
    SLOTS,
    VIDEO,
    MediaKind,
    fill_slots,
    kind_of,
    listed_media,
    place_single_image,
    reference,
    short,
    split_text,
)

_FORMATS = {
    "messages": "messages",
    "openai": "messages",
    "hf": "messages",
    "conversations": "conversations",
    "llava": "conversations",
    "sharegpt": "conversations",
    "columns": "columns",
}
_COLUMNS = ("question", "answer", "answers", "system", "image", "video", "audio")

_ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of a source are to be read.

    Attributes:
        name: ``auto`` (by the row's key), ``messages`` (or ``openai``, ``hf``), ``conversations`` (or ``llava``,
            ``sharegpt``), or ``columns``.
        columns: What stands where in plain columns: ``question``, ``answer``, ``answers``, ``system``, ``image``,
            ``video``, ``audio`` -> name of the column.
        prompt: What is asked in every row of plain columns without a question.
        needs_answer: Whether each row must hold an assistant turn (training and evaluation).

    Raises:
        ValueError: If the name or a mapped column is unknown, or the columns hold nothing to ask.
    """

    name: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    needs_answer: bool = True

    def __post_init__(self) -> None:
        if self.name != "auto" and self.name not in _FORMATS:
            raise ValueError(f"format={self.name!r} is unknown; expected auto or one of {', '.join(_FORMATS)}")
        if unknown := sorted(set(self.columns) - set(_COLUMNS)):
            raise ValueError(f"columns maps {', '.join(unknown)}, which is unknown; expected {', '.join(_COLUMNS)}")
        if self.kind == "columns" and "question" not in self.columns and self.prompt is None:
            raise ValueError("plain columns hold nothing to ask; map columns.question or set prompt")

    @property
    def kind(self) -> str:
        """``auto``, ``messages``, ``conversations`` or ``columns``; mapped columns are reason enough for the last."""
        if self.name == "auto":
            return "columns" if self.columns or self.prompt is not None else "auto"
        return _FORMATS[self.name]


def parse_row(row: Any, source: str, layout: RowFormat | None = None) -> Conversation:
    """Reads one row.

    Args:
        row: The decoded value, as of JSON; images may be bytes or decoded where the source has them so.
        source: ``file:line``, for the conversation and every error.
        layout: How to read it.

    Returns:
        The conversation. ``row["answers"]``, if present, lists the accepted answers to its last assistant turn.

    Raises:
        DataError: If the row is not an object of a known format, a role is unknown, media and slots differ in number,
            or there is nothing to learn or to answer.
    """
    layout = layout or RowFormat()
    if not isinstance(row, dict):
        raise DataError(
            source, f"the row is {kind_of(row)}, expected an object", "write one object per row", "no object"
        )
    _check_mapped(row, layout, source)
    # Columns that other rows have are null here, or NaN where a table was written by pandas.
    row = {key: value for key, value in row.items() if value is not None and not _is_nan(value)}
    if layout.kind == "columns":
        row = _from_columns(row, layout, source)
    if "messages" in row and layout.kind != "conversations":
        raw, role_key, content_key = row["messages"], "role", "content"
    elif "conversations" in row and layout.kind in ("auto", "conversations"):
        raw, role_key, content_key = row["conversations"], "from", "value"
        if (
            isinstance(raw, list) and isinstance(row.get("system"), str) and row["system"]
        ):  # beside the turns, in ShareGPT
            raw = [{"from": "system", "value": row["system"]}, *raw]
    else:
        expected = "'messages' or 'conversations'" if layout.kind == "auto" else repr(layout.kind)
        raise DataError(
            source,
            f"the row has the keys {short(sorted(row, key=str))}, expected {expected}",
            "rename the key that holds the turns, or map plain columns (columns: {question: ..., answer: ...})",
            "unknown format",
        )
    if not isinstance(raw, list):
        raise DataError(
            source, f"the turns are {kind_of(raw)}, expected a list", "write the turns as a list of objects", "no turns"
        )
    listed = {kind.name: listed_media(row, kind, source) for kind in MEDIA_KINDS}
    # <video> and <audio> are also HTML: they are slots only where the row lists such media.
    tags = [kind for kind in MEDIA_KINDS if kind is IMAGE or listed[kind.name]]
    turns = tuple(
        _parse_turn(turn, number, role_key, content_key, tags, source) for number, turn in enumerate(raw, start=1)
    )
    turns, notes = place_single_image(turns, listed["image"])
    for kind in MEDIA_KINDS:
        turns = fill_slots(turns, listed[kind.name], kind, source)
    conversation = Conversation(turns, source, _references(row, source), notes)
    _check(conversation, layout.needs_answer)
    return conversation


def _check_mapped(row: dict[str, Any], layout: RowFormat, source: str) -> None:
    """A mapped medium may be null in a row, but a table without its column would be trained on without its media."""
    for kind in MEDIA_KINDS:
        column = layout.columns.get(kind.name)
        if column is not None and column not in row:
            raise DataError(
                source,
                f"the row has the keys {short(sorted(row, key=str))}, expected {column!r} for the {kind.name}",
                f"correct columns.{kind.name}; a row without one has null there",
                "missing column",
            )


def _from_columns(row: dict[str, Any], layout: RowFormat, source: str) -> dict[str, Any]:
    """The same row as messages."""
    found = {}
    for name, column in layout.columns.items():
        if column in row:
            found[name] = row[column]
        elif name in ("question", "answer") and (name != "answer" or layout.needs_answer):
            raise DataError(
                source,
                f"the row has the keys {short(sorted(row, key=str))}, expected {column!r} for the {name}",
                f"correct columns.{name}, or fill in the column",
                "missing column",
            )
    question = found.get("question", layout.prompt)
    content: list[Any] = []
    for kind in MEDIA_KINDS:
        media = found.get(kind.name)
        content += [{"type": kind.name}] * (len(media) if isinstance(media, (list, tuple)) else int(media is not None))
    for name, value in (
        ("question", question),
        ("answer", found.get("answer", "")),
        ("system", found.get("system", "")),
    ):
        if (
            not isinstance(value, (str, int, float))
            or isinstance(value, bool)
            or value in (float("inf"), -float("inf"))
        ):
            column = layout.columns.get(name, name)
            raise DataError(
                source,
                f"the column {column!r} is {kind_of(value)}, expected the {name} as a text",
                "map another column",
                "column of another type",
            )
    content.append(Text(str(question)))  # no tag in a plain column is a slot
    messages = [{"role": "user", "content": content}]
    if "system" in found:
        messages.insert(0, {"role": "system", "content": str(found["system"])})
    if "answer" in found:
        messages.append({"role": "assistant", "content": [Text(str(found["answer"]))]})
    media = {kind.lists[0]: found[kind.name] for kind in MEDIA_KINDS if kind.name in found}
    answers = {"answers": found["answers"]} if "answers" in found else {}
    return {"messages": messages, **media, **answers}


def _parse_turn(turn: Any, number: int, role_key: str, content_key: str, tags: list[MediaKind], source: str) -> Turn:
    if isinstance(turn, dict) and role_key not in turn and "role" in turn:  # a dialect of ShareGPT
        role_key, content_key = "role", "content"
    if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
        found = f"has the keys {short(sorted(turn, key=str))}" if isinstance(turn, dict) else f"is {kind_of(turn)}"
        raise DataError(
            source,
            f"turn {number} {found}, expected {role_key!r} and {content_key!r}",
            "write both keys",
            "incomplete turn",
        )
    role = _ROLE_NAMES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise DataError(
            source,
            f"turn {number} has the unknown role {short(turn[role_key])}, expected one of {', '.join(_ROLE_NAMES)}",
            "rename the role",
            "unknown role",
        )
    for key in ("tool_calls", "function_call", "reasoning_content"):
        if turn.get(key):
            raise DataError(
                source,
                f"turn {number} ({role}) has {key!r}, expected all that is said in {content_key!r}",
                "write it into the content, as the text that the model should write",
                "part of a turn that is not text",
            )
    content = turn[content_key]
    if isinstance(content, str):
        parts = split_text(content, tags)
    elif isinstance(content, list):
        parts = [part for item in content for part in _parse_part(item, number, tags, source)]
    else:
        raise DataError(
            source,
            f"the content of turn {number} ({role}) is {kind_of(content)}, expected a text or a list of parts",
            "write the content as a text (a tool call as the text that the model should write)",
            "content of another type",
        )
    return Turn(role, tuple(parts))


def _parse_part(item: Any, number: int, tags: list[MediaKind], source: str) -> list[Part]:
    if isinstance(item, Text):
        return [item] if item.text else []
    if isinstance(item, str):
        return split_text(item, tags)
    if isinstance(item, dict):
        item = {key: value for key, value in item.items() if value is not None}
        form, text = item.get("type"), item.get("text")
        if form == "text" and isinstance(text, str):
            return split_text(text, tags)
        for kind in MEDIA_KINDS:
            if form in kind.parts:
                given = next((item[key] for key in kind.refs if key in item), None)
                if given is None:
                    return [SLOTS[kind.name]]
                if (ref := reference(given, kind)) is not None:
                    return [_video(ref, item, number, source) if kind is VIDEO else kind.make(ref)]
    raise DataError(
        source,
        f"turn {number} has the part {short(item)}, expected {{'type': 'text', 'text': ...}} or "
        "{'type': 'image', 'image': ...} (or video, audio)",
        "rewrite the part",
        "unknown part",
    )


def _video(ref: Any, item: dict[str, Any], number: int, source: str) -> VideoRef:
    """A video part, whose ``fps`` is that of its frames or, as in Qwen's rows, what is to be taken of its file."""
    rate = item.get("fps")
    if rate is None:
        return VideoRef(ref)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise DataError(
            source,
            f"a video of turn {number} has the fps {short(rate)}, expected frames per second above 0",
            "correct it, or leave it out",
            "bad frame rate",
        )
    has_frames = isinstance(ref, tuple) or hasattr(ref, "ndim")
    return VideoRef(ref, fps=float(rate)) if has_frames else VideoRef(ref, sampling_fps=float(rate))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _references(row: dict[str, Any], source: str) -> tuple[str, ...]:
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(
            source, f"'answers' is {short(answers)}, expected a list of texts", "write a list of texts", "bad answers"
        )
    return tuple(answers)


def _check(conversation: Conversation, needs_answer: bool) -> None:
    source, turns = conversation.source, conversation.turns
    for number, turn in enumerate(turns, start=1):
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                source,
                f"turn {number} ({turn.role}) holds half of a character ({error.object[error.start]!r}), expected text",
                "remove it: an emoji was cut in two",
                "half a character",
            ) from error
    if not turns:
        raise DataError(
            source,
            "the conversation is empty, expected at least one turn",
            "add turns or remove the row",
            "empty conversation",
        )
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for index in answers:
        if medium := next((part for part in turns[index].parts if isinstance(part, get_args(MediaRef))), None):
            name = next(kind.name for kind in MEDIA_KINDS if isinstance(medium, kind.make))
            article = "a" if name == "video" else "an"
            raise DataError(
                source,
                f"turn {index + 1} (assistant) holds {article} {name}, expected {name}s in user turns only",
                f"move the {name} into the user's turn",
                "media in an answer",
            )
    if not needs_answer:
        return
    if not answers:
        raise DataError(
            source,
            f"the {len(turns)} turn(s) hold no assistant turn, expected one to learn from",
            "add the answer or remove the row",
            "no answer",
        )
    if not any(turns[index].text for index in answers):
        raise DataError(
            source,
            "every answer is empty, expected one to learn from",
            "add the answer or remove the row",
            "no answer",
        )
    if any(isinstance(part, get_args(MediaRef)) for turn in turns[answers[-1] + 1 :] for part in turn.parts):
        raise DataError(
            source,
            "an image follows the last assistant turn, where nothing is learned from it",
            "add the answer to it or remove that turn",
            "no answer",
        )
