"""Bad samples: found before training where a look can find them, left out with a reason, never too many of them.

A bad sample is one whose row or media cannot be used. It is left out, the same one on every rank and after every
resume, because whether it is bad follows from its bytes alone. Nothing takes its place: a replacement would be trained
on twice. More than a set share stops the run: data that is broken that much is rarely worth a night.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_vlm.data.passes import pass_over
from lightning_vlm.schema import DataError, Sample, StoppingError
from lightning_vlm.sources.files import cache_root

if TYPE_CHECKING:
    from lightning_vlm.data.dataset import SampleDataset

_FORM = 1
_NAMED = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BadSamplePolicy:
    """What bad samples may do to a run.

    Attributes:
        strict: The first one stops it.
        max_fraction: The largest share of the samples that may be bad.

    Raises:
        ValueError: If the share is no share.
    """

    strict: bool = False
    max_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_fraction}; expected a share from 0 to 1")

    def check(self, errors: Mapping[int, DataError], total: int, where: str, num_bad: int | None = None) -> None:
        """Stops what has too many bad samples.

        Args:
            errors: Those that are known here, by the number of the sample.
            total: Number of all samples.
            where: What they are the samples of, e.g. ``data.train``.
            num_bad: Their number on all ranks, where that is larger.

        Raises:
            DataError: The first error itself under ``strict``; one sentence about all where they are too many.
        """
        count = max(num_bad or 0, len(errors))
        if self.strict and errors:
            raise next(iter(errors.values()))
        if count <= self.max_fraction * total:
            return
        raise DataError(
            where,
            f"{told(count, total)} cannot be used, expected at most max_bad_fraction = {100 * self.max_fraction:g} %: "
            f"{named(errors.values(), count)}",
            "correct or remove them (lightning-vlm check lists them all), or raise max_bad_fraction",
            "too many bad samples",
        )


def first_good(dataset: SampleDataset, indices: Iterable[int], count: int) -> list[Sample]:
    """The first samples that can be used; a bad one is told of when training comes to it.

    Args:
        dataset: The samples.
        indices: Their numbers, in the order in which they are tried.
        count: How many.

    Raises:
        StoppingError: If something other than a bad sample is met.
    """
    found: list[Sample] = []
    for index in indices:
        if len(found) == count:
            break
        try:
            found.append(dataset[index])
        except StoppingError:
            raise
        except DataError:
            continue
    return found


def told(count: int, total: int) -> str:
    """A number of samples with its share."""
    return f"{count:,} of {total:,} samples ({100 * count / max(total, 1):.3g} %)"


def named(errors: Iterable[DataError], count: int) -> str:
    """The first few errors in full, and how many more there are."""
    first = [str(error).rstrip(".") for error, _ in zip(errors, range(_NAMED))]
    more = f"; and {count - len(first):,} more" if count > len(first) else ""
    return "; ".join(first) + more


def count_kinds(errors: Iterable[DataError]) -> dict[str, int]:
    """How many errors there are of each kind, the most frequent first."""
    return dict(Counter(error.kind for error in errors).most_common())


def to_records(errors: Mapping[int, DataError]) -> list[list[Any]]:
    """Errors as plain data."""
    return [[index, error.source, error.problem, error.fix, error.kind] for index, error in errors.items()]


def from_records(records: Iterable[list[Any]]) -> dict[int, DataError]:
    """Errors from plain data."""
    return {int(index): DataError(*parts) for index, *parts in records}


@dataclass(frozen=True, slots=True)
class _ReadRow:
    """What a worker does with an index."""

    dataset: SampleDataset

    def __call__(self, index: int) -> tuple[int, ...]:
        self.dataset.conversation(index)
        return ()


def placed(errors: Mapping[int, DataError], dataset: SampleDataset) -> dict[int, DataError]:
    """Errors that were found before, named by where their samples are now: a file may have moved."""
    return {
        index: DataError(dataset.place(index), error.problem, error.fix, error.kind) for index, error in errors.items()
    }


def find_bad_rows(
    dataset: SampleDataset,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> dict[int, DataError]:
    """Reads every row once, or what was found before; looks at no media and no tokens.

    Args:
        dataset: The samples.
        num_workers: Processes that read; 0 reads in this one.
        cache_dir: Folder of the findings; ``rows`` in `cache_root` when ``None``.
        show_progress: Show a progress bar where it takes more than a moment.

    Returns:
        The rows that are no conversation, by number.
    """
    parts = [[source.fingerprint, len(source), repr(source.layout)] for source in dataset.sources]
    key = hashlib.sha256(json.dumps([_FORM, parts]).encode()).hexdigest()
    path = (cache_root() if cache_dir is None else Path(cache_dir)) / "rows" / f"{key}.json"
    try:
        return placed(from_records(json.loads(path.read_bytes())), dataset)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s holds no findings (%s); the rows are read again", path, error)

    total = len(dataset)
    workers = num_workers if total > 10_000 else 0
    _, errors = pass_over(total, _ReadRow(dataset), 0, "reading rows", workers, show_progress and total > 10_000)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(to_records(errors)))
        os.replace(unfinished, path)
    except OSError as error:
        _log.warning("%s cannot be written (%s); the rows will be read again next time", path, error)
    return errors
