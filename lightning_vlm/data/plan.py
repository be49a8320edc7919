"""What training will do with a dataset, settled before its first batch: lengths, overlong samples, batches.

Lengths are measured only where a choice needs them (packing, a sampler by length, a policy other than ``error``),
because that takes one reading of all rows and image headers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lightning_vlm.data.batching import (
    Batcher,
    FixedBatches,
    LengthGroupedBatches,
    PackedBatches,
    SubsetBatches,
    TokenBudgetBatches,
)
from lightning_vlm.data.dataset import OverlongPolicy, SampleDataset
from lightning_vlm.data.lengths import LengthTable, measure_lengths
from lightning_vlm.data.mixture import CycleBatches, members_by_epoch
from lightning_vlm.data.overlong import OverlongReport, report_overlong
from lightning_vlm.data.packing import PackBudget
from lightning_vlm.data.screening import BadSamplePolicy, find_bad_rows, named, told
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.schema import DataError, StoppingError

SamplerName = Literal["shuffle", "sequential", "length_grouped", "token_budget"]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How samples are to be batched; see `VLMDataModule` for the meaning of each."""

    sampler: SamplerName = "shuffle"
    packing: bool = False
    batch_size: int = 8
    max_tokens: int | None = None
    batch_tokens: int | None = None
    batch_patches: int | None = None
    overlong: OverlongPolicy = "error"
    seed: int = 0
    verify: Literal["rows", "headers", "decode"] = "rows"
    in_order: bool = False
    weighted: bool = False

    @property
    def shuffles(self) -> bool:
        """Whether each epoch has an order of its own."""
        return self.sampler != "sequential" and not self.in_order

    @property
    def has_budget(self) -> bool:
        """Whether batches are filled to a budget."""
        return self.packing or self.sampler == "token_budget"

    @property
    def needs_lengths(self) -> bool:
        """Whether the batches, or the policy for overlong samples, follow from lengths; or the user wants a look."""
        judged = self.sample_limit is not None
        return self.has_budget or self.sampler == "length_grouped" or judged or self.verify != "rows"

    @property
    def sample_limit(self) -> SampleLimit | None:
        """The most that one sample may be; ``None`` where the user set no number."""
        budgets = (self.batch_tokens, self.batch_patches) if self.has_budget else (None, None)
        tokens = [number for number in (self.max_tokens, budgets[0]) if number is not None]
        if not tokens and budgets[1] is None:
            return None
        return SampleLimit(min(tokens, default=2**31 - 1), budgets[1])


@dataclass(frozen=True, slots=True, eq=False)
class DataPlan:
    """A dataset and how its epochs are cut into batches.

    Attributes:
        dataset: The samples; each is checked against its length where that is known.
        batcher: Makes the batches.
        members: The samples of each epoch, in turn; one array where all epochs have the same.
        lengths: Of all samples, or ``None`` where nothing needs them.
        overlong: What became of samples over the limit; ``None`` where lengths are not known.
        budget: What a batch may hold; ``None`` without one.
        bad: Samples that are left out because they cannot be used, with the reason.
    """

    dataset: SampleDataset
    batcher: Batcher
    members: list[np.ndarray]
    lengths: LengthTable | None = None
    overlong: OverlongReport | None = None
    budget: PackBudget | None = None
    bad: dict[int, DataError] = field(default_factory=dict)

    @property
    def messages(self) -> list[str]:
        """What the user should know of samples that are left out or changed."""
        found = []
        if self.bad:
            total, errors = len(self.dataset), self.bad.values()
            found.append(
                f"{told(len(errors), total)} cannot be used and will not be trained on: {named(errors, len(errors))}"
            )
        if self.overlong is not None and self.overlong.message:
            found.append(self.overlong.message)
        return found


def plan_data(
    dataset: SampleDataset,
    options: BatchOptions,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    show_progress: bool = True,
    policy: BadSamplePolicy | None = None,
    where: str = "data",
) -> DataPlan:
    """Settles how a dataset is batched.

    Args:
        dataset: The samples.
        options: The user's choices.
        num_workers: Processes that measure.
        cache_dir: Where measured lengths are kept.
        show_progress: Show a progress bar while measuring.
        policy: What bad samples may do; the first stops it when ``None``.
        where: What errors call the dataset.

    Raises:
        DataError: If too many rows or images are not acceptable, or a sample is too long under the policy ``error``.
    """
    policy = policy or BadSamplePolicy(strict=True)
    total = len(dataset)
    lengths = overlong = None
    if options.needs_lengths:
        lengths = measure_lengths(dataset, num_workers, cache_dir, show_progress, options.verify == "decode")
        dataset, bad = dataset.with_lengths(lengths), lengths.errors
    else:
        bad = find_bad_rows(dataset, num_workers, cache_dir, show_progress)
    policy.check(bad, total, where)
    kept = np.setdiff1d(np.arange(total), list(bad), assume_unique=True)
    if not len(kept):
        raise DataError(where, f"none of the {total:,} samples can be used", "correct the data", "too many bad samples")
    if lengths is not None and (limit := options.sample_limit) is not None:
        overlong = report_overlong(dataset, lengths, limit, options.overlong)
        kept = np.setdiff1d(overlong.kept, list(bad), assume_unique=True)
    members = [kept]
    if options.weighted:
        weights = np.concatenate([np.full(len(source), source.weight) for source in dataset.sources])[kept]
        members = members_by_epoch(kept, weights, options.seed)
    if not all(len(own) for own in members):
        raise StoppingError(
            where,
            f"the weights leave an epoch of the {len(kept):,} samples empty, expected at least one sample in each",
            "raise the weights",
            "empty epoch",
        )
    budget = None
    if lengths is not None and options.has_budget:
        budget = _budget(lengths.tokens[kept].astype(np.int64), options)
    parts = [_part(own, lengths, budget, options, total) for own in members]
    batcher = parts[0] if len(parts) == 1 else CycleBatches(parts)
    return DataPlan(dataset, batcher, members, lengths, overlong, budget, bad)


def _part(
    members: np.ndarray, lengths: LengthTable | None, budget: PackBudget | None, options: BatchOptions, total: int
) -> Batcher:
    """The batcher of some samples; of all of them, one that needs no list."""
    if lengths is None:
        batcher: Batcher = FixedBatches(len(members), options.batch_size, options.shuffles, options.seed)
    else:
        tokens = lengths.tokens[members].astype(np.int64)
        patches = lengths.patches[members].astype(np.int64)
        batcher = _batcher(tokens, patches, budget, options)
    everything = len(members) == total and np.array_equal(members, np.arange(total))
    return batcher if everything else SubsetBatches(batcher, members)


def in_file_order(options: BatchOptions) -> BatchOptions:
    """The same options without any shuffling, for overfitting on the first batches; the limits stay what they are."""
    return replace(options, in_order=True)


def _budget(tokens: np.ndarray, options: BatchOptions) -> PackBudget:
    """The user's budget; by default as many tokens as ``batch_size`` samples have on average."""
    if options.batch_tokens is not None:
        return PackBudget(options.batch_tokens, options.batch_patches)
    average = math.ceil(options.batch_size * float(tokens.mean()))
    return PackBudget(max(average, int(tokens.max())), options.batch_patches)


def _batcher(tokens: np.ndarray, patches: np.ndarray, budget: PackBudget | None, options: BatchOptions) -> Batcher:
    shuffle, seed = options.shuffles, options.seed
    if options.packing and budget is not None:
        return PackedBatches(tokens, patches, budget, shuffle, seed)
    if options.sampler == "token_budget" and budget is not None:
        return TokenBudgetBatches(tokens, patches, budget, seed, shuffle)
    if options.sampler == "length_grouped" and shuffle:
        return LengthGroupedBatches(tokens, options.batch_size, seed)
    return FixedBatches(len(tokens), options.batch_size, shuffle, seed)
