"""The exact length of every sample before the first is encoded, so that a plan of packs never overflows.

Text goes through the tokenizer once, images are read up to their headers; both in parallel. The table is kept on disk
under a name that changes with everything it depends on, except the images themselves: to notice a changed image would
cost as much as to measure it, so training compares every sample with the table instead (`SampleDataset`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tokenizers
import transformers

from lightning_vlm.data.passes import pass_over
from lightning_vlm.data.screening import from_records, placed, to_records
from lightning_vlm.schema import DataError
from lightning_vlm.sources.files import cache_root

if TYPE_CHECKING:
    from lightning_vlm.data.dataset import SampleDataset
    from lightning_vlm.processing.processor import NemotronVLProcessor

# Workers are forked after the tokenizer was used; its own thread pool would only warn and contend there.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FORMAT_VERSION = 6
"""To be raised when the same data, processor and settings get another length, or the file another form."""

_COLUMNS = {
    **dict.fromkeys(("tokens", "patches", "images", "videos", "sounds"), "int32"),
    **dict.fromkeys(("scaled", "repaired"), "bool"),
}

MEDIA_KINDS = ("images", "videos", "sounds")
"""Columns that count media."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LengthTable:
    """Sizes of the samples of a dataset, by index.

    Attributes:
        tokens: ``(N,)`` int32.
        patches: ``(N,)`` int32 vision patches.
        images: ``(N,)`` int32 number of images.
        videos: ``(N,)`` int32 number of videos.
        sounds: ``(N,)`` int32 number of sounds.
        scaled: ``(N,)`` bool, whether a sample was made smaller to fit the limit: its images, or its text.
        repaired: ``(N,)`` bool, whether the row was changed to make sense of it.
        errors: What is wrong with bad samples, by index; their sizes are 0.
        path: The file that it was read from or written to.

    Raises:
        ValueError: If the arrays are not of these types and of one length, or hold a negative number.
    """

    tokens: np.ndarray
    patches: np.ndarray
    images: np.ndarray
    videos: np.ndarray
    sounds: np.ndarray
    scaled: np.ndarray
    repaired: np.ndarray
    errors: dict[int, DataError] = field(default_factory=dict)
    path: Path | None = field(default=None)

    def __post_init__(self) -> None:
        for name, dtype in _COLUMNS.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != (len(self.tokens),) or (column < 0).any():
                raise ValueError(
                    f"{name} is {column.dtype} {column.shape}, expected {len(self.tokens)} of {dtype}, none negative"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    def save(self, path: str | Path, key: str = "") -> None:
        """Writes the table; another process sees the old file or the new one, never half of one.

        Args:
            path: An ``.npz`` file; its folder is made.
            key: What the lengths belong to; `load` asks for it.

        Raises:
            OSError: If it cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                columns = {name: getattr(self, name) for name in _COLUMNS}
                errors = np.frombuffer(json.dumps(to_records(self.errors)).encode(), dtype=np.uint8)
                np.savez_compressed(file, key=np.array(key), errors=errors, **columns)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, key: str = "") -> Self:
        """Reads a table.

        Args:
            path: What `save` wrote.
            key: The key that it was saved with.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is damaged, no table, or a table of other lengths.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                found, columns = str(file["key"]), {name: file[name] for name in _COLUMNS}
                errors = from_records(json.loads(file["errors"].tobytes()))
            table = cls(**columns, errors=errors, path=path)
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, zlib and NumPy raise almost any kind for a damaged file
            raise ValueError(f"{path} is no table of lengths ({' '.join(str(error).split())})") from error
        if found != key:
            raise ValueError(f"{path} is the table of other lengths (its key is {found!r}, expected {key!r})")
        return table


def measure_lengths(
    dataset: SampleDataset,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
    decode: bool = False,
    fresh: bool = False,
) -> LengthTable:
    """Measures every sample, or reads what was measured before.

    A sample whose row or media cannot be used has size 0 and an entry in `LengthTable.errors`. Those that were bad
    before are looked at again: a file may have been put right.

    Args:
        dataset: The samples.
        num_workers: Processes that measure; 0 measures in this one.
        cache_dir: Folder of the tables; `default_cache_dir` when ``None``.
        show_progress: Show a progress bar on stderr while measuring.
        decode: Decode every medium too, to find damage that headers do not show; the sizes are the same.
        fresh: Measure in any case: media may have changed, which no key can tell.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    for thorough in () if fresh else (True,) if decode else (True, False):  # what was decoded serves either wish
        key = lengths_key(dataset, thorough)
        path = folder / f"{key}.npz"
        if not path.exists():
            continue
        try:
            table = LengthTable.load(path, key)
            if len(table) != len(dataset):
                raise ValueError(f"{path} holds the lengths of {len(table)} samples, expected {len(dataset)}")
            return _heal(replace(table, errors=placed(table.errors, dataset)), dataset, thorough, key)
        except (FileNotFoundError, ValueError) as error:  # damaged, or removed just now
            _log.warning("%s; the samples are measured again", error)

    description = "decoding media" if decode else "measuring lengths"
    look = _Look(dataset, decode)
    sizes, errors = pass_over(len(dataset), look, len(_COLUMNS), description, num_workers, show_progress)
    columns = {name: column.astype(_COLUMNS[name]) for name, column in zip(_COLUMNS, sizes.T)}
    table = LengthTable(**columns, errors=errors)
    key = lengths_key(dataset, decode)
    return _kept(table, folder / f"{key}.npz", key)


@dataclass(frozen=True, slots=True)
class _Look:
    """What a worker does with an index; an object, for only those can be sent to a process that was not forked."""

    dataset: SampleDataset
    decode: bool

    def __call__(self, index: int) -> tuple[int, ...]:
        size = self.dataset.size(index, self.decode)
        return tuple(int(getattr(size, name)) for name in _COLUMNS)


def _heal(table: LengthTable, dataset: SampleDataset, decode: bool, key: str) -> LengthTable:
    """A table whose bad samples were looked at again."""
    look, errors = _Look(dataset, decode), {}
    columns = {name: getattr(table, name) for name in _COLUMNS}
    for index in table.errors:
        try:
            numbers = look(index)
        except DataError as error:
            errors[index] = error
        else:
            for column, number in zip(columns.values(), numbers):
                column[index] = number
    if len(errors) == len(table.errors):
        return replace(table, errors=errors)
    assert table.path is not None
    return _kept(LengthTable(**columns, errors=errors), table.path, key)


def _kept(table: LengthTable, path: Path, key: str) -> LengthTable:
    try:
        table.save(path, key)
    except OSError as error:
        _log.warning("%s cannot be written (%s); the samples will be measured again next time", path, error)
        return table
    return replace(table, path=path)


def kinds_to_show(counted: Iterable[Any]) -> list[str]:
    """The `MEDIA_KINDS` that a report has to name: those that there are, images where there are none at all.

    Args:
        counted: What has a number of each.
    """
    items = list(counted)
    return [kind for kind in MEDIA_KINDS if any(getattr(item, kind) for item in items)] or ["images"]


def default_cache_dir() -> Path:
    """``lengths`` in `cache_root`."""
    return cache_root() / "lengths"


def lengths_key(dataset: SampleDataset, decode: bool = False) -> str:
    """Names everything that the lengths of a dataset follow from, the content of its images left out.

    Args:
        dataset: The samples.
        decode: Whether their media were decoded.
    """
    limit = dataset.image_limit
    sources = [
        [source.fingerprint, len(source), repr(source.layout), policy.root_key]
        for source, policy in zip(dataset.sources, dataset.policies)
    ]
    # Not that a policy changes a length, but what it refuses now must not pass because it was measured before.
    policies = [
        [policy.max_image_pixels, policy.allow_urls, policy.max_video_frames, policy.max_audio_s]
        for policy in dataset.policies
    ]
    parts = {
        "format": FORMAT_VERSION,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "sources": sources,
        "policies": policies,
        "answer": dataset.answer,
        "processor": processor_fingerprint(dataset.processor),
        "template_kwargs": dataset.template_kwargs,
        "limit": None if limit is None else asdict(limit),
        "max_text": dataset.max_text,
        "decode": decode,
        "kind": type(dataset).__name__,
    }
    return _digest(parts)


def processor_fingerprint(processor: NemotronVLProcessor) -> str:
    """Names everything that a processor turns a conversation and sizes of media into tokens by."""
    if not hasattr(processor, "geometry"):  # another family's: only media are looked at, see `data.examples`
        return type(processor).__name__
    tokenizer = processor.tokenizer
    content = tokenizer.backend_tokenizer.to_str()
    start = content.find('"added_tokens"')  # before it stand truncation and padding, which the last call has set
    return _digest(
        {
            "tokenizer": content[max(start, 0) :],
            "class": type(tokenizer).__name__,
            "special_tokens": tokenizer.special_tokens_map,
            "splits_special_tokens": getattr(tokenizer, "split_special_tokens", False),
            "chat_template": processor.chat_template,
            "media_tokens": asdict(processor.media_tokens),
            "geometry": asdict(processor.geometry),
            "video": None if processor.video_geometry is None else asdict(processor.video_geometry),
            "sound": None if processor.sound_geometry is None else asdict(processor.sound_geometry),
        }
    )


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
