"""What is in the data and what is wrong with it: every row, its media and its tokens, looked at without a model.

Unlike a start of training, which stops where there is too much, this goes on to the end and reports all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.examples import ExampleDataset
from lightning_vlm.data.lengths import MEDIA_KINDS, LengthTable, kinds_to_show, measure_lengths
from lightning_vlm.data.overlong import find_overlong
from lightning_vlm.schema import DataError


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """One source in numbers.

    Attributes:
        path: What it was opened from.
        rows: Its rows.
        bad: Rows that cannot be used.
        images: Images of the other rows.
        videos: Their videos.
        sounds: Their sounds.
        with_images: Rows with at least one image.
        with_videos: Rows with at least one video.
        with_sounds: Rows with at least one sound.
        tokens: Tokens of the other rows; ``None`` where the processor is not one that can tell without encoding.
        repaired: Rows that were changed to make sense of them.
    """

    path: str
    rows: int
    bad: int
    images: int
    videos: int
    sounds: int
    with_images: int
    with_videos: int
    with_sounds: int
    tokens: int | None
    repaired: int


@dataclass(frozen=True, slots=True)
class SplitCheck:
    """What was found in a split.

    Attributes:
        name: The split.
        sources: Those that could be opened.
        errors: Everything that is wrong, in the order of the rows; sources that could not be opened first.
    """

    name: str
    sources: tuple[SourceCheck, ...] = ()
    errors: tuple[DataError, ...] = field(default=())

    def by_kind(self) -> dict[str, list[DataError]]:
        """Errors by kind, the most frequent first."""
        kinds: dict[str, list[DataError]] = {}
        for error in self.errors:
            kinds.setdefault(error.kind, []).append(error)
        return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))

    def text(self, examples: int = 3) -> str:
        """Aligned lines for people.

        Args:
            examples: Errors of each kind that are written out.
        """
        kinds = kinds_to_show(self.sources)
        lines = [f"{self.name:<38}{'rows':>12}{'bad':>8}{''.join(f'{kind:>12}' for kind in kinds)}{'tokens':>16}"]
        for source in self.sources:
            path = source.path if len(source.path) <= 37 else "..." + source.path[-34:]
            tokens = "-" if source.tokens is None else f"{source.tokens:,}"
            media = "".join(f"{getattr(source, kind):>12,}" for kind in kinds)
            lines.append(f"{path:<38}{source.rows:>12,}{source.bad:>8,}{media}{tokens:>16}")
        if rows := self._total("rows"):
            for kind in kinds:
                count, rows_with = self._total(kind), self._total(f"with_{kind}")
                lines.append(
                    f"{kind}: {count:,} in {rows_with:,} of {rows:,} samples" + "; is that meant?" * (not count)
                )
        if repaired := self._total("repaired"):
            lines.append(f"notes: in {repaired:,} rows the only image was placed before the first user turn")
        for kind, errors in self.by_kind().items():
            lines += ["", f"{kind}: {len(errors):,}"]
            lines += [f"  {error}" for error in errors[:examples]]
            if len(errors) > examples:
                lines.append(f"  ... and {len(errors) - examples:,} more")
        return "\n".join(lines)

    def _total(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.sources)

    def as_data(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "sources": [{name: getattr(source, name) for name in source.__slots__} for source in self.sources],
            "errors": {
                kind: [{"source": error.source, "problem": error.problem, "fix": error.fix} for error in errors]
                for kind, errors in self.by_kind().items()
            },
        }


def check_samples(
    name: str,
    dataset: SampleDataset,
    decode: bool = False,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
) -> SplitCheck:
    """Looks at every sample of a dataset.

    Args:
        name: What the split is called.
        dataset: Its samples.
        decode: Read media in full, not their headers alone.
        num_workers: Processes that look.
        cache_dir: Where measured lengths are kept; a later fit reads them.
        show_progress: Show a progress bar on stderr.
    """
    table = measure_lengths(dataset, num_workers, cache_dir, show_progress, decode, fresh=True)
    tokens = None if isinstance(dataset, ExampleDataset) else table.tokens
    errors = {**table.errors, **_too_long(dataset, table)}
    sources, start, wrong = [], 0, np.array(sorted(errors), dtype=np.int64)
    for source in dataset.sources:
        own = slice(start, start + len(source))
        bad = int(np.searchsorted(wrong, own.stop) - np.searchsorted(wrong, own.start))
        sources.append(
            SourceCheck(
                path=source.path,
                rows=len(source),
                bad=bad,
                **{kind: int(getattr(table, kind)[own].sum()) for kind in MEDIA_KINDS},
                **{f"with_{kind}": int(np.count_nonzero(getattr(table, kind)[own])) for kind in MEDIA_KINDS},
                tokens=None if tokens is None else int(tokens[own].sum()),
                repaired=int(table.repaired[own].sum()),
            )
        )
        start = own.stop
    return SplitCheck(name, tuple(sources), tuple(error for _, error in sorted(errors.items())))


def _too_long(dataset: SampleDataset, table: LengthTable) -> dict[int, DataError]:
    """Samples that exceed the limit by themselves, as errors: to be known whatever the policy makes of them."""
    if dataset.limit is None or isinstance(dataset, ExampleDataset):
        return {}
    return {
        index: DataError(
            dataset.place(index),
            f"the sample has {table.tokens[index]:,} tokens and {table.patches[index]:,} vision patches, expected at "
            f"most {dataset.limit}",
            f"raise the limit, shorten the row, or choose what becomes of it (overlong is {dataset.overlong!r})",
            "too long",
        )
        for index in find_overlong(table, dataset.limit).tolist()
    }


def summarize_checks(checks: Sequence[SplitCheck]) -> str:
    """The last line of a report."""
    rows = sum(source.rows for check in checks for source in check.sources)
    errors = sum(len(check.errors) for check in checks)
    if not errors:
        return f"all {rows:,} samples can be used"
    return f"{errors:,} error(s) in {rows:,} samples"
