"""What a user writes for a source -> an opened source."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_vlm.schema import DataError
from lightning_vlm.sources.files import is_url, local_path
from lightning_vlm.sources.formats import RowFormat
from lightning_vlm.sources.json_files import JsonSource
from lightning_vlm.sources.rows import FirstRows, RowSource
from lightning_vlm.sources.shards import ShardSource
from lightning_vlm.sources.tables import TableSource

_SUFFIXES = {".parquet": "table", ".tar": "webdataset", ".jsonl": "json", ".json": "json"}


@dataclass
class DataSource:
    """A source with settings of its own; where none are needed, its path alone will do.

    Attributes:
        path: JSONL file, ``.json`` array, ``.parquet`` file, ``.tar`` shard, or folder of
            ``datasets.Dataset.save_to_disk``; local, or an fsspec URL such as ``s3://bucket/train.jsonl``
            (``file:///path`` is the path).
        format: How rows are written: ``auto`` (by their key), ``messages``, ``conversations`` or ``columns``.
        columns: For plain columns, what stands where: ``{question: query, answer: label, image: photo}``.
        prompt: For plain columns without a question, what is asked in every row.
        media_root: Folder that its media start from and may not leave; by default the data module's, or the file's own.
        weight: How often an epoch takes each row, on average: 2 takes each twice, 0.5 one half in turn.
        split: Which split of a folder that holds several.
        name: What its scores and counts are called; by default the file's stem, and the split's name after it.
        max_samples: Take the first so many rows only.

    Raises:
        ValueError: If a setting is unknown or contradicts another.
    """

    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    media_root: str | None = None
    weight: float = 1.0
    split: str | None = None
    name: str | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of {self.path} is {self.weight}, expected a number above 0")
        self.layout()

    def layout(self, needs_answer: bool = True) -> RowFormat:
        """How the rows are read.

        Args:
            needs_answer: Whether each row must hold an assistant turn.
        """
        return RowFormat(self.format, self.columns, self.prompt, needs_answer)


SourceLike = str | Path | DataSource | RowSource | Mapping[str, Any]


def open_sources(
    sources: Sequence[SourceLike],
    needs_answer: bool = True,
    media_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> list[RowSource]:
    """Opens every source, reading no more than where its rows are.

    Args:
        sources: Paths, `DataSource` objects (or mappings of their settings), or opened sources.
        needs_answer: Whether each row must hold an assistant turn; it goes for opened sources too, which are copied
            where they are read otherwise.
        media_root: Where media names start, for sources that do not say.
        cache_dir: Where indexes are kept.

    Raises:
        DataError: If a file is missing, empty, or not what it should be.
        ValueError: If a setting is unknown or contradicts another.
    """
    return [_open(source, needs_answer, media_root, cache_dir) for source in sources]


def weights_of(sources: Sequence[SourceLike]) -> list[float]:
    """The weight of each source.

    Args:
        sources: As for `open_sources`; nothing is opened.
    """
    return [source.weight if isinstance(source, RowSource) else _settings(source).weight for source in sources]


def group_names(sources: Sequence[SourceLike]) -> dict[str, str]:
    """What the scores of each source are called, by its path: its name, or the stem of its file.

    Stems that are equal are told apart by the folder's name.

    Args:
        sources: As for `open_sources`; nothing is opened.
    """
    settings = [source if isinstance(source, RowSource) else _settings(source) for source in sources]
    stems = [source.name if isinstance(source, RowSource) else _name(source) for source in settings]
    return {
        _place(source): stem if stems.count(stem) == 1 else f"{Path(source.path).parent.name}_{stem}"
        for source, stem in zip(settings, stems)
    }


def _name(settings: DataSource) -> str:
    """The name that was given, or the file's stem, with the split of a folder that holds several."""
    stem = Path(settings.path).stem
    return settings.name or (stem if settings.split is None else f"{stem}_{settings.split}")


def _place(source: DataSource | RowSource) -> str:
    """The path that places of rows begin with, see `TableSource`."""
    split = None if isinstance(source, RowSource) else source.split
    return source.path if split is None else os.path.join(source.path, split)


def _open(
    given: SourceLike, needs_answer: bool, media_root: str | Path | None, cache_dir: str | Path | None
) -> RowSource:
    if isinstance(given, RowSource):
        return _as_read(given, needs_answer, media_root)
    settings = _settings(given)
    layout = settings.layout(needs_answer)
    kind = _kind(settings.path)
    if settings.split is not None and not os.path.isfile(os.path.join(settings.path, "dataset_dict.json")):
        raise DataError(
            settings.path,
            f"the split {settings.split!r} was named, expected none: the {'table' if kind == 'table' else 'file'} "
            "holds no splits",
            "remove split from the data config",
            "missing split",
        )
    source: RowSource
    if kind == "table":
        source = TableSource(settings.path, layout, settings.split, cache_dir)
    elif kind == "webdataset":
        source = ShardSource(settings.path, layout, cache_dir)
    else:
        source = JsonSource(settings.path, layout, cache_dir)
    if settings.max_samples is not None:
        source = FirstRows(source, settings.max_samples)
    source.name, source.weight = _name(settings), settings.weight
    source.media_root = local_path(str(settings.media_root or media_root or source.media_root))
    return source


def _as_read(given: RowSource, needs_answer: bool, media_root: str | Path | None) -> RowSource:
    """A source that the user has opened, as a split reads it; the user's own object stays what it is."""
    layout, root = replace(given.layout, needs_answer=needs_answer), given.media_root
    if not given.has_own_root and media_root is not None:
        root = local_path(str(media_root))
    if (layout, root) == (given.layout, given.media_root):
        return given
    source = copy.copy(given)
    source.layout, source.media_root = layout, root
    return source


def _settings(given: SourceLike) -> DataSource:
    if isinstance(given, DataSource):
        path = local_path(str(given.path))
        return replace(given, path=path if is_url(path) else path.rstrip("/") or path)
    if isinstance(given, Mapping):
        known = [item.name for item in fields(DataSource)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"a source has the unknown setting {unknown[0]!r}; expected {', '.join(known)}")
        if "path" not in given:
            raise ValueError(f"a source has the settings {sorted(given)} and no path; expected path: ...")
        return _settings(DataSource(**given))
    return _settings(DataSource(str(given)))


def _kind(path: str) -> str:
    if not is_url(path) and os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "dataset_info.json")) or os.path.isfile(
            os.path.join(path, "dataset_dict.json")
        ):
            return "table"
        raise DataError(
            path,
            "the file is a folder, expected a JSONL, JSON, Parquet or tar file, or a folder of "
            "datasets.Dataset.save_to_disk",
            "correct the path in the data config",
            "missing file",
        )
    if path.endswith((".tar.gz", ".tgz", ".tar.zst", ".jsonl.gz", ".json.gz")):
        raise DataError(
            path,
            "the file is compressed, expected one that can be read at any place",
            "decompress it",
            "compressed file",
        )
    return _SUFFIXES.get(Path(path).suffix.lower(), "json")
