"""Conversation -> rendered turns, with the trained spans known by construction.

The chat template belongs to the tokenizer and is a black box. To learn which characters of its output come
from which turn, the conversation is also rendered with marker strings in place of the contents; what stands
between two markers is the template's, what replaces a marker is the turn's. No text is ever searched for
inside a user's content, so a short answer that also occurs in the question cannot be mistaken for it.

What stands around the markers is remembered for each order of roles. A conversation whose rendering is exactly that
with its contents in it costs one rendering, and one per answer for its prompt; one whose contents change what the
template prints costs a few per turn.

Trained is what the model must produce: each assistant turn after the prompt that it is given at inference, up
to and including its end token. Nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from lightning_vlm.schema import DataError

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


def render_turns(
    tokenizer: Any, messages: list[Message], source: str, template_kwargs: dict[str, Any] | None = None
) -> list[Span]:
    """Renders a conversation; joined, the spans equal the tokenizer's own rendering of it.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: The conversation, as made by `lightning_vlm.processing.messages`.
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
    marked = [{**message, "content": _marker(index)} for index, message in enumerate(messages)]
    frames = _FRAMES.setdefault(tokenizer, {})
    key = _frame_key(tokenizer, messages, template_kwargs)
    frame = frames.get(key)
    turns = frame and frame.around(messages, full)
    if not frame or not turns:
        # Made anew also where the contents did not fit: a template may print the time of day.
        frame = _make_frame(render, marked, tokenizer, source)
        if len(frames) >= _MAX_FRAMES:
            frames.clear()
        frames[key] = frame
        turns = frame.around(messages, full) or _turns_as_printed(render, messages, marked, frame.gaps, source)

    spans: list[Span] = []
    untrained = ""
    start = 0  # where this turn begins in the full text
    end_of_previous = 0  # characters of the gap before this turn that the previous turn's end token took
    for index, (message, turn) in enumerate(zip(messages, turns)):
        before, start = full[:start], start + len(turn)
        if message["role"] != "assistant":
            untrained += turn[end_of_previous:]
            end_of_previous = 0
            continue
        header = _header(render, messages[:index], marked[:index], before, frame.gaps[index], turn)
        end = frame.ends[index]
        spans.append(Span(untrained + header[end_of_previous:], trained=False))
        spans.append(Span(turn[len(header) :] + frame.gaps[index + 1][:end], trained=True))
        untrained, end_of_previous = "", end
    spans.append(Span(untrained + frame.gaps[-1][end_of_previous:], trained=False))

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


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template prints around the contents of one order of roles.

    Attributes:
        gaps: The texts before, between and after the contents: one more than there are turns.
        ends: Per turn, how many characters of the gap behind it are trained: those up to an answer's end token.
    """

    gaps: list[str]
    ends: list[int]

    def around(self, messages: list[Message], full: str) -> list[str] | None:
        """Each turn with the gap before it; ``None`` if ``full`` is not just the gaps with the contents in them."""
        turns = [gap + message["content"] for gap, message in zip(self.gaps, messages)]
        return turns if "".join(turns) + self.gaps[-1] == full else None


# Frames of each tokenizer that is alive, by what they depend on. An order of roles seldom comes alone: those of a
# data set are few, but a tool's calls can make any number of them.
_MAX_FRAMES = 256
_FRAMES: WeakKeyDictionary[Any, dict[Hashable, _Frame]] = WeakKeyDictionary()


def _frame_key(tokenizer: Any, messages: list[Message], template_kwargs: dict[str, Any] | None) -> Hashable:
    variables = dict(template_kwargs or {})
    template = variables.pop("chat_template", None) or tokenizer.chat_template
    return (
        template if isinstance(template, str) else repr(template),
        repr(variables),
        # Templates print special tokens, and turns end with one. All of them, a thousand, would take longer to list
        # than the template to render: added ones show in the length.
        repr(tokenizer.special_tokens_map),
        repr(tokenizer.all_special_tokens),
        len(tokenizer),
        tuple(message["role"] for message in messages),
    )


def _make_frame(render: Render, marked: list[Message], tokenizer: Any, source: str) -> _Frame:
    gaps, ends = _split(render(marked), marked, source), []
    for index, message in enumerate(marked):
        end = 0
        if message["role"] == "assistant":
            # What closes the turn as the last one: the next turn's first token must not pass for its end.
            closing = render(marked[: index + 1]).partition(message["content"])[2]
            end = _end_of_turn(_common_start(gaps[index + 1], closing), tokenizer, source)
        ends.append(end)
    return _Frame(gaps, ends)


def _turns_as_printed(
    render: Render, messages: list[Message], marked: list[Message], gaps: list[str], source: str
) -> list[str]:
    """Each turn with what stands before it, as the template prints it among markers."""
    turns = []
    for index, message in enumerate(messages):
        between = _between(render([*marked[:index], message, *marked[index + 1 :]]), marked, index, source)
        if not between.endswith(gaps[index + 1]):
            raise _coupled(source, index)
        turns.append(between[: len(between) - len(gaps[index + 1])])
    return turns


def _marker(index: int) -> str:
    # Letters and digits only, so that no template strips or escapes it; long enough not to occur in data.
    return f"turn{index}markerQz7Wk3Vx9Jp5"


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


def _split(rendered: str, marked: list[Message], source: str) -> list[str]:
    gaps, rest = [], rendered
    for index, marker in enumerate(message["content"] for message in marked):
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


def _between(rendered: str, marked: list[Message], index: int, source: str) -> str:
    """The text between the markers of the neighbouring turns."""
    if index > 0:
        _, found, rendered = rendered.partition(marked[index - 1]["content"])
        if not found:
            raise _coupled(source, index)
    if index + 1 < len(marked):
        rendered, found, _ = rendered.partition(marked[index + 1]["content"])
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
