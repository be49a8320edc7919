"""Packs made when asked for, from bins that were planned by estimate: NeMo AutoModel's, for those who migrate.

Nothing is tokenised before its turn, and that is the trade-off: estimates are wrong, so samples overflow their pack
when it is made. NeMo drops those; here they are counted, named and can be planned again (`requeue`). Our own path
(`VLMDataModule(packing=True)`) measures exact lengths before it plans, so nothing ever overflows.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from lightning_vlm.automodel.knapsack import greedy_knapsack
from lightning_vlm.automodel.neat_samples import (
    _aligned_length,
    _build_packed_vlm_sample,
    _compute_mrope_position_ids,
    _shift_sample,
    check_alignment,
    token_types,
)
from lightning_vlm.schema import IGNORE_INDEX

_log = logging.getLogger(__name__)


class PackedDatasetWrapper(Dataset[dict[str, Any]]):
    """Makes pack ``k`` from the samples of bin ``k`` when it is asked for, e.g. in a worker.

    Estimates are wrong, and what NeMo AutoModel then loses is dealt with here. A sample that finds no room in its pack
    is warned of and listed in `overflowed`; `requeue` gives it a pack. A sample that is longer than any pack is warned
    of and listed in `too_long`. A bin of which nothing is left gives the pack of the bin after it (so that one comes
    twice, with a warning), never one of padding alone, on which a vision tower is not called and ranks hang. What
    workers find is in shared memory, so the lists are right in the main process. A last token that is part of an image
    is kept: a padding token behind it is what the shift drops.

    Attributes:
        measured: ``(N,)`` int32 aligned length of each sample that was made so far, -1 of the others.
        left_out: Indices that the plan does not hold, by reason; `neat_pack_dataset_vlm` fills it in.

    Args:
        inner_dataset: Index -> sample, see `neat_samples`. A sample is not written to.
        bins: Indices of the samples per pack.
        pack_size: Most tokens of a pack, after the shift.
        padding_idx: Token that pads documents.
        get_rope_index: ``model.get_rope_index`` of a model with mRoPE.
        max_retries: How often a sample is read whose file fails (``OSError``), how many packs after an empty one are
            tried, and how often `robust_collate` tries. NeMo has the argument but does not use it.
        sequence_alignment: Each document is padded to a multiple of this many tokens.

    Raises:
        ValueError: If the alignment is less than 1, or a bin holds an index that the dataset has not.
        NotImplementedError: If the alignment is more than 1 with mRoPE.
        TypeError: If ``get_rope_index`` is not callable.
    """

    def __init__(
        self,
        inner_dataset: Any,
        bins: list[list[int]],
        pack_size: int,
        padding_idx: int = 0,
        get_rope_index: Callable[..., Any] | None = None,
        max_retries: int = 10,
        sequence_alignment: int = 1,
    ) -> None:
        if get_rope_index is not None and not callable(get_rope_index):
            raise TypeError(f"get_rope_index is {get_rope_index!r}; expected a function (give the rest by name)")
        self.has_mrope = get_rope_index is not None
        check_alignment(sequence_alignment, self.has_mrope)
        indices = [index for members in bins for index in members]
        size = len(inner_dataset) if hasattr(inner_dataset, "__len__") else max(indices, default=-1) + 1
        if wrong := [index for index in indices if not 0 <= index < size]:
            raise ValueError(f"bins hold index {wrong[0]}, but the dataset has {size} samples")
        self.inner, self.bins, self.pack_size, self.padding_idx = inner_dataset, bins, pack_size, padding_idx
        self.get_rope_index, self.max_retries = get_rope_index, max_retries
        self.sequence_alignment = sequence_alignment
        self.left_out: dict[str, list[int]] = {}
        self.measured = torch.full((size,), -1, dtype=torch.int32).share_memory_()
        self._overflowed = torch.zeros(size, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.bins)

    def __getitem__(self, pack_idx: int) -> dict[str, Any]:
        """Makes one pack, see `_build_packed_vlm_sample`.

        Args:
            pack_idx: Number of its bin.

        Raises:
            IndexError: If there is no such bin.
            ValueError: If nothing of this bin, nor of ``max_retries`` bins after it, fits a pack.
            RuntimeError: If a sample cannot be read.
        """
        number = range(len(self.bins))[pack_idx]
        for step in range(min(self.max_retries + 1, len(self.bins))):
            if documents := self._make_documents((number + step) % len(self.bins)):
                if step:
                    _log.warning("pack %d is empty: the pack %d bins after it is given instead", number, step)
                return _build_packed_vlm_sample(
                    documents, self.pack_size, self.padding_idx, self.has_mrope, self.sequence_alignment
                )
        raise ValueError(
            f"pack {number} is empty, and so are the {step} after it: no sample fits pack_size {self.pack_size}; "
            "raise it, or leave such samples out"
        )

    @property
    def overflowed(self) -> list[int]:
        """Samples for which there was no room in their pack: not trained on so far."""
        return self._overflowed.nonzero().flatten().tolist()

    @property
    def too_long(self) -> list[int]:
        """Samples that turned out to be longer than a pack: never trained on."""
        return (self.measured > self.pack_size).nonzero().flatten().tolist()

    def requeue(self) -> range:
        """Moves what has overflowed to new packs at the end, by its exact length, and takes out what is too long.

        To be called between epochs, on all ranks alike (what one of them found, all with the same bins use); the loader
        has to start new workers. Train on the returned packs before the epoch counts as done, and nothing was lost in
        it. After an epoch that made every pack, the same samples do not overflow again.

        Returns:
            Numbers of the new packs.
        """
        if dist.is_available() and dist.is_initialized():
            plan = zlib.crc32(repr(self.bins).encode())
            found = [(plan, self.measured, self._overflowed)] * dist.get_world_size()
            dist.all_gather_object(found, (plan, self.measured.clone(), self._overflowed.clone()))
            for other_plan, measured, overflowed in found:
                if other_plan == plan:  # a rank with a shard of its own says nothing of these samples
                    self.measured.copy_(torch.maximum(self.measured, measured))
                    self._overflowed.logical_or_(overflowed)
        moved, gone = self.overflowed, set(self.overflowed) | set(self.too_long)
        rest = [[index for index in members if index not in gone] for members in self.bins]
        new = greedy_knapsack(self.measured[moved].tolist(), self.pack_size)
        self.bins = [members for members in rest if members] + [[moved[item] for item in members] for members in new]
        self._overflowed.zero_()
        return range(len(self.bins) - len(new), len(self.bins))

    def robust_collate(self, collate_fn: Callable[[list[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
        """A collate function that gives other packs in place of those it fails on.

        NeMo AutoModel asks the inner dataset for random samples, which are no packs, so every attempt fails. Here only
        packs that fail alone are replaced, by packs of this dataset that follow from the failing one's tokens: the
        same ones on every rank that shares the data, and after a resume.

        Args:
            collate_fn: ``list of packs -> batch``.

        Returns:
            A function that raises RuntimeError from the last error after ``max_retries`` attempts, or at once where
            packs fail only together.
        """

        def fails(pack: Any) -> bool:
            try:
                collate_fn([pack])
            except Exception:  # whatever the user's function raises
                return True
            return False

        def collate(batch: Sequence[Any]) -> Any:
            packs, error, attempt = list(batch), None, 0
            while attempt < max(self.max_retries, 1):
                try:
                    return collate_fn(packs)
                except Exception as raised:
                    error, attempt = raised, attempt + 1
                broken = [place for place, pack in enumerate(packs) if fails(pack)]
                if not broken:
                    break
                _log.warning("%d of %d packs are replaced, collating failed: %s", len(broken), len(packs), error)
                for place in broken:
                    start = zlib.crc32(batch[place]["input_ids"].numpy().tobytes())
                    packs[place] = self[(start + attempt) % len(self)]
            raise RuntimeError(f"Collate failed after {attempt} retries. Last error: {error}") from error

        return collate

    def _make_documents(self, number: int) -> list[dict[str, Any]]:
        """The shifted samples of a bin that fit a pack together, first come, first served; none if they are empty."""
        documents, total = [], 0
        for index in self.bins[number]:
            sample = _end_with_text(self._read(index, number), self.padding_idx)
            if self.get_rope_index is not None:
                positions = _compute_mrope_position_ids(sample, self.get_rope_index)
                sample = sample if positions is None else {**sample, "position_ids": positions}
            document = _shift_sample(sample, self.has_mrope)
            length = _aligned_length(len(document["input_ids"]), self.sequence_alignment)
            is_new = int(self.measured[index]) != length
            self.measured[index] = length
            if length > self.pack_size:
                if is_new:
                    _log.warning("sample %d has %d tokens, more than pack_size %d", index, length, self.pack_size)
            elif total + length > self.pack_size:
                self._report_overflow(index, number)
            else:
                documents.append(document)
                total += length
        return documents if total else []

    def _report_overflow(self, index: int, number: int) -> None:
        if self._overflowed[index]:
            return
        self._overflowed[index] = True
        count = int(self._overflowed.sum())
        if count & (count - 1) == 0:  # at 1, 2, 4, ...: estimates can be wrong for thousands of samples
            _log.warning(
                "no room in their packs for %d sample(s) so far, the last being %d of pack %d; requeue() packs them",
                count,
                index,
                number,
            )

    def _read(self, index: int, number: int) -> dict[str, Any]:
        for _ in range(max(self.max_retries, 1)):
            try:
                return self.inner[index]
            except OSError as raised:  # a file system may recover, wrong data do not
                error = raised
            except IndexError as raised:  # which would end the iteration over packs as if they were all
                raise RuntimeError(f"sample {index} of pack {number} cannot be read: {raised}") from raised
        raise RuntimeError(f"sample {index} of pack {number} cannot be read, however often") from error


def _end_with_text(sample: dict[str, Any], padding_idx: int) -> dict[str, Any]:
    """Appends a padding token to a sample that ends in a media token, or the shift would leave a feature unplaced."""
    types = token_types(sample)
    if not len(types) or not types[-1]:
        return sample
    ends = {"input_ids": padding_idx, "labels": IGNORE_INDEX, "attention_mask": 1}
    longer = {key: torch.cat([sample[key], sample[key].new_tensor([end])]) for key, end in ends.items()}
    return {**sample, **longer, "mm_token_type_ids": torch.cat([types, types.new_zeros(1)])}
