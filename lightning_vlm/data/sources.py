"""JSONL files as indexed rows: any row by number, its place by file and line, memory of one integer per row.

The file is scanned once for line starts and every row is parsed once at the start, so malformed data is told before a
GPU is touched, not at three in the morning.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_vlm.data.formats import parse_row
from lightning_vlm.schema import Conversation, DataError


class JsonlSource:
    """The rows of one JSONL file.

    Args:
        path: The file.
        needs_answer: Whether each row must hold an assistant turn.

    Attributes:
        fingerprint: Hash of the file's content.

    Raises:
        DataError: If the file is missing.
    """

    def __init__(self, path: str | Path, needs_answer: bool = True) -> None:
        self.path = Path(path)
        self.needs_answer = needs_answer
        if not self.path.is_file():
            found = "is a folder, expected a JSONL file" if self.path.is_dir() else "does not exist"
            raise DataError(str(path), f"the file {found}", "correct the path in the data config")
        self._stat = _stat(self.path)
        self._starts = array.array("q")
        self._lines = array.array("q")
        position, digest = 0, hashlib.sha256()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(position)
                    self._lines.append(number)
                position += len(line)
                digest.update(line)
        self.fingerprint = digest.hexdigest()[:16]

    @property
    def name(self) -> str:
        """The file's stem: what scores and counts are grouped by."""
        return self.path.stem

    def has_changed(self) -> bool:
        """Whether the file on disk is no longer the one that was opened."""
        return not self.path.is_file() or _stat(self.path) != self._stat

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """``file:line`` of a row."""
        return f"{self.path}:{self._lines[index]}"

    def conversation(self, index: int) -> Conversation:
        """Reads and parses a row.

        Args:
            index: Number of the row, blank lines not counted.

        Raises:
            DataError: If the row is not JSON or not a conversation.
        """
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parse(file.readline(), index)

    def check(self) -> None:
        """Parses every row once and keeps none.

        Raises:
            DataError: At the first row that is not a conversation.
        """
        index = 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._parse(line, index)
                    index += 1

    def _parse(self, line: bytes, index: int) -> Conversation:
        return parse_row(_decode(line, self.place(index)), self.place(index), self.needs_answer)


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _decode(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(place, f"the row is not UTF-8 ({error.reason})", "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        start = line.decode(errors="replace").strip()
        found = start if len(start) <= 60 else start[:57] + "..."
        array_hint = " (a JSON array is written one object per line: jq -c '.[]')" if start in ("[", "[{", "{") else ""
        raise DataError(
            place,
            f"the row is not JSON ({error.msg} at column {error.colno}): {found!r}, expected one JSON object per line",
            f"correct the row{array_hint}",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
        raise DataError(place, f"the row cannot be read ({error}), expected plain JSON", "correct the row") from error


def open_sources(paths: Sequence[str | Path], needs_answer: bool = True) -> list[JsonlSource]:
    """Opens and checks every file.

    Args:
        paths: JSONL files.
        needs_answer: Whether each row must hold an assistant turn.

    Raises:
        DataError: If a file is missing or empty, or a row is not a conversation.
    """
    sources = [JsonlSource(path, needs_answer) for path in paths]
    for source in sources:
        if not len(source):
            raise DataError(str(source.path), "the file has no rows", "add rows or remove the file from the config")
        source.check()
    return sources
