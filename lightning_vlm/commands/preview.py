"""``lightning-vlm preview``: some samples as the model gets them, printed, and drawn on one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.schema import DataError


def print_preview(
    datamodule: VLMDataModule,
    count: int = 5,
    split: str = "train",
    page: Path | None = None,
    indices: Sequence[int] | None = None,
    source: str | None = None,
) -> bool:
    """Prints samples and writes their page.

    Args:
        datamodule: The data as configured.
        count: How many samples, in the order in which training takes them.
        split: ``train``, ``val``, ``test`` or ``predict``.
        page: HTML file to write, or ``None``.
        indices: These samples instead.
        source: Those of this place instead, e.g. ``rows.jsonl:12``.

    Returns:
        Whether all of them can be used.

    Raises:
        DataError: If the data is not acceptable, or there is no such sample.
    """
    if not datamodule.files[split]:
        raise DataError(f"data.{split}", f"there are no {split} files, expected at least one", f"set data.{split}")
    previews = datamodule.preview(count, split, indices=indices, source=source)
    # A terminal that cannot write a character of the data is no reason to stop.
    encoding = sys.stdout.encoding or "utf-8"
    print(previews.text().encode(encoding, "backslashreplace").decode(encoding))
    if page is not None:
        print(f"\npage: {previews.save(page)}")
    return not any(preview.error for preview in previews)
