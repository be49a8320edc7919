"""What every source of rows is: a number of rows, each readable by its number, each with a place that errors name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning_vlm.schema import Conversation, DataError
from lightning_vlm.sources.content import fingerprint
from lightning_vlm.sources.formats import RowFormat, parse_row


class RowSource(ABC):
    """Rows by number.

    Attributes:
        path: What it was opened from.
        name: What scores and counts are grouped by.
        media_root: Where relative media names start.
        has_own_root: Whether that was chosen for this source; if not, the data module's ``media_root`` goes before it.
        layout: How rows are read; whether they need an answer is for the split to say that they are opened for.
        fingerprint: Changes with the rows.
        weight: How often an epoch takes each row, on average.
    """

    path: str
    name: str
    media_root: str
    has_own_root: bool = True
    layout: RowFormat
    fingerprint: str
    weight: float = 1.0

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def row(self, index: int) -> Any:
        """The row as plain data.

        Raises:
            DataError: If it cannot be read.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a row stands, e.g. ``file:line``."""

    def conversation(self, index: int) -> Conversation:
        """What a row means.

        Args:
            index: Number of the row.

        Raises:
            DataError: If the row cannot be read or is not a conversation.
        """
        return parse_row(self.row(index), self.place(index), self.layout)

    def has_changed(self) -> bool:
        """Whether what was opened is no longer what is there."""
        return False


class ListSource(RowSource):
    """Rows that are already in memory: of a notebook, of a test.

    All of them are read once for the fingerprint, images that are opened and not decoded yet included (see `content`).
    It covers what stands in the rows: of a file that a row names, the name alone.

    Args:
        rows: Objects as of any format; media may be PIL images, bytes or arrays.
        layout: How rows are read.
        name: What scores are grouped by, and errors name.
        media_root: Where relative media names start; by default the data module's ``media_root``, or the working
            directory.

    Raises:
        DataError: If there are no rows, or one holds an object whose content cannot be compared.
    """

    def __init__(
        self, rows: Sequence[Any], layout: RowFormat | None = None, name: str = "rows", media_root: str | None = None
    ) -> None:
        if not len(rows):
            raise DataError(name, "the list has no rows", "add rows", "no rows")
        self.rows, self.layout, self.path, self.name = rows, layout or RowFormat(), name, name
        self.media_root = "." if media_root is None else media_root
        self.has_own_root = media_root is not None
        self.fingerprint = fingerprint(rows, name)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Any:
        """The row itself: nobody writes into it."""
        return self.rows[index]

    def place(self, index: int) -> str:
        """``name:number``, rows counted from 1."""
        return f"{self.name}:{index + 1}"


class FirstRows(RowSource):
    """The first rows of another source.

    Args:
        source: The other source.
        count: How many; all if there are fewer.

    Raises:
        ValueError: If the count is below 1.
    """

    def __init__(self, source: RowSource, count: int) -> None:
        if count < 1:
            raise ValueError(f"max_samples of {source.path} is {count}, expected at least 1")
        self.source, self.count = source, min(count, len(source))
        self.path, self.name, self.media_root = source.path, source.name, source.media_root
        self.has_own_root = source.has_own_root
        self.layout, self.fingerprint = source.layout, f"{source.fingerprint}:{self.count}"

    def __len__(self) -> int:
        return self.count

    def row(self, index: int) -> Any:
        """See `RowSource`."""
        return self.source.row(index)

    def place(self, index: int) -> str:
        """See `RowSource`."""
        return self.source.place(index)

    def has_changed(self) -> bool:
        """See `RowSource`."""
        return self.source.has_changed()
