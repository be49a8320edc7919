"""The weights of a training checkpoint, one at a time: a single file, or a folder of shards of any number of ranks.

Nothing of a GPU, of a process group, or of the run that wrote it is needed, and a few tensors at most are in memory:
single files are mapped, and of a folder of PyTorch's distributed checkpoints each tensor is put together when it is
read.
"""

from __future__ import annotations

import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_vlm.checkpoint.shards import PlainReader
from lightning_vlm.schema import DataError
from lightning_vlm.training.optimizer_state import by_name

_PREFIX = "model."
"""Of the network inside `NemotronVLModule`."""
META = "meta.pt"
"""Where a folder keeps what is no tensor, beside the shards."""
OPTIMIZER = "optimizer_"
"""With its number: what the shards have of an optimizer, as ``<parameter>.<key>``."""
_LAST = "last.ckpt"


class TrainedWeights(Mapping[str, Tensor], ABC):
    """Weights by the names of `NemotronVL`, read when they are asked for.

    Attributes:
        path: The checkpoint.
        rest: What else is in it: hyperparameters, states of callbacks, progress.
    """

    path: Path
    rest: dict[str, Any]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """What a tensor was trained in, without reading it."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Of the `NemotronVLModule` that was trained."""
        return self.rest.get("hyper_parameters", {})

    @property
    def record(self) -> dict[str, Any]:
        """What `lightning_vlm.callbacks.record.RunRecord` left; empty where it was not there."""
        return self.rest.get("callbacks", {}).get("RunRecord", {})


class _SingleFile(TrainedWeights):
    def __init__(self, path: Path) -> None:
        self.path = path
        checkpoint = load_plain(path, mmap=True)
        state = checkpoint.pop("state_dict", None) if isinstance(checkpoint, dict) else None
        if not isinstance(state, dict):
            raise DataError(str(path), "it is no checkpoint of a training", "name a .ckpt file of a run")
        self.rest = checkpoint
        self._state = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype


class _Shards(TrainedWeights):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest = load_plain(path / META)
        prefix = f"state_dict.{_PREFIX}"
        stored = _plainly(path / ".metadata", lambda: PlainReader(path).read_metadata()).state_dict_metadata
        self._stored = {
            key.removeprefix(prefix): entry
            for key, entry in stored.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._stored[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        state = {"state_dict": {_PREFIX + name: tensor}}
        dcp.load(state, storage_reader=PlainReader(self.path), no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].properties.dtype


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a user means: itself, or the newest of a run's folder.

    Args:
        path: A checkpoint, or the folder of a run.

    Raises:
        DataError: If there is none.
    """
    path = Path(path)
    if path.is_file() or (path / META).is_file():
        return path
    for candidate in (path / _LAST, path / "checkpoints" / _LAST):
        if candidate.exists():
            return candidate
    found = f"there is no {_LAST} in it, nor in checkpoints/ below it" if path.is_dir() else "it does not exist"
    raise DataError(str(path), found, "name a checkpoint, or the folder of a run that has one")


def open_trained(path: Path) -> TrainedWeights:
    """The weights of a checkpoint.

    Args:
        path: A file, or a folder of shards.

    Raises:
        DataError: If it is no checkpoint of a `NemotronVLModule`, or it cannot be read without running its code.
    """
    weights: TrainedWeights = _Shards(path) if path.is_dir() else _SingleFile(path)
    if not weights:
        raise DataError(str(path), "it holds no weights of a NemotronVLModule", "name a checkpoint of such a run")
    return weights


def load_plain(path: Path, mmap: bool = False) -> Any:
    """A file of PyTorch's, without running code.

    Args:
        path: The file.
        mmap: Leave tensors on the disk until they are used.

    Raises:
        DataError: If there is more in it than plain data and tensors.
    """
    return _plainly(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def load_whole(path: Path) -> dict[str, Any]:
    """A folder of shards as the checkpoint that a single process would have written.

    Args:
        path: The folder.

    Raises:
        DataError: If it cannot be read without running code.
    """
    reader = _plainly(path / ".metadata", lambda: PlainReader(path))
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for key, entry in stored.items():
        kind, _, name = key.partition(".")
        if isinstance(entry, TensorStorageMetadata):
            state.setdefault(kind, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=reader, no_dist=True)
    checkpoint = load_plain(path / META)
    checkpoint["state_dict"] = state.pop("state_dict", {})
    checkpoint["optimizer_states"] = []
    for number, groups in enumerate(checkpoint.get("optimizer_layouts", [])):
        states: dict[str, dict[str, Tensor]] = {}
        for entry_name, tensor in state.get(f"{OPTIMIZER}{number}", {}).items():
            name, _, key = entry_name.rpartition(".")
            states.setdefault(name, {})[key] = tensor
        checkpoint["optimizer_states"].append(by_name(states, groups))
    return checkpoint


def _plainly(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            str(path), f"it cannot be read as plain data ({reason})", "name another checkpoint of the run"
        ) from error
