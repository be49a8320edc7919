"""Any conversation, written in any format, means the same; and exactly its answers are trained on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import IGNORE_INDEX, ImageRef, Part, Text, Turn
from lightning_vlm.sources.formats import RowFormat, parse_row

PROCESSOR = tiny_processor()
# Text of any script, without the tokens that only a processor may write, and without half characters.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: not any(mark in text for mark in ("<", ">"))
)
images = st.builds(ImageRef, st.from_regex(r"[a-z]{1,6}\.png", fullmatch=True))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Turn, ...]:
    """Perhaps a system turn; then questions with images anywhere, each answered, perhaps after a tool spoke."""
    turns = [Turn("system", (Text(draw(texts)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        parts: list[Part] = draw(st.lists(texts.map(Text) | images, min_size=1, max_size=4))
        merged: list[Part] = []
        for part in parts:  # two texts in a row are one, in a format of tags
            if merged and isinstance(part, Text) and isinstance(merged[-1], Text):
                merged[-1] = Text(merged[-1].text + part.text)
            else:
                merged.append(part)
        turns.append(Turn("user", tuple(merged)))
        if draw(st.booleans()):
            turns.append(Turn("tool", (Text(draw(texts)),)))
        turns.append(Turn("assistant", (Text(draw(texts)),)))
    return tuple(turns)


def tagged(turn: Turn) -> str:
    return "".join(part.text if isinstance(part, Text) else "<image>" for part in turn.parts)


def written(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    refs = [part.ref for turn in turns for part in turn.parts if isinstance(part, ImageRef)]
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    inline = [
        [
            {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": part.ref}
            for part in turn.parts
        ]
        for turn in turns
    ]
    slots = [[{"type": "image"} if part["type"] == "image" else part for part in parts] for parts in inline]
    return [
        {"images": refs, "conversations": [{"from": names[turn.role], "value": tagged(turn)} for turn in turns]},
        {"images": refs, "messages": [{"role": turn.role, "content": tagged(turn)} for turn in turns]},
        {"messages": [{"role": turn.role, "content": parts} for turn, parts in zip(turns, inline)]},
        {"images": [{"path": ref, "bytes": None} for ref in refs], "messages": [
            {"role": turn.role, "content": parts} for turn, parts in zip(turns, slots)]},
    ]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(turns=conversations())
def test_every_format_means_the_same(turns: tuple[Turn, ...]) -> None:
    for row in written(turns):
        conversation = parse_row(json.loads(json.dumps(row)), "f:1")
        assert conversation.turns == turns
        assert conversation.notes == ()


@settings(max_examples=40, deadline=None)
@given(question=texts, answer=texts, names=st.lists(images, max_size=2))
def test_plain_columns_mean_the_same(question: str, answer: str, names: list[ImageRef]) -> None:
    layout = RowFormat(columns={"question": "q", "answer": "a", "image": "i"})
    row = {"q": question, "a": answer, "i": [image.ref for image in names]}
    asked, answered = parse_row(row, "f:1", layout).turns
    assert asked.parts == (*names, Text(question))
    assert answered.parts == (Text(answer),)


@settings(max_examples=60, deadline=None)
@given(turns=conversations())
def test_exactly_the_answers_are_trained_on(turns: tuple[Turn, ...]) -> None:
    conversation = parse_row(written(turns)[2], "f:1")
    pictures = [Image.new("RGB", (24, 16)) for _ in conversation.images]
    sample = PROCESSOR.encode(conversation, pictures)
    trained = PROCESSOR.tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX])
    assert trained == "".join(f"{turn.text}<|im_end|>" for turn in turns if turn.role == "assistant")
    size = PROCESSOR.measure(conversation, [(16, 24)] * len(pictures))
    assert (size.tokens, size.images) == (len(sample), len(pictures))
