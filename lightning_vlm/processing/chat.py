"""Conversation -> rendered turns, with the trained spans known by construction.

The chat template belongs to the tokenizer and is a black box. To learn which characters of its output come
from which turn, the conversation is also rendered with marker strings in place of the contents; what stands
between two markers is the template's, what replaces a marker is the turn's. No text is ever searched for
inside a user's content, so a short answer that also occurs in the question cannot be mistaken for it. It
costs a few small renderings per turn.

Trained is what the model must produce: each assistant turn after the prompt that it is given at inference, up
to and including its end token. Nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_vlm.schema import Conversation, DataError, Text

Message = dict[str, str]
Render = Callable[..., str]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rendered text.

    Attributes:
        text: The characters, image placeholders included.
        trained: Whether the loss is taken on them.
    """

    text: str
    trained: bool


def to_messages(conversation: Conversation, image_token: str, reserved: Sequence[str] = ()) -> list[Message]:
    """Chat-template messages: each turn's parts joined verbatim, every image as one ``image_token``.

    Args:
        conversation: The conversation.
        image_token: The tokenizer's image placeholder.
        reserved: Further tokens that only the processor and the template may write.

    Raises:
        DataError: If a text contains one of these tokens, which would then stand for an image or end a turn.
    """
    messages = []
    for number, turn in enumerate(conversation.turns, start=1):
        for part in turn.parts:
            for token in (image_token, *reserved):
                if isinstance(part, Text) and token in part.text:
                    stands_for = "stands for an image" if token == image_token else "is a control token of the model"
                    raise DataError(
                        conversation.source,
                        f"the text of turn {number} ({turn.role}) contains {token!r}, which {stands_for}, "
                        "expected plain text",
                        "give the row one image per placeholder, or write the word differently",
                    )
        content = "".join(part.text if isinstance(part, Text) else image_token for part in turn.parts)
        messages.append({"role": turn.role, "content": content})
    return messages


def render_turns(
    tokenizer: Any, messages: list[Message], source: str, template_kwargs: dict[str, Any] | None = None
) -> list[Span]:
    """Renders a conversation; joined, the spans equal the tokenizer's own rendering of it.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: The conversation, as made by `to_messages`.
        source: ``file:line`` of the row, for the error.
        template_kwargs: Extra template variables, e.g. ``{"enable_thinking": False}``.

    Returns:
        Untrained and trained spans in order; each trained span is one assistant turn with its end token.

    Raises:
        DataError: If the template refuses the conversation, leaves out a turn, or ends a turn without an end
            token.
    """
    render = _renderer(tokenizer, source, template_kwargs)
    full = render(messages)
    markers = [f"turn{index}marker{_NONCE}" for index in range(len(messages))]
    marked = [{**message, "content": marker} for message, marker in zip(messages, markers)]
    gaps = _split(render(marked), markers, source)

    spans: list[Span] = []
    untrained = ""
    start = 0  # where this turn begins in the full text
    end_of_previous = 0  # characters of the gap before this turn that the previous turn's end token took
    for index, message in enumerate(messages):
        one_real = [*marked[:index], message, *marked[index + 1 :]]
        between = _between(render(one_real), markers, index, source)
        if not between.endswith(gaps[index + 1]):
            raise _coupled(source, index)
        turn = between[: len(between) - len(gaps[index + 1])]  # the template's header, then the content
        before, start = full[:start], start + len(turn)
        if message["role"] != "assistant":
            untrained += turn[end_of_previous:]
            end_of_previous = 0
            continue
        header = _header(render, messages[:index], marked[:index], before, gaps[index], turn)
        # What closes the turn as the last one: the next turn's first token must not pass for its end.
        closing = render(marked[: index + 1]).partition(markers[index])[2]
        end = _end_of_turn(_common_start(gaps[index + 1], closing), tokenizer, source)
        spans.append(Span(untrained + header[end_of_previous:], trained=False))
        spans.append(Span(turn[len(header) :] + gaps[index + 1][:end], trained=True))
        untrained, end_of_previous = "", end
    spans.append(Span(untrained + gaps[-1][end_of_previous:], trained=False))

    if "".join(span.text for span in spans) != full:
        raise _coupled(source, len(messages) - 1)
    return [span for span in spans if span.text]


def render_text(
    tokenizer: Any,
    messages: list[Message],
    source: str,
    template_kwargs: dict[str, Any] | None,
    known: set[tuple[str, ...]],
) -> str:
    """Renders a conversation once: the text that `render_turns` returns in spans, for its length.

    What `render_turns` checks depends on the template and the order of the roles, so it is checked at the first
    conversation of each order. Only contents that change what the template prints elsewhere are missed: such a row
    is refused when it is encoded.

    Args:
        tokenizer: As for `render_turns`.
        messages: As for `render_turns`.
        source: As for `render_turns`.
        template_kwargs: As for `render_turns`.
        known: The orders that were checked under this template and these variables; this one is added to it.

    Raises:
        DataError: As for `render_turns`.
    """
    roles = tuple(message["role"] for message in messages)
    if roles in known:
        return _renderer(tokenizer, source, template_kwargs)(messages)
    text = "".join(span.text for span in render_turns(tokenizer, messages, source, template_kwargs))
    known.add(roles)
    return text


def render_prompt(
    tokenizer: Any, messages: list[Message], source: str, template_kwargs: dict[str, Any] | None = None
) -> str:
    """Renders a conversation up to where the model answers.

    Args:
        tokenizer: As for `render_turns`.
        messages: As for `render_turns`; the last one is not the assistant's.
        source: As for `render_turns`.
        template_kwargs: As for `render_turns`.

    Raises:
        DataError: If the template refuses the conversation.
    """
    return _renderer(tokenizer, source, template_kwargs)(messages, add_generation_prompt=True)


# Letters and digits only, so that no template strips or escapes it; long enough not to occur in data.
_NONCE = "Qz7Wk3Vx9Jp5"


def _renderer(tokenizer: Any, source: str, template_kwargs: dict[str, Any] | None) -> Render:
    def render(messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(template_kwargs or {}),
            )
        except Exception as error:  # Jinja raises what the template's author chose
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split()).rstrip(".")
            raise DataError(
                source,
                f"the chat template refuses the turns ({roles}): {reason}",
                "change the order of the roles or the tokenizer's chat_template",
            ) from error

    return render


def _split(rendered: str, markers: list[str], source: str) -> list[str]:
    gaps, rest = [], rendered
    for index, marker in enumerate(markers):
        if rendered.count(marker) != 1:
            raise DataError(
                source,
                f"the chat template prints turn {index + 1} {rendered.count(marker)} times, expected once",
                "remove that turn or change the tokenizer's chat_template",
            )
        before, found, rest = rest.partition(marker)
        if not found:
            raise _coupled(source, index)
        gaps.append(before)
    return [*gaps, rest]


def _between(rendered: str, markers: list[str], index: int, source: str) -> str:
    """The text between the markers of the neighbouring turns."""
    if index > 0:
        _, found, rendered = rendered.partition(markers[index - 1])
        if not found:
            raise _coupled(source, index)
    if index + 1 < len(markers):
        rendered, found, _ = rendered.partition(markers[index + 1])
        if not found:
            raise _coupled(source, index)
    return rendered


def _header(render: Render, earlier: list[Message], marked: list[Message], before: str, gap: str, turn: str) -> str:
    """The start of an assistant turn that the model is given at inference."""
    if not earlier:  # nothing is asked before the first turn, and transformers renders no empty conversation
        prompt = gap
    else:  # of the real turns, because they can choose its end (/no_think in the 12B model's template)
        prompt = render(earlier, add_generation_prompt=True)
        if prompt.startswith(before):
            prompt = prompt[len(before) :]
        else:  # the earlier turns read differently before this one is there: their thinking is not cut yet
            prompt = render(marked, add_generation_prompt=True).partition(marked[-1]["content"])[2]
    return prompt if turn.startswith(prompt) else _common_start(prompt, gap, turn)


def _common_start(*texts: str) -> str:
    """The longest text that all of ``texts`` start with."""
    length = next((i for i, letters in enumerate(zip(*texts)) if len(set(letters)) > 1), min(map(len, texts)))
    return texts[0][:length]


def _end_of_turn(gap: str, tokenizer: Any, source: str) -> int:
    """Length of the start of ``gap`` that ends with its first special token."""
    ends = [
        (position, position + len(token)) for token in special_tokens(tokenizer) if (position := gap.find(token)) >= 0
    ]
    if not ends:
        raise DataError(
            source,
            f"the chat template ends an assistant turn with {gap[:40]!r}, expected a special token to stop at",
            "add an end-of-turn token to the tokenizer and its chat_template",
        )
    return min(ends, key=lambda end: (end[0], -end[1]))[1]


def special_tokens(tokenizer: Any) -> set[str]:
    """Every special token of a tokenizer as text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _coupled(source: str, index: int) -> DataError:
    return DataError(
        source,
        f"the chat template renders turn {index + 1} differently depending on what other turns say, "
        "so the trained tokens cannot be told apart",
        "shorten the conversation before that turn or change the tokenizer's chat_template",
    )
