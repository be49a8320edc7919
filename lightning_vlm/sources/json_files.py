"""JSONL files and JSON arrays as indexed rows: any row by number, its place by file and line.

The file is scanned once for where its rows start; the index stays on disk and is mapped, so memory does not grow with
the file, and a second start does not scan.
"""

from __future__ import annotations

import array
import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from lightning_vlm.schema import DataError
from lightning_vlm.sources.files import RangeReader, cached_array, check_file, is_url, name_and_folder, open_file, stamp
from lightning_vlm.sources.formats import RowFormat
from lightning_vlm.sources.rows import RowSource

_BLOCK = 4 * 2**20
_FORM = 1  # of the index; to be raised when it changes
_ROWS_WITHOUT_A_BAR = 2**28  # bytes of a file that is scanned in about a second


class JsonSource(RowSource):
    """The rows of one ``.jsonl`` file (an object per line) or ``.json`` file (an array of objects).

    Args:
        path: Path or fsspec URL.
        layout: How rows are read.
        cache_dir: Where the index is kept.

    Raises:
        DataError: If the file is missing, empty, or a JSON array that is damaged.
    """

    def __init__(self, path: str | Path, layout: RowFormat | None = None, cache_dir: str | Path | None = None) -> None:
        self.path = str(path)
        self.layout = layout or RowFormat()
        self.name, self.media_root = name_and_folder(self.path)
        check_file(self.path, "a JSONL or JSON file")
        self._stamp = stamp(self.path)
        self._reader = RangeReader(self.path)
        self.is_array = self.path.lower().endswith(".json")
        scan = _scan_array if self.is_array else _scan_lines
        kind = "array" if self.is_array else "lines"
        # Starts, sizes and line numbers in columns.
        self._index, self.fingerprint = cached_array(
            self.path, f"json {kind} {_FORM}", lambda: _scan_file(self.path, scan), cache_dir
        )
        if not len(self):
            raise DataError(self.path, "the file has no rows", "add rows or remove the file from the config", "no rows")

    def has_changed(self) -> bool:
        """Whether the file is no longer the one that was opened."""
        return stamp(self.path) != self._stamp

    def __len__(self) -> int:
        return self._index.shape[1]

    def place(self, index: int) -> str:
        """``file:line`` of a row."""
        return f"{self.path}:{self._index[2, index]}"

    def row(self, index: int) -> Any:
        """The decoded row.

        Raises:
            DataError: If it is not JSON.
        """
        start, size, _ = self._index[:, index].tolist()
        return decode_json(self._reader.read(start, size), self.place(index))


def decode_json(content: bytes, place: str) -> Any:
    """One JSON value.

    Args:
        content: Its bytes.
        place: ``file:line``, for the error.

    Raises:
        DataError: If it is not JSON in UTF-8.
    """
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise DataError(
            place, f"the row is not UTF-8 ({error.reason})", "save the file as UTF-8", "not UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        start = content.decode(errors="replace").strip()
        found = start if len(start) <= 60 else start[:57] + "..."
        hint = " (a JSON array belongs into a file that ends in .json)" if start in ("[", "[{", "{") else ""
        raise DataError(
            place,
            f"the row is not JSON ({error.msg.removesuffix(' at')} at column {error.colno}): {found!r}, expected one "
            "JSON object per line",
            f"correct the row{hint}",
            "not JSON",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
        raise DataError(
            place, f"the row cannot be read ({error}), expected plain JSON", "correct the row", "not JSON"
        ) from error


def _scan_file(path: str, scan: Any) -> tuple[np.ndarray, str]:
    """``(3, rows)`` int64 starts, sizes and line numbers; and the hash of the content."""
    digest, columns = hashlib.sha256(), (array.array("q"), array.array("q"), array.array("q"))
    total = 0 if is_url(path) else os.path.getsize(path)
    with (
        open_file(path) as file,
        tqdm(total=total, desc=f"indexing {Path(path).name}", unit="B", unit_scale=True,
             disable=total < _ROWS_WITHOUT_A_BAR) as bar,
    ):  # fmt: skip
        for row in scan(_Watched(file, digest, bar), path):
            for column, value in zip(columns, row):
                column.append(value)
    return np.stack([np.frombuffer(column, dtype=np.int64) for column in columns]), digest.hexdigest()[:16]


class _Watched:
    """A file whose content is hashed and counted while it is read."""

    def __init__(self, file: BinaryIO, digest: Any, bar: tqdm) -> None:
        self.file, self.digest, self.bar = file, digest, bar

    def read(self) -> bytes:
        block = self.file.read(_BLOCK)
        self.digest.update(block)
        self.bar.update(len(block))
        return block


def _scan_lines(file: _Watched, path: str) -> Iterator[tuple[int, int, int]]:
    """(start, size, line) of each line that is not blank."""
    position, number = 0, 1
    pieces: list[bytes] = []  # of a line that began in an earlier block: joined once, however long it is
    while block := file.read():
        first, *lines = block.split(b"\n")
        pieces.append(first)
        if not lines:
            continue
        lines.insert(0, b"".join(pieces))
        pieces = [lines.pop()]
        for line in lines:
            if line.strip():
                yield position, len(line), number
            position += len(line) + 1
            number += 1
    if (rest := b"".join(pieces)).strip():
        yield position, len(rest), number


def _scan_array(file: _Watched, path: str) -> Iterator[tuple[int, int, int]]:
    """(start, size, line) of each element of a JSON array, without holding more than one block of it."""
    text = _TextWindow(file, path)
    if text.skip_space() != "[":
        found = text.buffer[text.at : text.at + 20]
        raise DataError(
            f"{path}:{text.line}",
            f"the file starts with {found!r}, expected a JSON array of rows ([{{...}}, ...])",
            "write an array, or one object per line in a file that ends in .jsonl",
            "not JSON",
        )
    text.move(1)
    if text.skip_space() == "]":
        text.move(1)
        text.check_end()
        return
    while True:
        text.skip_space()
        start, line = text.position, text.line
        text.move_over_value()
        yield start, text.position - start, line
        after = text.skip_space()
        text.move(1)
        if after == "]":
            text.check_end()
            return
        if after != ",":
            found = "the end of the file" if not after else repr(after)
            raise DataError(
                f"{path}:{text.line}",
                f"after a row stands {found}, expected ',' or ']'",
                "correct the file there (it may have been cut off)",
                "not JSON",
            )


class _TextWindow:
    """A moving window over a file's text that knows its place in bytes and lines."""

    def __init__(self, file: _Watched, path: str) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.buffer, self.at, self.ended = "", 0, False
        self.position, self.line = 0, 1
        first = file.read()
        self.position = 3 if first.startswith(codecs.BOM_UTF8) else 0
        self._append(first)

    def skip_space(self) -> str:
        """Moves to the next character that is no white space, and returns it; empty at the end."""
        while True:
            end = self.at
            while end < len(self.buffer) and self.buffer[end] in " \t\r\n":
                end += 1
            self.move(end - self.at)
            if self.at < len(self.buffer) or not self._more():
                return self.buffer[self.at : self.at + 1]

    def move(self, count: int) -> None:
        """Moves on by some characters."""
        passed = self.buffer[self.at : self.at + count]
        self.position += len(passed.encode())
        self.line += passed.count("\n")
        self.at += len(passed)

    def check_end(self) -> None:
        """Refuses anything but white space up to the end of the file."""
        if found := self.skip_space():
            raise DataError(
                f"{self.path}:{self.line}",
                f"behind the array stands {found!r}, expected the end of the file",
                "write one array, or one object per line in a file that ends in .jsonl",
                "not JSON",
            )

    def move_over_value(self) -> None:
        """Moves to the end of the JSON value that starts here."""
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # Cut off by the window's end, or wrong.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if cut and self._more():
                    continue
                line = self.line + self.buffer.count("\n", self.at, error.pos)
                raise DataError(
                    f"{self.path}:{line}",
                    f"the file is not JSON from here on ({error.msg.removesuffix(' at')}), expected an array of rows",
                    "correct the file there (it may have been cut off)",
                    "not JSON",
                ) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
                raise DataError(
                    f"{self.path}:{self.line}",
                    f"the file cannot be read from here on ({error}), expected plain JSON",
                    "correct the row",
                    "not JSON",
                ) from error
            goes_on = isinstance(value, (int, float)) and end > len(self.buffer) - 8  # with an exponent, say
            if not goes_on or not self._more():
                self.move(end - self.at)
                return

    def _more(self) -> bool:
        """Reads on, and forgets what was passed; False at the end."""
        if self.ended:
            return False
        blocks = max(1, (len(self.buffer) - self.at) // _BLOCK)  # a long value: not again for each block
        self.buffer, self.at = self.buffer[self.at :], 0
        for _ in range(blocks):
            self._append(self.file.read())
        return True

    def _append(self, block: bytes) -> None:
        self.ended = not block
        try:
            self.buffer += self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}:{self.line}",
                f"the file is not UTF-8 ({error.reason})",
                "save the file as UTF-8",
                "not UTF-8",
            ) from error
