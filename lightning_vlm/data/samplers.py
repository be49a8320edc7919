"""The epoch's plan: which samples form which batch on which rank, as a pure function of (seed, epoch, world size).

A position in an epoch is one integer, the number of batches done, so resuming is exact. Every rank gets the same number
of batches and every sample is seen exactly once; a rank that the last step has no batch for runs one stand-in sample
that is not counted. That the last batches are uneven changes no gradient, because the loss is divided by the label
tokens of the whole step.

The plan is elastic: a run that was stopped inside an epoch continues it on another number of ranks. What the earlier
ranks had not taken is dealt out to the new ones, and the position is counted from the epoch's end.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_vlm.data.batching import Batcher


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One batch of one rank.

    Attributes:
        indices: Samples of the dataset.
        counted: False for a stand-in that keeps ranks in step: it has no labels and no scores.
    """

    indices: tuple[int, ...]
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the epochs of a plan.

    Attributes:
        epoch: The epoch, from 0.
        yielded: Batches of it that each rank has done, on the scale of the plan's length.
        dealt: What was taken earlier in this epoch on other numbers of ranks: (ranks, batches of each) in order.
    """

    epoch: int = 0
    yielded: int = 0
    dealt: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """Deals the batches of each epoch to ranks.

    Attributes:
        batcher: Makes the batches.
        world_size: Number of data-parallel ranks.
        data: Fingerprint of the data's content.
    """

    batcher: Batcher
    world_size: int = 1
    data: str = ""

    def __len__(self) -> int:
        """Batches per rank and epoch."""
        return math.ceil(self.batcher.num_batches(self.world_size) / self.world_size)

    @property
    def fingerprint(self) -> str:
        """Changes when a position would mean other samples; the number of ranks may change."""
        return hashlib.sha256(f"{self.batcher.fingerprint}/{self.data}".encode()).hexdigest()[:16]

    def remaining(self, position: Position) -> list[np.ndarray]:
        """The batches that no rank had taken when this number of ranks took over, in the order of (step, rank)."""
        first_world = position.dealt[0][0] if position.dealt else self.world_size
        taken = sum(ranks * batches for ranks, batches in position.dealt)
        return self.batcher.batches(position.epoch, first_world)[taken:]

    def offset(self, position: Position) -> int:
        """Where this number of ranks took over, on the scale of the plan's length: 0 at the epoch's start."""
        if not position.dealt:
            return 0
        return len(self) - math.ceil(len(self.remaining(position)) / self.world_size)

    def batches(self, position: Position, rank: int = 0) -> list[PlannedBatch]:
        """The batches of one rank from a position to the epoch's end.

        Args:
            position: Where to start.
            rank: The data-parallel rank.
        """
        batches = self.remaining(position)
        start = (position.yielded - self.offset(position)) * self.world_size
        stop = (len(self) - self.offset(position)) * self.world_size
        planned = []
        for step in range(start, stop, self.world_size):
            if step + rank < len(batches):
                planned.append(PlannedBatch(tuple(batches[step + rank].tolist())))
            else:
                stand_in = batches[min(step, len(batches) - 1)]
                planned.append(PlannedBatch((int(stand_in[0]),), counted=False))
        return planned

    def state(self, position: Position) -> dict[str, Any]:
        """A position as plain data, with all that `restore` needs to find it again."""
        return {
            "epoch": position.epoch,
            "yielded": position.yielded,
            "dealt": [list(part) for part in position.dealt],
            "world_size": self.world_size,
            "offset": self.offset(position),
            "batches": len(self),
            "fingerprint": self.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> Position:
        """The position that continues exactly after ``state``, on this plan's number of ranks.

        Args:
            state: What `state` returned, of this plan or of one that differs in the number of ranks alone.

        Raises:
            ValueError: If the plan has changed otherwise (data, budget, batch size, seed or sampler).
        """
        if state["yielded"] >= state["batches"]:  # by the plan that it belongs to, not by this one
            return Position(state["epoch"] + 1)
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint stopped after batch {state['yielded']} of epoch {state['epoch']} of another plan; to "
                "resume exactly, keep data files, processor, sampler, packing, batch_size, batch_tokens, "
                f"batch_patches, overlong and seed as they were (now: {len(self)} batches per epoch, {self.world_size} "
                "rank(s))"
            )
        dealt = tuple((ranks, batches) for ranks, batches in state["dealt"])
        if state["world_size"] == self.world_size:
            return Position(state["epoch"], state["yielded"], dealt)
        taken = state["yielded"] - state["offset"]
        if taken:
            dealt = (*dealt, (state["world_size"], taken))
        moved = Position(state["epoch"], 0, dealt)
        return Position(state["epoch"], self.offset(moved), dealt)
