"""How an epoch's samples become micro-batches: fixed size, by length, by token budget, or packed.

A batcher is a pure function of (epoch, number of ranks) with a number of batches that no epoch changes, so a position
in it is one integer and a schedule knows its end. Batches come in the order in which ranks take them: batch
``step * world_size + rank``. Where lengths decide, the batches of one step cost about the same, so no rank waits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch

from lightning_vlm.data.packing import PackBudget, Packs, order_packs, plan_packs, reassign_equals

PATCH_COST = 0.25
"""Cost of a vision patch in tokens of the language model: RADIO-H's 0.65 billion parameters per patch beside about 3
billion active ones per token (Nemotron-3-Nano-Omni). It only balances ranks."""

_MEGABATCH = 50  # steps whose samples are sorted together: the window that transformers' length grouping uses


class Batcher(Protocol):
    """Groups the samples of an epoch."""

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """Index arrays of all micro-batches in the order of (step, rank); the last step may lack some ranks' ones."""

    def num_batches(self, world_size: int) -> int:
        """Length of `batches`, the same in every epoch."""

    @property
    def fingerprint(self) -> str:
        """Changes when a batch of it would hold other samples."""


class FixedBatches:
    """A fixed number of samples per batch, in random or file order.

    Args:
        num_samples: Size of the dataset.
        batch_size: Samples per batch.
        shuffle: Draw a new order each epoch.
        seed: Seed of the order.
    """

    def __init__(self, num_samples: int, batch_size: int, shuffle: bool = True, seed: int = 0) -> None:
        _check_batch_size(batch_size)
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """See `Batcher`; the samples of the last step are dealt out evenly."""
        order = _permutation(self.num_samples, self.seed, epoch) if self.shuffle else np.arange(self.num_samples)
        return _cut(order, self.batch_size, world_size)

    def num_batches(self, world_size: int) -> int:
        """See `Batcher`."""
        return _num_cut(self.num_samples, self.batch_size, world_size)

    @property
    def fingerprint(self) -> str:
        """See `Batcher`."""
        return fingerprint_of("fixed", self.num_samples, self.batch_size, self.shuffle, self.seed)


class LengthGroupedBatches:
    """A fixed number of samples of similar length per batch, for little padding.

    The random order of the epoch is cut into windows of 50 steps, each sorted by length: the batches of a step are
    neighbours, the steps are shuffled, and with whom a sample shares its batch changes from epoch to epoch.

    Args:
        tokens: ``(num_samples,)`` lengths.
        batch_size: Samples per batch.
        seed: Seed of the order.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seed: int = 0) -> None:
        _check_batch_size(batch_size)
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """See `Batcher`."""
        order = _permutation(len(self.tokens), self.seed, epoch)
        step = self.batch_size * world_size
        whole = len(order) // step * step  # what is left over stays random: it is the last, uneven step
        for start in range(0, whole, _MEGABATCH * step):
            window = order[start : min(start + _MEGABATCH * step, whole)]
            window[:] = window[np.argsort(self.tokens[window], kind="stable")]
        steps = order[:whole].reshape(-1, step)[_generator(self.seed, epoch, "steps").permutation(whole // step)]
        return _cut(np.concatenate([steps.reshape(-1), order[whole:]]), self.batch_size, world_size)

    def num_batches(self, world_size: int) -> int:
        """See `Batcher`."""
        return _num_cut(len(self.tokens), self.batch_size, world_size)

    @property
    def fingerprint(self) -> str:
        """See `Batcher`."""
        return fingerprint_of("length_grouped", self.tokens, self.batch_size, self.seed)


class TokenBudgetBatches:
    """As many samples of similar length per batch as fit a budget of padded tokens and of patches.

    Batches are cut from the samples in order of length, so their number and shapes are the same in every epoch; samples
    of equal length are drawn anew, and the steps are shuffled.

    Args:
        tokens: ``(num_samples,)`` lengths, none over the budget.
        patches: ``(num_samples,)`` vision patches.
        budget: Most padded tokens (samples x longest) and patches of a batch.
        seed: Seed of the order.
        shuffle: Draw anew each epoch; else the longest come first.
    """

    def __init__(
        self, tokens: np.ndarray, patches: np.ndarray, budget: PackBudget, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.tokens, self.patches, self.budget, self.seed, self.shuffle = tokens, patches, budget, seed, shuffle
        self._shapes = np.lexsort((patches, tokens))[::-1]  # longest first: a batch that is too large shows at once
        self._starts = self._cut_by_budget()

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """See `Batcher`."""
        if not self.shuffle:
            return np.split(self._shapes, self._starts[1:-1])
        rng = _generator(self.seed, epoch, "budget")
        members = reassign_equals(Packs(self._shapes, self._starts), self.tokens, self.patches, rng).members
        batches = np.split(members, self._starts[1:-1])
        whole = len(batches) // world_size
        steps = [batches[step * world_size : (step + 1) * world_size] for step in rng.permutation(whole)]
        return [batch for step in [*steps, batches[whole * world_size :]] for batch in step]

    def num_batches(self, world_size: int) -> int:
        """See `Batcher`."""
        return len(self._starts) - 1

    @property
    def fingerprint(self) -> str:
        """See `Batcher`."""
        return fingerprint_of("token_budget", self.tokens, self.patches, self.budget, self.shuffle, self.seed)

    def _cut_by_budget(self) -> np.ndarray:
        lengths, patches = self.tokens[self._shapes].tolist(), self.patches[self._shapes].tolist()
        most_patches = math.inf if self.budget.patches is None else self.budget.patches
        starts, size, used = [0], 0, 0
        for index, extra in enumerate(patches):
            longest = lengths[starts[-1]]
            if size and ((size + 1) * longest > self.budget.tokens or used + extra > most_patches):
                starts.append(index)
                size = used = 0
            size, used = size + 1, used + extra
        return np.array([*starts, len(lengths)] if lengths else [0], dtype=np.int64)


class PackedBatches:
    """Packs: whole samples one after another in one row, filled to a budget, none padded, none cut.

    The shapes of the packs are planned once. Each epoch draws anew which of the samples of equal size sits where, and
    the order of the packs.

    Args:
        tokens: ``(num_samples,)`` lengths, none over the budget.
        patches: ``(num_samples,)`` vision patches.
        budget: Most tokens and patches of a pack.
        shuffle: Draw anew each epoch.
        seed: Seed of the order.
    """

    def __init__(
        self, tokens: np.ndarray, patches: np.ndarray, budget: PackBudget, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.tokens, self.patches, self.budget, self.shuffle, self.seed = tokens, patches, budget, shuffle, seed
        self._planned: dict[int, Packs] = {}

    def packs(self, world_size: int) -> Packs:
        """The planned packs; as many as whole steps of ``world_size`` ranks take, where there are enough samples."""
        if world_size not in self._planned:
            self._planned[world_size] = plan_packs(self.tokens, self.patches, self.budget, world_size)
        return self._planned[world_size]

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """See `Batcher`."""
        packs = self.packs(world_size)
        if not self.shuffle:
            return [packs[index] for index in range(len(packs))]
        rng = _generator(self.seed, epoch, "packs")
        order = order_packs(packs.totals(self.tokens) + PATCH_COST * packs.totals(self.patches), world_size, rng)
        packs = reassign_equals(packs, self.tokens, self.patches, rng)
        return [packs[index] for index in order]

    def num_batches(self, world_size: int) -> int:
        """See `Batcher`."""
        return len(self.packs(world_size))

    @property
    def fingerprint(self) -> str:
        """See `Batcher`."""
        return fingerprint_of("packed", self.tokens, self.patches, self.budget, self.shuffle, self.seed)


class SubsetBatches:
    """Another batcher over some of the samples, after a policy has left out the others.

    Args:
        inner: Groups ``range(len(kept))``.
        kept: ``(num_kept,)`` their indices in the dataset.
    """

    def __init__(self, inner: Batcher, kept: np.ndarray) -> None:
        self.inner, self.kept = inner, kept

    def batches(self, epoch: int, world_size: int) -> list[np.ndarray]:
        """See `Batcher`."""
        return [self.kept[batch] for batch in self.inner.batches(epoch, world_size)]

    def num_batches(self, world_size: int) -> int:
        """See `Batcher`."""
        return self.inner.num_batches(world_size)

    @property
    def fingerprint(self) -> str:
        """See `Batcher`."""
        return fingerprint_of("subset", self.inner.fingerprint, self.kept)


def _cut(order: np.ndarray, batch_size: int, world_size: int) -> list[np.ndarray]:
    """Batches of ``batch_size``; the samples of the last step dealt out evenly, none to a rank that gets none."""
    step = batch_size * world_size
    whole = len(order) // step * step
    batches = list(order[:whole].reshape(-1, batch_size))
    rest = np.array_split(order[whole:], world_size) if whole < len(order) else []
    return [*batches, *(batch for batch in rest if len(batch))]


def _num_cut(num_samples: int, batch_size: int, world_size: int) -> int:
    steps, rest = divmod(num_samples, batch_size * world_size)
    return steps * world_size + min(rest, world_size)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # Seeds are hashed so that (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated orders.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(size, generator=generator).numpy()


def _generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def fingerprint_of(*parts: object) -> str:
    """A short name that changes with any of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"/")
    return digest.hexdigest()[:16]
