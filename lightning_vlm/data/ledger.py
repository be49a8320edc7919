"""The ledger of an epoch: every sample that was planned is seen once, skipped with a reason, or still to come.

It holds counts and checksums, not lists: the sum of a mixed number per sample tells a sample that came twice from two
that came once each, adds up over ranks, and takes no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_vlm.data.samplers import EpochPlan, Position


@dataclass(frozen=True, slots=True)
class Tally:
    """Samples by number and by checksum."""

    count: int = 0
    checksum: int = 0

    @classmethod
    def of(cls, indices: Iterable[int] | np.ndarray) -> Tally:
        """The tally of samples, by their numbers in the dataset."""
        numbers = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.uint64)
        return cls(len(numbers), int(_mixed(numbers).sum()))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, self.checksum + other.checksum)


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """An epoch's balance over all ranks.

    Attributes:
        planned: Samples of the epoch.
        earlier: Seen before the run was resumed.
        seen: Seen since.
        skipped: Left out during training.
        unreached: Not seen, because the epoch was ended early (``limit_train_batches``, ``max_steps``).
        reasons: Why this rank skipped what it skipped.
    """

    planned: Tally
    earlier: Tally
    seen: Tally
    skipped: Tally
    unreached: Tally
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def balances(self) -> bool:
        """Whether every planned sample is accounted for exactly once."""
        return self.earlier + self.seen + self.skipped + self.unreached == self.planned

    def __str__(self) -> str:
        reasons = (
            f" ({', '.join(f'{reason}: {count}' for reason, count in self.reasons.items())})" if self.reasons else ""
        )
        return (
            f"{self.planned.count} samples planned, {self.earlier.count} seen before, {self.seen.count} seen, "
            f"{self.skipped.count} skipped{reasons}, {self.unreached.count} not reached"
        )


_SUMMED_UP = 65_536


class Ledger:
    """Follows one rank through an epoch.

    Args:
        plan: The epochs' plan.
        opened: Where this run began the epoch.
        rank: This data-parallel rank.
        kept: Numbers of the samples to train on.
    """

    def __init__(self, plan: EpochPlan, opened: Position, rank: int, kept: np.ndarray) -> None:
        self.plan, self.opened, self.rank = plan, opened, rank
        self.reached = opened.yielded
        self._planned = Tally.of(kept)
        self._seen = self._skipped = Tally()
        self._just_seen: list[int] = []  # summed up now and then: a sum of a few costs as much as one of thousands
        self._reasons: Counter[str] = Counter()

    def see(self, indices: Iterable[int]) -> None:
        """Notes samples that were trained on."""
        self._just_seen += indices
        if len(self._just_seen) >= _SUMMED_UP:
            self._sum_up()

    def skip(self, indices: Iterable[int], reason: str) -> None:
        """Notes samples that were planned and not trained on."""
        tally = Tally.of(indices)
        self._skipped += tally
        self._reasons[reason] += tally.count

    def close(self, add_up: Callable[[list[int]], list[int]] = lambda numbers: numbers) -> LedgerReport:
        """The balance at the epoch's end.

        Args:
            add_up: Sums numbers over all ranks; a collective call.
        """
        self._sum_up()
        to_come = self._planned_from(replace(self.opened, yielded=self.reached))
        numbers: list[int] = []
        for tally in (self._planned_from(self.opened), self._seen, self._skipped, to_come):
            numbers += [tally.count, tally.checksum]
        from_here, seen, skipped, unreached = (Tally(*pair) for pair in np.reshape(add_up(numbers), (-1, 2)).tolist())
        begins = self.opened.yielded == 0 and not self.opened.dealt
        if begins and from_here != self._planned:  # the ranks have other plans: nothing can balance
            return LedgerReport(self._planned, Tally(), seen, skipped, unreached, dict(self._reasons))
        before = Tally(self._planned.count - from_here.count, self._planned.checksum - from_here.checksum)
        return LedgerReport(self._planned, before, seen, skipped, unreached, dict(self._reasons))

    def _sum_up(self) -> None:
        self._seen += Tally.of(self._just_seen)
        self._just_seen = []

    def _planned_from(self, position: Position) -> Tally:
        """This rank's samples from a position to the epoch's end."""
        batches = self.plan.batches(position, self.rank)
        return Tally.of([index for batch in batches if batch.counted for index in batch.indices])


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Well-spread 32-bit numbers (the finaliser of SplitMix64): their sums over 2**31 samples fit 64 bits."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return (numbers ^ (numbers >> np.uint64(31))) >> np.uint64(32)
