"""Media in a row: slots in the texts, lists beside them, and how one fills the other.

A slot is a tag in a text (``<image>``) or a part that names no file; listed media fill slots in reading order. Counts
must agree. One repair is made: a single image without a slot goes before the first user turn, which is noted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_vlm.schema import AudioRef, DataError, ImageRef, MediaRef, Part, Text, Turn, VideoRef

IMAGE_TAG = "<image>"
PLACED_NOTE = "image placed before the first user turn"


@dataclass(frozen=True, slots=True)
class MediaKind:
    """How a kind of media is written: its slot in texts, the keys of its list, the types of its parts."""

    name: str
    make: type[ImageRef] | type[VideoRef] | type[AudioRef]
    tag: str
    lists: tuple[str, ...]
    parts: tuple[str, ...]
    refs: tuple[str, ...]


IMAGE = MediaKind(
    "image", ImageRef, IMAGE_TAG, ("images", "image"), ("image", "image_url"), ("image", "image_url", "path", "url")
)
VIDEO = MediaKind(
    "video", VideoRef, "<video>", ("videos", "video"), ("video", "video_url"), ("video", "video_url", "path", "url")
)
AUDIO = MediaKind(
    "audio",
    AudioRef,
    "<audio>",
    ("audios", "audio"),
    ("audio", "audio_url", "input_audio"),
    ("audio", "audio_url", "input_audio", "path", "url"),
)
MEDIA_KINDS = (IMAGE, VIDEO, AUDIO)


# Slots that a listed medium fills, told by identity; a reference cannot be None, so they cannot be mistaken for one.
SLOTS: dict[str, MediaRef] = {kind.name: kind.make(None) for kind in MEDIA_KINDS}


def split_text(text: str, tags: list[MediaKind]) -> list[Part]:
    """A text cut at its tags, each of which becomes a slot.

    Args:
        text: The text.
        tags: The kinds whose tags are slots; others stay text.
    """
    parts: list[Part] = [Text(text)] if text else []
    for kind in tags:
        if kind.tag in text:
            parts = [piece for part in parts for piece in _split_part(part, kind)]
    return parts


def _split_part(part: Part, kind: MediaKind) -> list[Part]:
    if not isinstance(part, Text):
        return [part]
    pieces: list[Part] = []
    for index, piece in enumerate(part.text.split(kind.tag)):
        if index:
            pieces.append(SLOTS[kind.name])
        if piece:
            pieces.append(Text(piece))
    return pieces


def reference(given: Any, kind: MediaKind) -> Any:
    """What a medium is looked up by, or the medium itself; ``None`` if it is neither.

    Args:
        given: As it stands in the row: a name, ``{"path": ...}``, ``{"bytes": ...}``, bytes, a decoded image, frames.
        kind: Of which kind it is meant to be.
    """
    if isinstance(given, dict):
        if kind is AUDIO and isinstance(given.get("data"), str):  # OpenAI's input_audio: base64 and its format
            return f"data:audio/{given.get('format', 'wav')};base64,{given['data']}"
        if kind is AUDIO and given.get("array") is not None and "sampling_rate" in given:
            return given["array"], given["sampling_rate"]
        given = next((given[key] for key in ("bytes", "url", "path") if not _is_blank(given.get(key))), None)
    if isinstance(given, (list, tuple)) and kind is VIDEO:  # frames
        frames = tuple(reference(frame, IMAGE) for frame in given)
        return frames if frames and all(frame is not None for frame in frames) else None
    if isinstance(given, (list, tuple, int, float, bool)) or given is None:
        return None
    return None if _is_blank(given) else given


def _is_blank(value: Any) -> bool:
    """Whether an entry says nothing: cells of images that were not embedded have empty bytes, or none, and a path."""
    return value is None or (isinstance(value, (str, bytes)) and not value)


def listed_media(row: dict[str, Any], kind: MediaKind, source: str) -> list[MediaRef]:
    """The media that a row lists beside its turns.

    Args:
        row: The row.
        kind: Which list.
        source: ``file:line``, for the error.

    Raises:
        DataError: If an entry names nothing.
    """
    listed = next((row[key] for key in kind.lists if key in row), None)
    if listed is None:
        return []
    if not isinstance(listed, (list, tuple)):
        listed = [listed]
    refs = [reference(item, kind) for item in listed]
    for item, ref in zip(listed, refs):
        if ref is None:
            raise DataError(
                source,
                f"an entry of its {kind.name} list is {short(item)}, expected a path",
                "name a file",
                f"unknown {kind.name} reference",
            )
    return [kind.make(ref) for ref in refs]


def place_single_image(turns: tuple[Turn, ...], images: list[MediaRef]) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Gives a slot to a row's only image where no text says where it belongs and a user turn can take it."""
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    slots = sum(part is SLOTS["image"] for turn in turns for part in turn.parts)
    if slots or len(images) != 1 or not users:
        return turns, ()
    first = turns[users[0]]
    placed = Turn(first.role, (SLOTS["image"], *first.parts))
    return (*turns[: users[0]], placed, *turns[users[0] + 1 :]), (PLACED_NOTE,)


def fill_slots(turns: tuple[Turn, ...], media: list[MediaRef], kind: MediaKind, source: str) -> tuple[Turn, ...]:
    """The turns with every slot of a kind filled, in reading order.

    Args:
        turns: The turns.
        media: As many as there are slots.
        kind: The kind.
        source: ``file:line``, for the error.

    Raises:
        DataError: If there are more slots than media, or fewer.
    """
    slot = SLOTS[kind.name]
    slots = sum(part is slot for turn in turns for part in turn.parts)
    if slots != len(media):
        raise DataError(
            source,
            f"the turns have {slots} {kind.tag} slot(s) and the row lists {len(media)} {kind.name}(s), "
            "expected as many",
            f"write one {kind.tag} per listed {kind.name}, where the {kind.name} belongs",
            f"{kind.name} slots and {kind.name}s differ",
        )
    if not slots:
        return turns
    remaining = iter(media)
    return tuple(
        Turn(turn.role, tuple(next(remaining) if part is slot else part for part in turn.parts)) for turn in turns
    )


def kind_of(value: Any) -> str:
    """What a value of a row is called."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def short(value: Any) -> str:
    """A value of a row in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
