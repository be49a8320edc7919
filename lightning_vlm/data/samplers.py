"""The epoch's plan: which samples form which batch on which rank, as a pure function of (seed, epoch, world size).

A position in an epoch is one integer, the number of batches done, so resuming is exact. Every rank gets the same number
of batches and every sample is seen exactly once: the last global batch is dealt out as evenly as it goes, and a rank
that gets none of it runs one stand-in sample that is not counted. That the last batches are uneven changes no gradient,
because the loss is divided by the label tokens of the whole step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

SamplerName = Literal["shuffle", "sequential"]


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
class EpochPlan:
    """Plans epochs.

    Attributes:
        num_samples: Size of the dataset.
        batch_size: Samples per rank and batch.
        world_size: Number of data-parallel ranks.
        sampler: ``shuffle`` (a new order each epoch) or ``sequential``.
        seed: Seed of the shuffle.
        data: Fingerprint of the data's content.
    """

    num_samples: int
    batch_size: int
    world_size: int = 1
    sampler: SamplerName = "shuffle"
    seed: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")

    def __len__(self) -> int:
        """Batches per rank and epoch."""
        return math.ceil(self.num_samples / (self.batch_size * self.world_size))

    @property
    def fingerprint(self) -> str:
        """Changes when a position in the plan would mean other samples."""
        text = repr((self.num_samples, self.batch_size, self.world_size, self.sampler, self.seed, self.data))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def order(self, epoch: int) -> list[int]:
        """All samples in the order of an epoch."""
        if self.sampler == "sequential":
            return list(range(self.num_samples))
        # Seeds are hashed so that (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated orders.
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def batches(self, epoch: int, rank: int = 0) -> list[PlannedBatch]:
        """The batches of one rank in an epoch.

        Args:
            epoch: The epoch, from 0.
            rank: The data-parallel rank.
        """
        order, size = self.order(epoch), self.batch_size * self.world_size
        planned = []
        for start in range(0, len(order), size):
            step = order[start : start + size]
            share, extra = divmod(len(step), self.world_size)
            first = rank * share + min(rank, extra)
            own = step[first : first + share + (rank < extra)]
            planned.append(PlannedBatch(tuple(own)) if own else PlannedBatch((step[0],), counted=False))
        return planned
