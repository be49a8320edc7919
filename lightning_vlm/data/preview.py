"""Previews: samples as the model gets them, for a terminal, a notebook or a browser.

They are made by the code that training calls, in the order in which training takes them. So a preview costs what the
start of a training costs: where batches follow from lengths, all lengths are measured once.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.plan import DataPlan
from lightning_vlm.data.preview_page import render_fragment, render_page, render_text
from lightning_vlm.data.preview_sample import Preview, preview_sample
from lightning_vlm.data.samplers import EpochPlan
from lightning_vlm.schema import DataError, Sample, file_of


class Previews(Sequence[Preview]):
    """Previews of several samples; a notebook shows them by itself, ``print`` writes them to a terminal.

    Args:
        items: The previews.
        title: What they are previews of.
        notes: What a reader should know of the data.
    """

    def __init__(self, items: Sequence[Preview], title: str, notes: Sequence[str] = ()) -> None:
        self.items, self.title, self.notes = tuple(items), title, tuple(notes)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Preview: ...

    @overload
    def __getitem__(self, index: slice) -> Previews: ...

    def __getitem__(self, index: int | slice) -> Preview | Previews:
        if isinstance(index, slice):
            return Previews(self.items[index], self.title, self.notes)
        return self.items[index]

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Previews({self.title!r}, {len(self)} samples)"

    def _repr_html_(self) -> str:
        return render_fragment(self.items, self.title, self.notes)

    def text(self, color: bool | None = None) -> str:
        """For a terminal.

        Args:
            color: Write ANSI colours; by default where stdout is a terminal that shows them and ``NO_COLOR`` is not
                set. Without colours trained text stands in brackets.
        """
        return render_text(self.items, self.title, self.notes, _shows_colors() if color is None else color)

    def html(self) -> str:
        """One self-contained page."""
        return render_page(self.items, self.title, self.notes)

    def save(self, path: str | Path) -> Path:
        """Writes the page; whoever reads the file meanwhile sees the old one or the new one, never a part.

        Args:
            path: Where to; its folder is made.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            unfinished.write_text(self.html(), encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path


def make_previews(
    plan: DataPlan,
    order: EpochPlan,
    count: int = 5,
    split: str = "train",
    indices: Sequence[int] | None = None,
    source: str | None = None,
) -> Previews:
    """Previews of some samples of a split.

    Args:
        plan: The split's plan.
        order: How its epochs are taken.
        count: How many: the first ones of the first epoch, in the order in which all ranks take them.
        split: What the split is called.
        indices: These samples instead, by their numbers in the split.
        source: Those of this place instead, the first ``count`` in the order of the data: ``file:line``, or a file.

    Returns:
        The previews, bad samples in their places.

    Raises:
        DataError: If there is no such sample, or the samples are no Samples: those for another family's processor.
    """
    dataset, where = plan.dataset, f"data.{split}"
    if count < 1:
        raise DataError(where, f"{count} samples were asked for, expected at least 1", "ask for more")
    if indices is not None:
        chosen = list(indices)
    elif source is not None:
        chosen = list(islice(_at_place(dataset, source), count))
        if not chosen:
            raise DataError(where, f"no sample is at {source!r}", "name file:line or a file, as errors do")
    else:
        chosen = [int(index) for batch in order.batcher.batches(0, order.world_size) for index in batch][:count]
    for index in chosen:
        if not 0 <= index < len(dataset):
            raise DataError(where, f"there is no sample {index}, expected 0 to {len(dataset) - 1}", "name another")
    items = [_preview(dataset, index, where) for index in chosen]
    shown = f"{len(items)} of {len(dataset):,} samples"
    return Previews(items, f"{split}: {shown}, as the model gets them", plan.messages)


def _preview(dataset: SampleDataset, index: int, where: str) -> Preview:
    try:
        sample = dataset[index]
    except DataError as error:
        return Preview(index, dataset.place(index), error=error)
    if not isinstance(sample, Sample):
        raise DataError(
            where,
            "the tokens of its samples are made by another family's collate function, expected those of a "
            "NemotronVLProcessor",
            "look at the batches of train_dataloader() instead",
        )
    return preview_sample(sample, index, dataset.processor)


def _at_place(dataset: SampleDataset, source: str) -> Iterator[int]:
    """Samples whose place, or whose file, is ``source`` or ends with it as a path does."""
    for index in range(len(dataset)):
        place = dataset.place(index)
        if any(name == source or name.endswith(f"/{source}") for name in (place, file_of(place))):
            yield index


def _shows_colors() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
