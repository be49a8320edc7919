"""What an epoch will consist of, in numbers, as text and as a picture: samples, batches, fill, steps, the largest.

Made from the plan alone, so it is known before a model exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_vlm.data.batching import PATCH_COST, FixedBatches
from lightning_vlm.data.lengths import MEDIA_KINDS, LengthTable, kinds_to_show
from lightning_vlm.data.packing import PackBudget
from lightning_vlm.data.plan import DataPlan

_LARGEST = 5


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """One file of the dataset, dropped samples left out."""

    path: str
    samples: int
    tokens: int
    images: int
    videos: int
    sounds: int


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """One micro-batch.

    Attributes:
        tokens: Its real tokens.
        patches: Its vision patches.
        samples: Its samples.
        longest: ``file:line`` of its longest sample.
    """

    tokens: int
    patches: int
    samples: int
    longest: str


@dataclass(frozen=True, slots=True, eq=False)
class PlanSummary:
    """An epoch of training in numbers.

    Attributes:
        sources: Per file.
        dropped: Samples that are left out because they exceed a limit.
        bad: Samples that are left out because they cannot be used.
        cycle: Epochs after which the same samples come again: more than 1 with broken weights.
        scaled: Samples whose images are made smaller, or texts cut, to fit.
        packed: Whether rows are packed.
        budget: What a batch may hold, or ``None``.
        world_size: Data-parallel ranks.
        num_batches: Micro-batches of all ranks.
        steps: Micro-batches of each rank.
        tokens: ``(num_kept,)`` length of each sample.
        batch_tokens: ``(num_batches,)`` real tokens of each batch.
        computed_tokens: Tokens of the epoch that the language model computes, padding included.
        padded_tokens: The same if ``batch_size`` random samples were padded to the longest of them.
        imbalance: Cost of the costliest rank over the mean of its step, at worst, and on average.
        largest: The batches of most tokens and patches.
    """

    sources: tuple[SourceSummary, ...]
    dropped: int
    bad: int
    cycle: int
    scaled: int
    packed: bool
    budget: PackBudget | None
    world_size: int
    num_batches: int
    steps: int
    tokens: np.ndarray
    batch_tokens: np.ndarray
    computed_tokens: int
    padded_tokens: int
    imbalance: tuple[float, float]
    largest: tuple[BatchSummary, ...]

    @property
    def fill(self) -> float:
        """Real tokens over the budget of all batches; over computed tokens where there is no budget."""
        capacity = self.computed_tokens
        if self.budget is not None:
            capacity = self.budget.tokens * self.num_batches
        return int(self.tokens.sum()) / max(capacity, 1)

    def headline(self) -> str:
        """One line for the start of a run."""
        what = "packs" if self.packed and self.budget else "packed rows" if self.packed else "batches"
        saved = 1 - self.computed_tokens / max(self.padded_tokens, 1)
        text = f"{len(self.tokens):,} samples, {int(self.tokens.sum()):,} tokens in {self.num_batches:,} {what}"
        if self.budget is not None:
            text += f" of at most {self.budget.tokens:,} tokens, {100 * self.fill:.1f} % full"
        return f"{text}; {100 * saved:.1f} % fewer tokens to compute than padded batches"

    def text(self) -> str:
        """All numbers, as aligned lines."""
        kinds = kinds_to_show(self.sources)
        rows = [
            ("samples", f"{len(self.tokens):,}" + self._left_out()),
            ("tokens", f"{int(self.tokens.sum()):,} (longest {int(self.tokens.max(initial=0)):,})"),
            *((kind, f"{sum(getattr(source, kind) for source in self.sources):,}") for kind in kinds),
            ("packs" if self.packed else "batches", f"{self.num_batches:,} of {self._budget()}"),
            ("fill", f"{100 * self.fill:.2f} %"),
            ("computed", f"{self.computed_tokens:,} tokens; padded batches would compute {self.padded_tokens:,}"),
            ("steps", f"{self.steps:,} micro-batches per epoch on each of {self.world_size} rank(s)"),
            (
                "balance",
                f"costliest rank at most {self.imbalance[0]:.3f} of a step's mean ({self.imbalance[1]:.3f} on average)",
            ),
        ]
        lines = [f"{name:<10}{value}" for name, value in rows]
        lines += ["", f"{'source':<40}{'samples':>12}{'tokens':>14}{''.join(f'{kind:>12}' for kind in kinds)}"]
        lines += [
            f"{_shortened(source.path, 39):<40}{source.samples:>12,}{source.tokens:>14,}"
            + "".join(f"{getattr(source, kind):>12,}" for kind in kinds)
            for source in self.sources
        ]
        lines += ["", f"{'largest':<12}{'tokens':>12}{'patches':>12}{'samples':>12}   longest sample"]
        lines += [
            f"{'':<12}{batch.tokens:>12,}{batch.patches:>12,}{batch.samples:>12,}   {batch.longest}"
            for batch in self.largest
        ]
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Draws the lengths of samples and the fill of batches.

        Args:
            path: A PNG file; its folder is made.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.2), layout="constrained")
        samples, batches = figure.subplots(1, 2)
        samples.hist(self.tokens, bins=50, color="#4477aa")
        samples.set(xlabel="tokens of a sample", ylabel="samples", yscale="log")
        batches.hist(self.batch_tokens, bins=50, color="#228833")
        batches.set(xlabel="real tokens of a " + ("pack" if self.packed else "batch"), ylabel="batches")
        if self.budget is not None:
            batches.axvline(self.budget.tokens, color="#aa3377", label=f"budget {self.budget.tokens:,}")
            batches.set_xlim(left=0)
            batches.legend(loc="upper left")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def _left_out(self) -> str:
        numbers = {"bad": self.bad, "dropped": self.dropped, "made smaller": self.scaled}
        said = [f"{number:,} {name}" for name, number in numbers.items() if number]
        if self.cycle > 1:
            said.append(f"other ones in each of {self.cycle} epochs")
        return f" ({', '.join(said)})" if said else ""

    def _budget(self) -> str:
        if self.budget is None:
            return "a fixed number of samples"
        patches = "" if self.budget.patches is None else f" and {self.budget.patches:,} patches"
        return f"at most {self.budget.tokens:,} tokens{patches}"


def summarize(plan: DataPlan, lengths: LengthTable, world_size: int, batch_size: int, packed: bool) -> PlanSummary:
    """Counts the first epoch of a plan.

    Args:
        plan: The plan.
        lengths: Of its samples.
        world_size: Data-parallel ranks.
        batch_size: Of the padded batches that it is compared with.
        packed: Whether rows are packed.
    """
    tokens, patches = lengths.tokens.astype(np.int64), lengths.patches.astype(np.int64)
    kept = plan.members[0]
    if lengths.errors:  # what a plan without lengths cannot know
        kept = kept[~np.isin(kept, list(lengths.errors))]
    batches = plan.batcher.batches(0, world_size)
    batch_tokens, batch_patches = _totals(batches, tokens), _totals(batches, patches)
    computed = int(batch_tokens.sum()) if packed else _padded(batches, tokens)
    cost = batch_tokens + PATCH_COST * batch_patches
    order = np.lexsort((batch_patches, batch_tokens))[::-1][:_LARGEST]
    return PlanSummary(
        sources=tuple(_per_source(plan, lengths, kept)),
        dropped=0 if plan.overlong is None else len(plan.overlong.dropped),
        bad=len(lengths.errors | plan.bad),
        cycle=len(plan.members),
        scaled=int(lengths.scaled[kept].sum()),
        packed=packed,
        budget=plan.budget,
        world_size=world_size,
        num_batches=len(batches),
        steps=math.ceil(len(batches) / world_size),
        tokens=tokens[kept],
        batch_tokens=batch_tokens,
        computed_tokens=computed,
        padded_tokens=_padded(
            [kept[batch] for batch in FixedBatches(len(kept), batch_size).batches(0, world_size)], tokens
        ),
        imbalance=_imbalance(cost, world_size),
        largest=tuple(
            BatchSummary(
                int(batch_tokens[index]),
                int(batch_patches[index]),
                len(batches[index]),
                plan.dataset.place(int(batches[index][tokens[batches[index]].argmax()])),
            )
            for index in order
        ),
    )


def _totals(batches: Sequence[np.ndarray], values: np.ndarray) -> np.ndarray:
    starts = np.cumsum([0, *map(len, batches)])[:-1]
    return np.add.reduceat(values[np.concatenate(batches)], starts)


def _padded(batches: Sequence[np.ndarray], tokens: np.ndarray) -> int:
    return sum(len(batch) * int(tokens[batch].max()) for batch in batches)


def _imbalance(cost: np.ndarray, world_size: int) -> tuple[float, float]:
    whole = cost[: len(cost) // world_size * world_size].reshape(-1, world_size)
    if not len(whole):
        return 1.0, 1.0
    over = whole.max(axis=1) / whole.mean(axis=1)
    return float(over.max()), float(over.mean())


def _per_source(plan: DataPlan, lengths: LengthTable, kept: np.ndarray) -> list[SourceSummary]:
    summaries, start = [], 0
    for source in plan.dataset.sources:
        own = kept[(kept >= start) & (kept < start + len(source))]
        start += len(source)
        totals = {name: int(getattr(lengths, name)[own].sum()) for name in ("tokens", *MEDIA_KINDS)}
        summaries.append(SourceSummary(str(source.path), len(own), **totals))
    return summaries


def _shortened(path: str, width: int) -> str:
    return path if len(path) <= width else "..." + path[-(width - 3) :]
