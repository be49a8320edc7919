"""One pass over all samples of a dataset, in parallel, with a progress bar: what is found per sample, errors included.

An error is a finding like any other here: whether it stops anything is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_vlm.schema import DataError

_CHUNK = 256


def pass_over(
    total: int,
    look: Callable[[int], tuple[int, ...]],
    width: int,
    description: str,
    num_workers: int = 0,
    show_progress: bool = True,
) -> tuple[np.ndarray, dict[int, DataError]]:
    """Looks at every sample once.

    Args:
        total: Number of samples.
        look: ``index -> width`` numbers, or a `DataError`; runs in worker processes.
        width: How many numbers.
        description: What the progress bar says.
        num_workers: Processes that look; 0 looks in this one.
        show_progress: Show a progress bar on stderr.

    Returns:
        ``(total, width)`` int32, rows of zeros where there was an error; and the errors by index, in order.
    """
    step = max(1, min(_CHUNK, total // max(4 * num_workers, 1)))
    chunks = [range(start, min(start + step, total)) for start in range(0, total, step)]
    loader: DataLoader = DataLoader(
        _Chunks(look, width),
        batch_size=None,  # an item is a whole chunk
        sampler=chunks,
        collate_fn=_identity,
        num_workers=min(num_workers, len(chunks)),
        generator=torch.Generator(),  # not torch's own: whether findings were cached must not change a run's numbers
    )
    found = np.zeros((total, width), dtype=np.int32)
    errors: dict[int, DataError] = {}
    with tqdm(total=total, desc=description, unit=" samples", disable=not show_progress) as bar:
        for chunk, (numbers, wrong) in zip(chunks, loader):
            found[chunk.start : chunk.stop] = numbers
            errors |= wrong
            bar.update(len(chunk))
    return found, errors


class _Chunks(Dataset):
    """Indices -> what was found. Errors travel back as values: raised in a worker they would be tracebacks."""

    def __init__(self, look: Callable[[int], tuple[int, ...]], width: int) -> None:
        self.look, self.width = look, width

    def __getitem__(self, indices: range) -> tuple[np.ndarray, dict[int, DataError]]:
        numbers = np.zeros((len(indices), self.width), dtype=np.int32)
        errors = {}
        for row, index in enumerate(indices):
            try:
                numbers[row] = self.look(index)
            except DataError as error:
                errors[index] = error
        return numbers, errors


def _identity(chunk: Any) -> Any:
    return chunk
