"""A collate function that survives a bad example by collating another in its place, the same one always.

NeMo AutoModel draws a whole new batch at random: the hard example is lost in every epoch, easy ones come more often,
ranks that share a sequence draw differently, and a resumed run is another run. Here only the bad example is replaced,
by one that follows from the seed, the epoch and the example's index. `VLMDataModule` does neither: it skips a bad row,
reports it, and keeps ranks in step.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

_log = logging.getLogger(__name__)

_INDEX_KEYS = ("index", "idx", "_index", "id")


class RobustCollate:
    """What `make_robust_collate` returns. An object, so that workers can be sent it and the epoch can be set.

    Args:
        dataset: Index -> example; has a length.
        collate_fn: ``examples -> batch``.
        max_retries: Attempts.
        seed: Of the replacements.

    Attributes:
        epoch: Of the replacements; set by `set_epoch`, before workers start.

    Raises:
        ValueError: If the dataset is empty, or there is no attempt.
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[list[Any]], Any], max_retries: int = 10, seed: int = 0
    ) -> None:
        if len(dataset) < 1 or max_retries < 1:
            raise ValueError(f"the dataset has {len(dataset)} examples and max_retries is {max_retries}; expected >= 1")
        self.dataset, self.collate_fn, self.max_retries, self.seed, self.epoch = (
            dataset,
            collate_fn,
            max_retries,
            seed,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that replacements follow from. Workers that persist keep the one they were started with.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch

    def __call__(self, examples: Sequence[Any]) -> Any:
        """Collates, replacing what fails by itself; all examples where only their combination fails.

        Args:
            examples: Of the dataset; they are not changed.

        Raises:
            RuntimeError: From the last error, after ``max_retries`` attempts.
        """
        chosen, error = list(examples), None
        for attempt in range(1, self.max_retries + 1):
            try:
                return self.collate_fn(list(chosen))
            except Exception as raised:  # whatever the user's function raises
                error = raised
            reasons = [self._reason(example) for example in chosen]
            if not any(reasons):
                reasons = [f"only together: {error}"] * len(chosen)
            for place, reason in enumerate(reasons):
                if reason:
                    index = self.replacement(examples[place], attempt)
                    _log.warning("example %s is replaced by %d: %s", _name(examples[place]), index, reason)
                    try:
                        chosen[place] = self.dataset[index]
                    except Exception as raised:  # the next attempt takes the next one
                        _log.warning("example %d cannot be read: %s", index, raised)
        raise RuntimeError(f"Collate failed after {self.max_retries} retries. Last error: {error}") from error

    def replacement(self, example: Any, attempt: int = 1) -> int:
        """Index of the example that stands in for one: a function of seed, epoch and the example alone.

        Args:
            example: The bad one. Its own index (key ``index``, ``idx``, ``_index`` or ``id``) names it, or else its
                content does.
            attempt: Later attempts take others.
        """
        text = f"{self.seed}/{self.epoch}/{_identity(example)}"
        start = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return (start + attempt - 1) % len(self.dataset)

    def _reason(self, example: Any) -> str | None:
        try:
            self.collate_fn([example])
        except Exception as error:  # as above
            return f"{type(error).__name__}: {error}"
        return None


def make_robust_collate(
    dataset: Any, collate_fn: Callable[[list[Any]], Any], max_retries: int = 10, *, seed: int = 0
) -> RobustCollate:
    """Wraps a collate function so that a bad example does not end the run.

    Which example is bad, why, and what stands in for it are warned of. Replacements are never random: the same on every
    rank that has the example, and after a resume. `VLMDataModule` skips bad rows by itself and needs none of this.

    Args:
        dataset: Index -> example, from which replacements come.
        collate_fn: ``examples -> batch``.
        max_retries: Attempts, then RuntimeError.
        seed: Of the replacements.

    Returns:
        ``examples -> batch``, with ``set_epoch(epoch)`` to be called before each epoch's workers start.
    """
    return RobustCollate(dataset, collate_fn, max_retries, seed)


def _name(example: Any) -> str:
    keys = _INDEX_KEYS if isinstance(example, Mapping) else ()
    named = next((example[key] for key in keys if example.get(key) is not None), None)
    return f"without an index ({_identity(example)[:12]})" if named is None else repr(named)


def _identity(example: Any) -> str:
    """The index of an example, or a digest of what it holds: the same in every process."""
    if isinstance(example, Mapping):
        for key in _INDEX_KEYS:
            if example.get(key) is not None:
                return f"{key}={example[key]}"
    digest = hashlib.sha256()
    _feed(digest, example)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Adds a value to a digest by what it holds, never by its address."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest.update(b"[")
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        _feed(digest, value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        digest.update(repr(value).encode())
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # a PIL image
        digest.update(f"{value.size}{getattr(value, 'mode', '')}".encode())
        try:
            digest.update(value.tobytes())
        except Exception:  # a damaged file, which may be why the example is bad: its size has to do
            digest.update(b"?")
    else:
        digest.update(type(value).__name__.encode())
