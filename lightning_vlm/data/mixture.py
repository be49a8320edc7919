"""Sources with weights: how often an epoch takes each row, exactly, without drawing lots.

A weight of 2 takes each row twice an epoch, a weight of 0.5 one half of the rows in one epoch and the other half in the
next. After a cycle of epochs every row was taken exactly as often as its weight says, and nothing depends on what was
drawn before: an epoch's samples follow from its number, so runs resume inside any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_vlm.data.batching import Batcher, fingerprint_of

LONGEST_CYCLE = 20


def cycle_length(weights: Sequence[float]) -> int:
    """The fewest epochs in which every weight is a whole number of times.

    Args:
        weights: One per source.

    Raises:
        ValueError: If that takes more than `LONGEST_CYCLE` epochs.
    """
    for epochs in range(1, LONGEST_CYCLE + 1):
        if all(_is_whole(weight * epochs) for weight in weights):
            return epochs
    raise ValueError(
        f"the weights {', '.join(f'{weight:g}' for weight in weights)} are met exactly only after more than "
        f"{LONGEST_CYCLE} epochs; expected multiples of 0.05, or of 1/3"
    )


def members_by_epoch(indices: np.ndarray, weights: np.ndarray, seed: int) -> list[np.ndarray]:
    """The samples of each epoch of a cycle, with repeats.

    Args:
        indices: ``(num_kept,)`` samples that may be taken.
        weights: ``(num_kept,)`` their weights.
        seed: Decides which epoch takes which part of a source with a broken weight.

    Returns:
        One ascending int64 array per epoch of the cycle; their lengths differ by at most one.
    """
    epochs = cycle_length(np.unique(weights).tolist())
    times = np.rint(weights * epochs).astype(np.int64)
    each, extra = np.divmod(times, epochs)
    # Rows with an extra turn take turns in random order, each going on where the one before ended: so epochs are even.
    order = np.random.default_rng(seed).permutation(len(indices))
    first = np.zeros(len(indices), dtype=np.int64)
    first[order] = np.cumsum(extra[order]) - extra[order]
    members = []
    for epoch in range(epochs):
        taken = each + ((epoch - first) % epochs < extra)
        members.append(np.repeat(indices, taken))
    return members


class CycleBatches:
    """A batcher for each epoch of a cycle, in turn.

    Args:
        parts: One per epoch; each groups that epoch's samples.
    """

    def __init__(self, parts: Sequence[Batcher]) -> None:
        self.parts = list(parts)

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """See `Batcher`; the largest batches of an epoch that has fewer than others are cut in two."""
        batches = self.parts[epoch % len(self.parts)].batches(epoch, world_size)
        for _ in range(self.num_batches(world_size) - len(batches)):
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            if len(batches[largest]) < 2:
                break  # the plan fills up with stand-ins
            half = len(batches[largest]) // 2
            batches.append(batches[largest][half:])
            batches[largest] = batches[largest][:half]
        return batches

    def num_batches(self, world_size: int) -> int:
        """See `Batcher`."""
        return max(part.num_batches(world_size) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """See `Batcher`."""
        return fingerprint_of("cycle", *(part.fingerprint for part in self.parts))


def _is_whole(number: float) -> bool:
    return round(number) > 0 and abs(number - round(number)) <= 2e-3 * number  # 0.333 is a third
