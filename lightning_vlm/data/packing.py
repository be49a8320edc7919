"""Sequence packs: which samples share a row of at most so many tokens and vision patches, and in which order.

The plan is made once per number of ranks (`plan_packs`, the search is in `lightning_vlm.data.bin_packing`); every epoch
draws anew which samples of equal size sit where and how the packs follow each other, which is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_vlm.data.bin_packing import assign_packs, group_by_pack, stable_order

UNLIMITED = 1 << 40  # the budget of patches where none is set: no pack reaches it


@dataclass(frozen=True, slots=True)
class PackBudget:
    """What one pack may hold.

    Attributes:
        tokens: Most tokens.
        patches: Most vision patches; None for no limit.
    """

    tokens: int
    patches: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or (self.patches is not None and self.patches < 0):
            raise ValueError(f"a pack of {self.tokens} tokens and {self.patches} patches holds nothing")


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Samples of each pack, as two flat arrays.

    Attributes:
        members: ``(num_samples,)`` int64 sample indices, pack after pack.
        starts: ``(num_packs + 1,)`` int64; pack ``i`` is ``members[starts[i] : starts[i + 1]]`` and never empty.
    """

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        index %= len(self)
        return self.members[self.starts[index] : self.starts[index + 1]]

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums of ``values`` (one per sample) per pack: ``(num_packs,)``."""
        values = np.asarray(values)
        dtype = np.int64 if values.dtype.kind in "biu" else np.float64
        if not len(self):
            return np.zeros(0, dtype)
        return np.add.reduceat(values[self.members].astype(dtype), self.starts[:-1])


def plan_packs(tokens: np.ndarray, patches: np.ndarray, budget: PackBudget, multiple_of: int = 1) -> Packs:
    """Packs all samples into few packs with near-equal loads. Deterministic.

    Args:
        tokens: ``(num_samples,)`` tokens per sample, at least 1.
        patches: ``(num_samples,)`` vision patches per sample, 0 for text.
        budget: Most tokens and patches of a pack.
        multiple_of: The number of packs is rounded up to a multiple of this (the world size), or to ``num_samples``
            where the multiple is larger, because no pack is empty.
    """
    tokens, patches = np.asarray(tokens, dtype=np.int64), np.asarray(patches, dtype=np.int64)
    if tokens.ndim != 1 or tokens.shape != patches.shape or multiple_of < 1:
        raise ValueError(
            f"tokens {tokens.shape}, patches {patches.shape}, multiple_of {multiple_of} do not go together"
        )
    if not len(tokens):
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    most = UNLIMITED if budget.patches is None else budget.patches
    wrong = (tokens < 1) | (patches < 0) | (tokens > budget.tokens) | (patches > most)
    if wrong.any():
        index = int(wrong.argmax())
        own, bounds = f"{tokens[index]} tokens and {patches[index]} patches", f"{budget.tokens} and {budget.patches}"
        raise ValueError(f"sample {index} has {own}; expected at least 1 and 0, at most {bounds}")
    # Without pictures the second row would only cost time.
    sizes = np.stack([tokens, patches]) if patches.any() else tokens[None]
    pack_of, count = assign_packs(sizes, np.array([[budget.tokens], [most]])[: len(sizes)], multiple_of)
    return Packs(*group_by_pack(pack_of, count))


def reassign_equals(packs: Packs, tokens: np.ndarray, patches: np.ndarray, rng: np.random.Generator) -> Packs:
    """Draws anew which of the samples of equal size sits where; the packs keep their number and their totals.

    Args:
        packs: The plan.
        tokens: ``(num_samples,)`` as it was planned.
        patches: ``(num_samples,)`` as it was planned.
        rng: Decides.
    """
    if not len(packs):
        return packs
    kind = np.asarray(tokens, dtype=np.int64) * (int(np.max(patches)) + 1) + patches
    drawn = rng.permutation(len(kind))
    members = np.empty_like(packs.members)
    members[stable_order(kind[packs.members])] = drawn[stable_order(kind[drawn])]
    return Packs(members, packs.starts)


def order_packs(cost: np.ndarray, world_size: int, rng: np.random.Generator, imbalance: float = 1.05) -> np.ndarray:
    """A random order of packs in which the packs of one step cost about the same.

    A random order is sorted by cost inside windows of as few steps as suffice; then the steps, and the ranks in each,
    are shuffled: an epoch does not go from small to large.

    Args:
        cost: ``(num_packs,)`` time of each pack, in any unit.
        world_size: Ranks; the pack at position ``s * world_size + r`` is the one of rank ``r`` in step ``s``.
        rng: Decides.
        imbalance: Highest cost / mean cost of a step at which the windows stop growing.

    Returns:
        ``(num_packs,)`` int64 pack indices; a last, partial step is made of random packs.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; expected at least 1")
    cost = np.asarray(cost)
    drawn, num_steps = rng.permutation(len(cost)), len(cost) // world_size
    if num_steps == 0 or world_size == 1:
        return drawn
    # As integers their sums, and so the decision when to stop, are the same on every rank's machine.
    fixed = (cost * (2.0**22 / max(float(cost.max()), 1e-30))).astype(np.int64)
    whole, rest = drawn[: num_steps * world_size], drawn[num_steps * world_size :]
    steps, width = whole.reshape(num_steps, world_size), 1
    while width < num_steps:
        costs = fixed[steps]
        if (costs.max(1) * world_size <= imbalance * costs.sum(1)).all():
            break
        width *= 2
        window = np.arange(len(whole)) // (width * world_size)
        steps = whole[stable_order((window << 23) + fixed[whole])].reshape(num_steps, world_size)
    steps = rng.permuted(steps[rng.permutation(num_steps)], axis=1)
    return np.concatenate([steps.ravel(), rest])
