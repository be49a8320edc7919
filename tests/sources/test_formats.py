"""Rows of every accepted form become the same Conversation; wrong rows are told in one sentence with their place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_vlm.schema import DataError, ImageRef, Text, Turn, VideoRef
from lightning_vlm.sources.formats import RowFormat, parse_row
from lightning_vlm.sources.json_files import JsonSource
from lightning_vlm.sources.open import open_sources

ASK = Turn("user", (ImageRef("a.png"), Text("\nWhat?")))
SAY = Turn("assistant", (Text("This."),))
USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "ho"}

SAME = {
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
    },
    "llava, image list": {
        "images": ["a.png"],
        "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "This."}],
    },
    "openai, text": {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}],
    },
    "openai, inline image": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        ]
    },
    "openai, image_url": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "\nWhat?"}],
            },
            {"role": "assistant", "content": "This."},
        ]
    },
    "transformers, slot and list of dicts": {
        "images": [{"path": "a.png"}],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "This."},
        ],
    },
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_every_form_means_the_same(row: dict[str, Any]) -> None:
    assert parse_row(row, "f:1").turns == (ASK, SAY)


def test_images_fill_slots_in_reading_order_across_turns() -> None:
    row = {
        "images": ["1.png", "2.png", "3.png"],
        "messages": [
            {"role": "user", "content": "a<image>b<image>"},
            BOT,
            {"role": "user", "content": "<image>c"},
            BOT,
        ],
    }
    conversation = parse_row(row, "f:1")
    assert [image.ref for image in conversation.images] == ["1.png", "2.png", "3.png"]
    assert conversation.turns[0].parts == (Text("a"), ImageRef("1.png"), Text("b"), ImageRef("2.png"))


def test_inline_and_listed_images_mix() -> None:
    content = [{"type": "image", "image": "inline.png"}, {"type": "image"}, {"type": "text", "text": "<image>"}]
    row = {"images": ["1.png", "2.png"], "messages": [{"role": "user", "content": content}, BOT]}
    assert [image.ref for image in parse_row(row, "f:1").images] == ["inline.png", "1.png", "2.png"]


def test_sharegpt_with_the_keys_of_openai_is_read() -> None:
    assert parse_row({"conversations": [USER, BOT]}, "f:1").turns == parse_row({"messages": [USER, BOT]}, "f:1").turns


def test_null_columns_are_absent_columns() -> None:
    row = {**SAME["llava"], "images": None, "messages": None, "answers": None}
    assert parse_row(row, "f:1").turns == (ASK, SAY)
    inline = [{"type": "image", "image": None, "url": "a.png"}, {"type": "text", "text": "\nWhat?"}]
    assert parse_row({"messages": [{"role": "user", "content": inline}, BOT]}, "f:1").turns[0] == ASK


def test_answers_are_references() -> None:
    assert parse_row({"messages": [USER, BOT], "answers": ["ho", "HO"]}, "f:1").references == ("ho", "HO")


def test_prediction_needs_no_answer() -> None:
    assert parse_row({"messages": [USER]}, "f:1", RowFormat(needs_answer=False)).turns[0].text == "hi"


def read_all(path: Path) -> None:
    (source,) = open_sources([path])
    for index in range(len(source)):
        source.conversation(index)


BAD: dict[str, tuple[Any, list[str]]] = {
    "not an object": ([1], ["a list", "expected an object"]),
    "unknown keys": ({"dialog": []}, ["['dialog']", "'messages' or 'conversations'"]),
    "turns not a list": ({"messages": "hi"}, ["a text", "expected a list"]),
    "turn without content": ({"messages": [{"role": "user"}]}, ["turn 1", "['role']", "'content'"]),
    "turn not an object": ({"messages": ["hi"]}, ["turn 1", "a text"]),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, ["turn 1", "'wizard'", "user, assistant"]),
    "role not a text": ({"messages": [{"role": 3, "content": "x"}]}, ["turn 1", "unknown role 3"]),
    "content is a number": ({"messages": [{"role": "user", "content": 5}]}, ["turn 1", "a number", "list of parts"]),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "smell", "smell": "v"}]}]},
        ["turn 1", "smell", "(or video, audio)"],
    ),
    "empty conversation": ({"messages": []}, ["empty", "at least one turn"]),
    "no assistant turn": ({"messages": [USER]}, ["no assistant turn", "1 turn(s)"]),
    "more tags than images": (
        {"image": "a", "messages": [{"role": "user", "content": "<image><image>"}, BOT]},
        ["2 <image>", "1 image(s)"],
    ),
    "more images than tags": ({"images": ["a", "b"], "messages": [USER, BOT]}, ["0 <image>", "2 image(s)"]),
    "tag without images": ({"messages": [{"role": "user", "content": "<image>"}, BOT]}, ["1 <image>", "0 image(s)"]),
    "image entry is null": ({"images": [None], "messages": [USER, BOT]}, ["None", "expected a path"]),
    "image of the assistant": (
        {"image": "a", "messages": [USER, {"role": "assistant", "content": "<image>"}]},
        ["turn 2", "user turns only"],
    ),
    "image after the last answer": (
        {"image": "a", "messages": [USER, BOT, {"role": "user", "content": "<image>"}]},
        ["nothing is learned"],
    ),
    "half an emoji": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
        ["turn 1", "half of a character"],
    ),
    "answers not texts": ({"messages": [USER, BOT], "answers": [1]}, ["[1]", "list of texts"]),
}


@pytest.mark.parametrize(("row", "words"), BAD.values(), ids=BAD)
def test_bad_rows_are_told_in_one_sentence(write_rows: Callable[..., Path], row: Any, words: list[str]) -> None:
    path = write_rows([{"messages": [USER, BOT]}, "", row])
    with pytest.raises(DataError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert_one_sentence(message.removeprefix(f"{path}:3: "))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'messages': []}", ["not JSON", "column 2", "{'messages'"]),
        ("[", ["not JSON", "ends in .json"]),
        ('{"messages": [', ["not JSON"]),
        ('{"messages": ' + "9" * 5000 + "}", ["cannot be read", "plain JSON"]),
        ("[" * 200_000, ["cannot be read", "plain JSON"]),
    ],
)
def test_a_row_that_is_not_json(write_rows: Callable[..., Path], line: str, words: list[str]) -> None:
    path = write_rows([line])
    with pytest.raises(DataError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert all(word in str(caught.value) for word in words)


def test_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"messages": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:1: the row is not UTF-8 .* save the file as UTF-8"):
        read_all(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: the file does not exist"):
        open_sources([tmp_path / "nowhere.jsonl"])
    with pytest.raises(DataError, match=r"the file is a folder, expected a JSONL, JSON, Parquet or tar file"):
        open_sources([tmp_path])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: the file has no rows"):
        open_sources([tmp_path / "empty.jsonl"])


def test_rows_are_found_by_number_and_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"messages": [{"role": "user", "content": f"é{i}"}, BOT]}, ensure_ascii=False) for i in range(5)]
    path.write_text("\n" + rows[0] + "\r\n\n  \n" + "\n".join(rows[1:]), encoding="utf-8")  # no newline at the end
    source = JsonSource(path)
    assert len(source) == 5
    assert [source.conversation(index).turns[0].text for index in (4, 0, 2)] == ["é4", "é0", "é2"]
    assert [source.place(index).rpartition(":")[2] for index in range(5)] == ["2", "5", "6", "7", "8"]


def test_fingerprint_follows_content(write_rows: Callable[..., Path]) -> None:
    rows = [{"messages": [USER, BOT]}]
    one, same = (JsonSource(write_rows(rows, name)) for name in ("a.jsonl", "b.jsonl"))
    other = JsonSource(write_rows([{"messages": [USER, BOT], "answers": ["x"]}], "c.jsonl"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def assert_one_sentence(message: str) -> None:
    assert message.endswith(".")
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message)


def test_frames_may_say_how_fast_they_follow_each_other() -> None:
    parts = [{"type": "video", "video": ["a.png", "b.png"], "fps": 2}, {"type": "video", "video": "clip.mp4"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    frames, clip = parse_row(row, "rows.jsonl:1").media
    assert frames == VideoRef(("a.png", "b.png"), 2.0)
    assert clip == VideoRef("clip.mp4", None)


def test_a_file_may_say_how_fast_it_is_to_be_seen() -> None:
    """Qwen's ``fps`` of a file: what is taken of it, not how fast it was filmed."""
    parts = [{"type": "video", "video": "a.mp4", "fps": 1}, {"type": "video", "video": b"bytes", "fps": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    conversation = parse_row(row, "rows.jsonl:1")
    assert conversation.videos == (VideoRef("a.mp4", sampling_fps=1.0), VideoRef(b"bytes"))
