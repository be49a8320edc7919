"""JSON files by number: arrays and lines alike, however they are written, with an index that is made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.schema import DataError
from lightning_vlm.sources import json_files
from lightning_vlm.sources.json_files import JsonSource

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(values, min_size=1, max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    data=st.data(),
)
def test_any_rows_are_read_back(
    rows: list[Any], indent: int | None, ascii: bool, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    block = data.draw(st.integers(1, 60))
    before, json_files._BLOCK = json_files._BLOCK, block
    try:
        array = folder / "rows.json"
        array.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8")
        source = JsonSource(array, cache_dir=folder)
        assert [source.row(index) for index in range(len(source))] == rows
        lines = folder / "rows.jsonl"
        ends = data.draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n"]))
        lines.write_bytes(ends.join(json.dumps(row, ensure_ascii=ascii) for row in rows).encode())
        source = JsonSource(lines, cache_dir=folder)
        assert [source.row(index) for index in range(len(source))] == rows
    finally:
        json_files._BLOCK = before


def test_places_are_the_lines_where_rows_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[{"a": 1},\n  {"b":\n 2}\n,{"c": "\\n"}]')
    source = JsonSource(path, cache_dir=tmp_path)
    assert [source.place(index) for index in range(3)] == [f"{path}:{line}" for line in (2, 3, 5)]


def test_a_byte_order_mark_is_no_row(tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + (b'[{"a": 1}]' if name.endswith(".json") else b'{"a": 1}\n'))
        assert JsonSource(path, cache_dir=tmp_path).row(0) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ('{"messages": []}', 1, "starts with '{\"messages\": []}', expected a JSON array of rows"),
        ("", 1, "starts with '', expected a JSON array"),
        ('[{"a": 1},\n{"b": }]', 2, "the file is not JSON from here on (Expecting value)"),
        ('[{"a": 1}', 1, "after a row stands the end of the file, expected ',' or ']'"),
        ('[{"a": 1}\n{"b": 2}]', 2, "after a row stands '{', expected ',' or ']'"),
        ('[{"a": 1}]\n[{"a": 1}]', 2, "behind the array stands '[', expected the end of the file"),
        ("[" * 100_000, 1, "the file cannot be read from here on"),
        ('[{"a": 1},\n{"b": "', 2, "the file is not JSON from here on (Unterminated string starting)"),
    ],
)
def test_a_damaged_array_names_the_line(tmp_path: Path, content: str, line: int, words: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        JsonSource(path, cache_dir=tmp_path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)
    assert caught.value.kind == "not JSON"


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(" [ ] ")
    with pytest.raises(DataError, match=r"rows.json: the file has no rows"):
        JsonSource(path, cache_dir=tmp_path)


class TestIndex:
    def test_is_made_once_and_mapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n{"a": 2}\n')
        first = JsonSource(path, cache_dir=tmp_path)
        monkeypatch.setattr(json_files, "_scan_file", None)
        second = JsonSource(path, cache_dir=tmp_path)
        assert isinstance(second._index, np.memmap)
        assert second.row(1) == {"a": 2}
        assert first.fingerprint == second.fingerprint

    def test_is_made_again_when_the_file_has_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n')
        first = JsonSource(path, cache_dir=tmp_path)
        path.write_text('{"a": 1}\n{"a": 2}\n')
        assert first.has_changed()
        second = JsonSource(path, cache_dir=tmp_path)
        assert len(second) == 2
        assert first.fingerprint != second.fingerprint

    def test_is_made_again_when_it_is_damaged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n')
        JsonSource(path, cache_dir=tmp_path)
        (index,) = (tmp_path / "index").glob("*.npy")
        index.write_bytes(b"no index")
        assert len(JsonSource(path, cache_dir=tmp_path)) == 1
        assert "is no index" in caplog.text
        assert len(JsonSource(path, cache_dir=tmp_path)) == 1

    def test_is_kept_in_memory_where_it_cannot_be_written(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, blocked = tmp_path / "rows.jsonl", tmp_path / "file"
        path.write_text('{"a": 1}\n')
        blocked.write_text("not a folder")
        assert JsonSource(path, cache_dir=blocked).row(0) == {"a": 1}
        assert "cannot be written" in caplog.text


def test_a_file_behind_an_address_is_read_in_ranges(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://bucket/rows.jsonl", "w") as file:
        file.write('{"a": 1}\n{"a": 2}\n')
    source = JsonSource("memory://bucket/rows.jsonl", cache_dir=tmp_path)
    assert [source.row(index) for index in range(2)] == [{"a": 1}, {"a": 2}]
    assert (source.name, source.media_root) == ("rows", "memory://bucket")
    with pytest.raises(DataError, match=r"memory://bucket/absent.jsonl: the file does not exist"):
        JsonSource("memory://bucket/absent.jsonl", cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"nosuch://x/rows.jsonl: the file cannot be reached"):
        JsonSource("nosuch://x/rows.jsonl", cache_dir=tmp_path)
