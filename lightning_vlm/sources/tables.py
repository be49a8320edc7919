"""Parquet files and folders of Hugging Face datasets, through the ``datasets`` library (extra ``hf``).

The library maps its files into memory and reads any row by number. Images and sounds stay encoded until they are
needed: a table with decoded ones would be decoded for every look at a row's text.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lightning_vlm.schema import DataError
from lightning_vlm.sources.files import cache_root, check_file, is_url, name_and_folder, open_file, stamp
from lightning_vlm.sources.formats import RowFormat
from lightning_vlm.sources.rows import RowSource


class TableSource(RowSource):
    """The rows of a ``.parquet`` file or of a folder that ``Dataset.save_to_disk`` wrote.

    Args:
        path: The file or folder; an fsspec URL for Parquet too.
        layout: How rows are read.
        split: Which split of a folder that holds several: it lies in the folder of its name, where places begin.
        cache_dir: Where a Parquet file's memory-mapped copy is kept.

    Raises:
        DataError: If it is missing or empty, cannot be read, or the extra is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        layout: RowFormat | None = None,
        split: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.path = str(path)
        self.layout = layout or RowFormat()
        self.name, self.media_root = name_and_folder(self.path)
        self.is_folder = not is_url(self.path) and os.path.isdir(self.path)
        if not self.is_folder:
            check_file(self.path, "a Parquet file or a folder of datasets.Dataset.save_to_disk")
        self._stamp = self._files_stamp()
        root = cache_root() if cache_dir is None else Path(cache_dir)
        footer = "" if self.is_folder else _footer_hash(self.path)
        self._table = self._open(split, root / "tables" / footer)
        self.fingerprint = footer or str(self._table._fingerprint)[:16]
        if not len(self):
            raise DataError(self.path, "the table has no rows", "add rows or remove it from the config", "no rows")

    def has_changed(self) -> bool:
        """Whether the files are no longer those that were opened."""
        return self._files_stamp() != self._stamp

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> str:
        """``path:row``, rows counted from 1."""
        return f"{self.path}:{index + 1}"

    def row(self, index: int) -> Any:
        """A row as plain data, media still encoded."""
        return self._table[index : index + 1].to_pylist()[0]

    def _files_stamp(self) -> tuple[Any, ...]:
        if not self.is_folder:
            return stamp(self.path)
        return tuple((file.name, *stamp(str(file))) for file in sorted(Path(self.path).rglob("*")))

    def _open(self, split: str | None, cache: Path) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                self.path,
                "tables are read by the datasets library, which is not installed",
                "pip install 'lightning-vlm[hf]'",
                "extra not installed",
            ) from error
        bar = datasets.utils.logging.is_progress_bar_enabled()
        try:
            if self.is_folder:
                found = datasets.load_from_disk(self.path)
            else:
                datasets.disable_progress_bars()
                found = datasets.Dataset.from_parquet(self.path, cache_dir=str(cache))
        except Exception as error:  # Arrow and the library raise almost any kind for a damaged file
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise DataError(
                self.path,
                f"the table cannot be read ({reason}), expected Parquet or a folder of datasets.Dataset.save_to_disk",
                "write it again",
                "damaged table",
            ) from error
        finally:
            if bar:
                datasets.enable_progress_bars()
        if isinstance(found, datasets.DatasetDict):
            if split is None or split not in found:
                raise DataError(
                    self.path,
                    f"the folder holds the splits {', '.join(found)}, expected one to be named (found {split!r})",
                    "set split in the data config",
                    "missing split",
                )
            found, self.path, self.name = found[split], os.path.join(self.path, split), f"{self.name}_{split}"
            self._stamp = self._files_stamp()
        return found.with_format("arrow")  # media as they are stored, however deep they stand in lists


def _footer_hash(path: str) -> str:
    """A hash of a Parquet file's end, which tells where its columns are, how large and between which values.

    The library knows a file by its path and time: copied to another node it would be another table.
    """
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - 8 - length, 0))
        return hashlib.sha256(str(size).encode() + file.read()).hexdigest()[:16]
