"""NeMo AutoModel's sampler that groups samples of similar estimated length, for those who migrate from it.

Samples are sorted once, longest first, and cut into batches; an epoch only shuffles the batches. So padding is small
and the order is simple, but a sample has the same neighbours in every epoch, and lengths are estimates. Our own path
(`VLMDataModule(sampler="length_grouped")`) measures exact lengths, mixes the groups anew each epoch and deals batches
to ranks; this sampler knows no ranks and expects each one to hold its own shard.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from lightning_vlm.automodel.estimates import (
    MediaConfig,
    _estimate_image_tokens,
    _estimate_video_tokens,
    _smart_resize_image,
    _smart_resize_video,
    estimate_tokens,
    image_config,
    video_config,
)

__all__ = ["LengthGroupedSampler", "_smart_resize_image", "_smart_resize_video"]

MAX_LENGTH_SLACK = 512
"""Estimates are rough: samples up to this much over ``max_length`` stay."""

_log = logging.getLogger(__name__)


class LengthGroupedSampler(Sampler[int]):
    """Yields indices in batches of similar length, in a random order of the batches.

    The order of an epoch is NeMo AutoModel's for the same seed, but for a last chunk that is short: it stays last,
    where NeMo shuffles it into the middle, after which every batch straddles two groups. Also unlike there, a
    ``Subset`` is measured at its own indices, and the position can be saved.

    Attributes:
        text_lengths: Estimated text tokens per sample.
        media_lengths: Estimated tokens of images and videos per sample.
        lengths: Their sums.
        sorted_indices: The samples that are kept, longest first; the lower index first among equals.

    Args:
        dataset: Raw rows, see `automodel.estimates`; wrappers are looked through as far as a list.
        seed: Seed of the order; the same on every rank.
        processor: Hugging Face processor whose image and video sizes the estimates follow.
        max_length: Leave out samples of more than this many tokens + 512, with a warning, and as many of the shortest
            as it takes to have the same number on every rank of the default process group.
        batch_size: Samples per batch, at least 1; it must be that of the loader.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int = 42,
        processor: Any = None,
        max_length: int | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        self.dataset, self.seed, self.max_length, self.batch_size = dataset, seed, max_length, max(1, batch_size)
        self.epoch = 0
        self._yielded = self._start = 0
        self._image_cfg = self._extract_image_config(processor) if processor is not None else None
        self._video_cfg = self._extract_video_config(processor) if processor is not None else None
        self.text_lengths, self.media_lengths = self._compute_or_load_lengths(dataset)
        self.lengths = [text + media for text, media in zip(self.text_lengths, self.media_lengths)]
        self.sorted_indices = self._sort()

    def __len__(self) -> int:
        """Samples of a whole epoch, also when resumed inside one."""
        return len(self.sorted_indices)

    def __iter__(self) -> Iterator[int]:
        # A generator reads the position at its first element, so a state may also be loaded after iter().
        self._yielded, self._start = self._start, 0
        for index in self._order()[self._yielded :]:
            self._yielded += 1
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch of the next iteration; a restored position inside this same epoch is kept.

        Args:
            epoch: The epoch, from 0.
        """
        if epoch != self.epoch:
            self.epoch, self._yielded, self._start = epoch, 0, 0

    def state_dict(self, yielded: int | None = None) -> dict[str, Any]:
        """The position, as plain data.

        Args:
            yielded: Samples of the epoch that were trained on. By default those that were drawn from here, which a
                loader with workers does ahead of the training loop.
        """
        return {
            "epoch": self.epoch,
            "yielded": self._yielded if yielded is None else yielded,
            "length": len(self),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly after a position; after a whole epoch, with the next one.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the samples, their order, the batch size or the seed are others, inside an epoch.
        """
        if state["yielded"] >= state["length"]:
            self.epoch, self._yielded, self._start = state["epoch"] + 1, 0, 0
            return
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the state stopped after sample {state['yielded']} of epoch {state['epoch']} of another order; to "
                "resume exactly, keep data, processor, max_length, batch_size and seed as they were"
            )
        self.epoch, self._yielded, self._start = state["epoch"], state["yielded"], state["yielded"]

    def _order(self) -> list[int]:
        """All indices of the epoch."""
        size, indices = self.batch_size, self.sorted_indices
        chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
        order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        if chunks and len(chunks[-1]) < size:
            order.remove(len(chunks) - 1)
            order.append(len(chunks) - 1)
        return [index for chunk in order for index in chunks[chunk]]

    @property
    def _fingerprint(self) -> str:
        indices = np.asarray(self.sorted_indices, dtype=np.int64).tobytes()
        return hashlib.sha256(f"{self.seed}/{self.batch_size}/".encode() + indices).hexdigest()[:16]

    def _sort(self) -> list[int]:
        lengths = np.asarray(self.lengths, dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        if self.max_length is None:
            return order.tolist()
        kept = order[lengths[order] <= self.max_length + MAX_LENGTH_SLACK]
        if len(kept) < len(order):
            _log.warning(
                "%d of %d samples are estimated at over %d + %d tokens and left out",
                len(order) - len(kept), len(order), self.max_length, MAX_LENGTH_SLACK,
            )  # fmt: skip
        count = _fewest_of_all_ranks(len(kept))
        if count < len(kept):
            _log.warning("the %d shortest samples are left out: another rank has only %d", len(kept) - count, count)
        return kept[:count].tolist()

    def _compute_or_load_lengths(self, dataset: Any) -> tuple[list[int], list[int]]:
        """Estimated (text, media) tokens of all samples, from the raw rows where they can be had.

        Args:
            dataset: The dataset. If it wraps no list it is read once from start to end, and nothing of it is kept.
        """
        raw = self._get_raw_samples(dataset)
        rows: Iterable[Any] = (dataset[index] for index in range(len(dataset))) if raw is None else raw
        tokens = [self._estimate_tokens(row) for row in rows]
        return [text for text, _ in tokens], [media for _, media in tokens]

    @staticmethod
    def _get_raw_samples(dataset: Any) -> list[Any] | None:
        """The list at the end of a chain of ``.dataset``, at the indices of every ``Subset`` on the way.

        NeMo AutoModel ignores a Subset's indices and so measures other samples than are drawn.

        Args:
            dataset: The dataset.

        Returns:
            One row per sample of ``dataset``; ``None`` where the chain ends otherwise, or a wrapper on it holds another
            number of samples than what it wraps and has no ``indices`` that would say which.
        """
        if isinstance(dataset, list):
            return dataset
        if not hasattr(dataset, "dataset"):
            return None
        raw = LengthGroupedSampler._get_raw_samples(dataset.dataset)
        if raw is None:
            return None
        if (indices := getattr(dataset, "indices", None)) is not None:
            return [raw[index] for index in indices]
        return raw if len(raw) == len(dataset) else None

    def _estimate_tokens(self, example: Mapping[str, Any]) -> tuple[int, int]:
        """Estimated (text, media) tokens of one row.

        Args:
            example: The row, see `automodel.estimates`.
        """
        return estimate_tokens(example, self._image_cfg, self._video_cfg)

    def _estimate_image_tokens(self, img_meta: Any) -> int:
        """Tokens of one image; the sampler needs a processor with an image processor.

        Args:
            img_meta: ``[height, width]``.
        """
        return _estimate_image_tokens(img_meta, self._config(self._image_cfg, "image_processor"))

    def _estimate_video_tokens(self, vid_meta: Any) -> int:
        """Tokens of one video; the sampler needs a processor with a video processor.

        Args:
            vid_meta: ``[total_frames, height, width, fps, duration_s]``.
        """
        return _estimate_video_tokens(vid_meta, self._config(self._video_cfg, "video_processor"))

    @staticmethod
    def _config(config: MediaConfig | None, name: str) -> MediaConfig:
        if config is None:
            raise ValueError(f"the sampler was made without a processor that has an {name}")
        return config

    @staticmethod
    def _extract_image_config(processor: Any) -> MediaConfig | None:
        """See `automodel.estimates.image_config`."""
        return image_config(processor)

    @staticmethod
    def _extract_video_config(processor: Any) -> MediaConfig | None:
        """See `automodel.estimates.video_config`."""
        return video_config(processor)


def _fewest_of_all_ranks(count: int) -> int:
    """The smallest count of all ranks. Gathered as objects, which works on CPU (gloo) as well as on GPUs."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    counts = [count] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return min(counts)
