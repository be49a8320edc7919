"""A loader whose position is one integer, exact after a stop anywhere, with any number of workers.

It wraps torch's DataLoader but is not one, so Lightning leaves it alone. It counts batches that reached the training
loop, not those that workers have drawn; it reads its start lazily at the first batch, because Lightning may build an
iterator before it restores state. It also looks ahead by one optimizer step, to tell each micro-batch how many label
tokens the whole step has: that number divides the loss.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_vlm.data.collate import blank_sample
from lightning_vlm.data.samplers import EpochPlan, PlannedBatch, Position
from lightning_vlm.data.transport import Parcel
from lightning_vlm.schema import DataError, Sample, StoppingError, VLMBatch

_AFTER_SIGTERM_S = 60
Share = Callable[[Callable[[], Iterator[Any]], int], Iterator[Any]]


class _BatchDataset(Dataset):
    """Planned batch -> VLMBatch of its good samples, the bad ones beside it.

    An error that stops travels back as a value: raised in a worker it would be a traceback.
    """

    def __init__(
        self, samples: Any, collate: Callable[[Sequence[Any], bool], VLMBatch], strict: bool, blank: Any
    ) -> None:
        self.samples, self.collate, self.strict, self.blank = samples, collate, strict, blank

    def __getitem__(self, planned: PlannedBatch) -> VLMBatch | DataError:
        bad: list[tuple[int, DataError]] = []
        found: list[Sample] = []
        good_indices: list[int] = []
        for index in planned.indices:
            try:
                found.append(self.samples[index])
            except DataError as error:
                if self.strict or isinstance(error, StoppingError):
                    return error
                bad.append((index, error))
            else:
                good_indices.append(index)
        if found:
            batch = self.collate(found, planned.counted)
        else:  # this rank takes the step with the others all the same
            batch, good_indices = self.collate([self.blank], False), list(planned.indices[:1])
        batch.indices = torch.tensor(good_indices)
        batch.skipped = bad if planned.counted else []
        return batch


class ResumableLoader:
    """Iterates the batches of one rank, epoch after epoch.

    Args:
        samples: Map-style dataset of Samples.
        plan: The epochs' plan.
        collate: ``(samples, counted) -> VLMBatch``.
        rank: Data-parallel rank.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Pin tensors for a faster transfer to a GPU.
        micro_batches: Returns how many micro-batches form an optimizer step.
        stop: Returns how many batches of an epoch will be taken (``limit_train_batches``).
        strict: A bad sample is an error; otherwise its batch comes without it.
        blank: What stands for a batch of bad samples alone; a sample of one token by default.
        share: Takes a function that starts loading, and how many batches there are; returns the batches. Ranks that
            work on the same ones need not all load them.
    """

    def __init__(
        self,
        samples: Any,
        plan: EpochPlan,
        collate: Callable[[Sequence[Sample], bool], VLMBatch],
        rank: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        micro_batches: Callable[[], int] = lambda: 1,
        stop: Callable[[], int] | None = None,
        strict: bool = True,
        blank: Any = None,
        share: Share | None = None,
    ) -> None:
        self.plan = plan
        self._share = share
        self.rank = rank
        self.position = Position()
        self._start = Position()
        self._batches = _BatchDataset(samples, collate, strict, blank_sample(0) if blank is None else blank)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._micro_batches = micro_batches
        self._stop = stop or (lambda: len(plan))

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    @property
    def sampler(self) -> ResumableLoader:
        """Lightning calls ``loader.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch of the next iteration, unless a restored position already did."""
        if epoch != self.position.epoch:
            self.position = self._start = Position(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch, also when resumed inside one."""
        return len(self.plan)

    def __iter__(self) -> Iterator[VLMBatch]:
        return self._generate()

    def _generate(self) -> Iterator[VLMBatch]:
        self.position, self._start = self._start, Position(self._start.epoch)
        start, stop = self.position.yielded, min(self._stop(), len(self.plan))
        planned = self.plan.batches(self.position, self.rank)[: max(stop - start, 0)]
        loader = DataLoader(
            self._batches,
            batch_size=None,  # an item is a whole planned batch
            sampler=planned,
            collate_fn=Parcel if self._num_workers else _identity,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_outlive_signals,
        )
        stream = iter(loader) if self._share is None else self._share(lambda: iter(loader), len(planned))
        while self.position.yielded < stop:
            step = self._take_step(stream, self.position.yielded, stop)
            step.reverse()
            while step:
                # before the yield: the consumer never asks for a batch after the last one
                self.position = replace(self.position, yielded=self.position.yielded + 1)
                yield step.pop()  # and held no longer: the consumer moves it to a GPU

    def _take_step(self, stream: Iterator[VLMBatch | DataError], position: int, stop: int) -> list[VLMBatch]:
        """The micro-batches up to the next optimizer step, each told the step's label tokens on this rank."""
        size = self._micro_batches()
        step = []
        for item in islice(stream, min(size - position % size, stop - position)):
            if isinstance(item, DataError):
                raise item
            step.append(item)
        total = sum(batch.num_label_tokens for batch in step)
        for batch in step:
            batch.step_label_tokens = total
        return step

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, batches done in it, and the plan they belong to."""
        return self.plan.state(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a position, also one that was reached on another number of ranks.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the plan has changed since, see `EpochPlan.restore`.
        """
        self.position = self._start = self.plan.restore(state)


def _identity(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """Lets a worker go on at Ctrl-C, and for a while at a SIGTERM, which SLURM sends to all processes of a job.

    The main process finishes its batch and saves; a worker that died would make PyTorch raise in the middle of that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_AFTER_SIGTERM_S))
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))  # any other end counts as a failure
