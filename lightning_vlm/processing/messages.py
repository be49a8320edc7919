"""Conversation -> messages for a chat template: text verbatim, one placeholder per medium."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlm.processing.chat import Message
from lightning_vlm.processing.pieces import MediaTokens
from lightning_vlm.schema import AudioRef, Conversation, DataError, ImageRef, Text, VideoRef

_NAMES = {ImageRef: "an image", VideoRef: "a video", AudioRef: "a sound"}


def to_messages(conversation: Conversation, tokens: MediaTokens, reserved: Sequence[str] = ()) -> list[Message]:
    """Chat-template messages: each turn's parts joined verbatim, every medium as its placeholder.

    Args:
        conversation: The conversation.
        tokens: Placeholders.
        reserved: Further tokens that only the processor and the template may write.

    Raises:
        DataError: If a text contains one of these tokens, which would then stand for a medium or end a turn.
    """
    placeholders = {ImageRef: tokens.image, VideoRef: tokens.video, AudioRef: tokens.sound}
    stands_for = {token: f"stands for {_NAMES[kind]}" for kind, token in placeholders.items()}
    if not any(isinstance(medium, VideoRef) for medium in conversation.media):
        del stands_for[tokens.video]  # no token of the model: without a video it is a word like others
    forbidden = {**dict.fromkeys(reserved, "is a control token of the model"), **stands_for}
    messages = []
    for number, turn in enumerate(conversation.turns, start=1):
        for part in turn.parts:
            for token, meaning in forbidden.items():
                if isinstance(part, Text) and token in part.text:
                    raise DataError(
                        conversation.source,
                        f"the text of turn {number} ({turn.role}) contains {token!r}, which {meaning}, "
                        "expected plain text",
                        "give the row one medium per placeholder, or write the word differently",
                    )
        content = "".join(part.text if isinstance(part, Text) else placeholders[type(part)] for part in turn.parts)
        messages.append({"role": turn.role, "content": content})
    return messages


def last_answer(conversation: Conversation) -> tuple[str, ...]:
    """The text of the last assistant turn; nothing without one.

    Args:
        conversation: The conversation.
    """
    return tuple(turn.text for turn in conversation.turns if turn.role == "assistant")[-1:]
