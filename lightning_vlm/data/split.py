"""One split of the data (train, val, test or predict): its sources, opened once, and its plans, made once.

Both are made again when a file has changed on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.examples import ExampleDataset
from lightning_vlm.data.plan import BatchOptions, DataPlan, plan_data
from lightning_vlm.data.screening import BadSamplePolicy
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import DataError, StoppingError
from lightning_vlm.sources.open import SourceLike, open_sources
from lightning_vlm.sources.rows import RowSource


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How samples are read; see `VLMDataModule` for the meaning of each."""

    media_root: str | None
    media: MediaPolicy
    template_kwargs: dict[str, Any] | None
    cache_dir: str | None
    num_workers: int
    bad_samples: BadSamplePolicy
    as_examples: bool = False


class Split:
    """The sources and plans of a split.

    Args:
        name: ``train``, ``val``, ``test`` or ``predict``.
        files: What the user named.
        processor: Returns the processor; called when the first sample is needed.
    """

    def __init__(self, name: str, files: Sequence[SourceLike], processor: Callable[[], Any]) -> None:
        self.name, self.files, self._processor = name, list(files), processor
        self._sources: list[RowSource] | None = None
        self._plans: dict[BatchOptions, DataPlan] = {}
        self._told: set[str] = set()

    def open(self, reading: ReadOptions) -> None:
        """Opens what is not open, and what has changed on disk.

        Raises:
            DataError: If a file is not what it should be.
        """
        if self._sources is not None and not any(source.has_changed() for source in self._sources):
            return
        needs_answer = self.name != "predict"
        self._sources = open_sources(self.files, needs_answer, reading.media_root, reading.cache_dir)
        self._forget_plans()

    def open_each(self, reading: ReadOptions) -> list[DataError]:
        """Opens the sources that can be opened, one by one, and returns what is wrong with the others."""
        self._sources, errors = [], []
        for file in self.files:
            try:
                self._sources += open_sources([file], self.name != "predict", reading.media_root, reading.cache_dir)
            except DataError as error:
                errors.append(error)
        self._forget_plans()
        return errors

    def close(self) -> None:
        """Forgets what is open: the next `open` opens all of it, or refuses."""
        self._sources = None
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._plans.clear()
        self._told.clear()

    @property
    def sources(self) -> list[RowSource]:
        """The opened sources.

        Raises:
            ValueError: If the split has no files.
            RuntimeError: If they were not opened.
        """
        if not self.files:
            raise ValueError(f"VLMDataModule has no {self.name} files; pass {self.name}='file.jsonl'")
        if self._sources is None:
            raise RuntimeError(f"the {self.name} files are not open; call setup() first")
        return self._sources

    @property
    def fingerprint(self) -> str:
        """Changes with the content of the sources, and with how their rows are read."""
        parts = [(source.fingerprint, source.layout) for source in self.sources]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def dataset(self, options: BatchOptions, reading: ReadOptions, processor: Any) -> SampleDataset:
        """The samples, none left out."""
        ours = isinstance(processor, NemotronVLProcessor) and not reading.as_examples
        kind = SampleDataset if ours else ExampleDataset
        return kind(
            self.sources,
            processor,
            reading.media,
            options.max_tokens,
            answer=self.name == "predict",
            template_kwargs=reading.template_kwargs,
            limit=options.sample_limit,
            overlong=options.overlong,
        )

    def plan(
        self, options: BatchOptions, reading: ReadOptions, show_progress: bool, tell: Callable[[str], None] | None
    ) -> DataPlan:
        """The plan for some options, made once; each of its reports is told once.

        Args:
            options: How samples are batched.
            reading: How they are read.
            show_progress: Show a progress bar while measuring.
            tell: Takes what the user should know; ``None`` where the caller shows it.

        Raises:
            DataError: See `plan_data`.
        """
        if options not in self._plans:
            self._plans[options] = plan_data(
                self.dataset(options, reading, self._processor()),
                options,
                reading.num_workers,
                reading.cache_dir,
                show_progress,
                reading.bad_samples,
                f"data.{self.name}",
            )
        plan = self._plans[options]
        for message in plan.messages:
            if tell is not None and message not in self._told:
                self._told.add(message)
                tell(f"{self.name}: {message}")
        return plan


def check_ranks_agree(fingerprint: str, num_bad: int, world_size: int, rank: int) -> None:
    """Stops ranks that found other data, on nodes of their own: they would train on other samples, unnoticed.

    A collective call where there are several ranks.

    Args:
        fingerprint: Of this rank's plan.
        num_bad: Bad samples that this rank left out of it.
        world_size: Number of data-parallel ranks.
        rank: This one.

    Raises:
        StoppingError: If another rank has another plan.
    """
    if world_size == 1:
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (fingerprint, num_bad))
    for other, (theirs, bad) in enumerate(found):
        if theirs != fingerprint:
            raise StoppingError(
                "data.train",
                f"rank {other} plans other batches than rank {rank} ({bad} bad samples there, {num_bad} here), "
                "expected the same data on every node",
                "compare the files of the nodes (lightning-vlm check on each)",
                "ranks differ",
            )
