"""A row of JSON -> Conversation, for the formats that people have.

Two are recognised by their key: ``messages`` (OpenAI and transformers: text or a list of parts, images inline or in an
``images`` list) and ``conversations`` (LLaVA, ShareGPT: ``from`` / ``value``, images in ``image`` or ``images``). A
``<image>`` tag in a text is a slot for the next listed image. Nothing is guessed: counts must agree, roles be known.
"""

from __future__ import annotations

from typing import Any

from lightning_vlm.schema import ROLES, Conversation, DataError, ImageRef, Part, Role, Text, Turn

IMAGE_TAG = "<image>"

_ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}


def parse_row(row: Any, source: str, needs_answer: bool = True) -> Conversation:
    """Reads one row.

    Args:
        row: The decoded JSON value.
        source: ``file:line``, for the conversation and every error.
        needs_answer: Whether an assistant turn is required (training and evaluation) or may be absent (prediction).

    Returns:
        The conversation. ``row["answers"]``, if present, lists the accepted answers to its last assistant turn.

    Raises:
        DataError: If the row is not an object of a known format, a role is unknown, images and ``<image>`` tags
            differ in number, or there is nothing to learn or to answer.
    """
    if not isinstance(row, dict):
        raise DataError(source, f"the row is {_kind(row)}, expected an object", "write one JSON object per line")
    row = {key: value for key, value in row.items() if value is not None}  # columns that other rows have
    if "messages" in row:
        raw, role_key, content_key = row["messages"], "role", "content"
    elif "conversations" in row:
        raw, role_key, content_key = row["conversations"], "from", "value"
    else:
        raise DataError(
            source,
            f"the row has the keys {sorted(row)}, expected 'messages' or 'conversations'",
            "rename the key that holds the turns",
        )
    if not isinstance(raw, list):
        raise DataError(source, f"the turns are {_kind(raw)}, expected a list", "write the turns as a list of objects")

    turns = tuple(_parse_turn(turn, number, role_key, content_key, source) for number, turn in enumerate(raw, start=1))
    turns = _fill_slots(turns, _listed_images(row, source), source)
    conversation = Conversation(turns, source, _references(row, source))
    _check(conversation, needs_answer)
    return conversation


def _parse_turn(turn: Any, number: int, role_key: str, content_key: str, source: str) -> Turn:
    if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
        found = f"the keys {sorted(turn)}" if isinstance(turn, dict) else _kind(turn)
        raise DataError(
            source, f"turn {number} is {found}, expected {role_key!r} and {content_key!r}", "write both keys"
        )
    role = _ROLE_NAMES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise DataError(
            source,
            f"turn {number} has the unknown role {turn[role_key]!r}, expected one of {', '.join(_ROLE_NAMES)}",
            "rename the role",
        )
    content = turn[content_key]
    if isinstance(content, str):
        parts = _split_text(content)
    elif isinstance(content, list):
        parts = [part for item in content for part in _parse_part(item, number, source)]
    else:
        raise DataError(
            source,
            f"the content of turn {number} ({role}) is {_kind(content)}, expected a text or a list of parts",
            "write the content as a text",
        )
    return Turn(role, tuple(parts))


# An image slot that a listed image fills; a reference cannot be empty, so this cannot be mistaken for one.
_SLOT = ImageRef("")


def _split_text(text: str) -> list[Part]:
    parts: list[Part] = []
    for index, piece in enumerate(text.split(IMAGE_TAG)):
        if index:
            parts.append(_SLOT)
        if piece:
            parts.append(Text(piece))
    return parts


def _parse_part(item: Any, number: int, source: str) -> list[Part]:
    if isinstance(item, str):
        return _split_text(item)
    if isinstance(item, dict):
        kind = item.get("type")
        if kind == "text" and isinstance(item.get("text"), str):
            return _split_text(item["text"])
        if kind in ("image", "image_url"):
            ref = next((item[key] for key in ("image", "image_url", "path", "url") if item.get(key) is not None), None)
            ref = ref.get("url") if isinstance(ref, dict) else ref
            if ref is None:
                return [_SLOT]
            if isinstance(ref, str) and ref:
                return [ImageRef(ref)]
    raise DataError(
        source,
        f"turn {number} has the part {_short(item)}, expected {{'type': 'text', 'text': ...}} or "
        "{'type': 'image', 'image': ...}",
        "rewrite the part (video and audio are not supported yet)",
    )


def _listed_images(row: dict[str, Any], source: str) -> list[ImageRef]:
    listed = row.get("images", row.get("image"))
    if listed is None:
        return []
    listed = listed if isinstance(listed, list) else [listed]
    refs = [item.get("path") if isinstance(item, dict) else item for item in listed]
    images = []
    for ref in refs:
        if not isinstance(ref, str) or not ref:
            raise DataError(source, f"an entry of its image list is {_short(ref)}, expected a path", "name a file")
        images.append(ImageRef(ref))
    return images


def _fill_slots(turns: tuple[Turn, ...], images: list[ImageRef], source: str) -> tuple[Turn, ...]:
    slots = sum(part is _SLOT for turn in turns for part in turn.parts)
    if slots != len(images):
        raise DataError(
            source,
            f"the turns have {slots} {IMAGE_TAG} slot(s) and the row lists {len(images)} image(s), expected as many",
            f"write one {IMAGE_TAG} per listed image, where the image belongs",
        )
    remaining = iter(images)
    return tuple(
        Turn(turn.role, tuple(next(remaining) if part is _SLOT else part for part in turn.parts)) for turn in turns
    )


def _references(row: dict[str, Any], source: str) -> tuple[str, ...]:
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(source, f"'answers' is {_short(answers)}, expected a list of texts", "write a list of texts")
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
            ) from error
    if not turns:
        raise DataError(source, "the conversation is empty, expected at least one turn", "add turns or remove the row")
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    for index in answers:
        if any(isinstance(part, ImageRef) for part in turns[index].parts):
            raise DataError(
                source,
                f"turn {index + 1} (assistant) holds an image, expected images in user turns only",
                "move the image into the user's turn",
            )
    if not needs_answer:
        return
    if not answers:
        raise DataError(
            source,
            f"the {len(turns)} turn(s) hold no assistant turn, expected one to learn from",
            "add the answer or remove the row",
        )
    if any(isinstance(part, ImageRef) for turn in turns[answers[-1] + 1 :] for part in turn.parts):
        raise DataError(
            source,
            "an image follows the last assistant turn, where nothing is learned from it",
            "add the answer to it or remove that turn",
        )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
