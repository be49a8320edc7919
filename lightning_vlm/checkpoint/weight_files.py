"""Safetensors files of a folder: what is in them, and any region of any tensor read straight to where it belongs.

The safetensors library maps files into memory, which counts twice where the weights are copied out of them; reading
into the parameter itself does not. The format is one length, one JSON header, and the bytes of the tensors
(https://github.com/huggingface/safetensors#format). Pickled weights are refused: reading them can run code.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lightning_vlm.schema import DataError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What safetensors headers call the dtypes."""

_STAGED_BYTES = 64 << 20
_LARGEST_HEADER = 100 << 20  # the limit of the format's own library


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: Name of the file in the folder.
        dtype: As stored.
        shape: As stored.
        offset: Of its first byte in the file.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


class WeightFiles(Mapping[str, StoredTensor]):
    """The tensors of a folder by the names in its files.

    Args:
        folder: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and what it names.

    Attributes:
        folder: The same.
        files: Names of the files, in the index's order.
        headers: Of each file, the bytes in front of its tensors.
        index: The content of the index file; ``None`` where there is one file without an index.

    Raises:
        DataError: If there are none, or a file is missing, damaged, or holds something else than the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index: dict[str, Any] | None = None
        if (index := self.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            self.index = _read_index(index)
            self.files = list(dict.fromkeys(self.index["weight_map"].values()))
        elif (self.folder / SAFE_WEIGHTS_NAME).is_file():
            self.files = [SAFE_WEIGHTS_NAME]
        else:
            raise _no_weights(self.folder)
        self.headers: dict[str, bytes] = {}
        self._tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self.headers[file], tensors = _read_header(self.folder / file, file)
            self._tensors |= tensors
        if self.index is not None:
            self._check_index(self.index["weight_map"])

    def __getitem__(self, key: str) -> StoredTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.values())

    def read(self, key: str) -> Tensor:
        """A whole tensor, on the CPU and as stored.

        Args:
            key: Its name.
        """
        stored = self[key]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(tensor, key)
        return tensor

    def read_into(self, target: Tensor, key: str, start: tuple[int, ...] | None = None) -> None:
        """Reads a region of a tensor into another, which may be of other dtype and device.

        Where dtypes agree and the region is whole rows, the bytes go from the file to their place without a copy.

        Args:
            target: ``shape`` of the region.
            key: Name of the tensor.
            start: First element of the region along each dimension; zeros when left out.

        Raises:
            DataError: If the file ends early.
        """
        stored = self[key]
        if target.numel() == 0:
            return
        first = (start or (0,) * target.ndim)[0] if target.ndim else 0
        if not target.ndim:
            stored, target = StoredTensor(stored.file, stored.dtype, (1,), stored.offset), target.view(1)
        row = prod(stored.shape[1:])
        is_whole_rows = target.shape[1:] == stored.shape[1:]
        is_in_place = (
            is_whole_rows and target.dtype == stored.dtype and target.is_contiguous() and target.device.type == "cpu"
        )
        rows_at_once = target.shape[0] if is_in_place else max(1, _STAGED_BYTES // (row * stored.dtype.itemsize))
        columns = tuple(slice(s, s + n) for s, n in zip((start or ())[1:], target.shape[1:]))
        with FileIO(self.folder / stored.file) as file:
            for done in range(0, target.shape[0], rows_at_once):
                part = target[done : done + rows_at_once]
                offset = stored.offset + (first + done) * row * stored.dtype.itemsize
                if is_in_place:
                    _read_bytes(file, part, offset)
                    continue
                staged = torch.empty((part.shape[0], *stored.shape[1:]), dtype=stored.dtype)
                _read_bytes(file, staged, offset)
                part.copy_(staged if is_whole_rows else staged[(slice(None), *columns)])

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for key, file in weight_map.items():
            if key not in self._tensors or self._tensors[key].file != file:
                raise DataError(
                    str(self.folder / SAFE_WEIGHTS_INDEX_NAME),
                    f"it says that {key!r} is in {file}, which does not hold it",
                    "the folder is a mixture or a broken download: fetch it anew",
                )
        if unlisted := next((key for key in self._tensors if key not in weight_map), None):
            raise DataError(
                str(self.folder / SAFE_WEIGHTS_INDEX_NAME),
                f"it does not list {unlisted!r}, which {self._tensors[unlisted].file} holds",
                "the folder is a mixture or a broken download: fetch it anew",
            )


def parse_header(header: bytes) -> dict[str, Any]:
    """The JSON of a file's header.

    Args:
        header: With the eight bytes of its length in front.
    """
    return json.loads(header[8:])


def _read_header(path: Path, file: str) -> tuple[bytes, dict[str, StoredTensor]]:
    try:
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0]
            if length > _LARGEST_HEADER:
                raise ValueError(f"its header would be {length:,} bytes long")
            header = prefix + stream.read(length)
            entries = {key: entry for key, entry in parse_header(header).items() if key != "__metadata__"}
            _check_dtypes(path, entries)
            tensors = {
                key: StoredTensor(
                    file, DTYPES[entry["dtype"]], tuple(entry["shape"]), len(header) + entry["data_offsets"][0]
                )
                for key, entry in entries.items()
            }
        size = path.stat().st_size
        end = len(header) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != end:
            raise ValueError(f"it has {size:,} bytes, its header describes {end:,}")
    except FileNotFoundError as error:
        raise DataError(str(path), "the index names it, but it is not there", "fetch the folder anew") from error
    except DataError:
        raise
    except (KeyError, ValueError, struct.error, TypeError) as error:
        raise DataError(str(path), f"it is no whole safetensors file ({error})", "fetch it anew") from error
    return header, tensors


def _check_dtypes(path: Path, entries: dict[str, Any]) -> None:
    for key, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise DataError(
                str(path),
                f"{key!r} is stored as {entry['dtype']}, expected one of {', '.join(DTYPES)}",
                "name the model in another precision, or convert it",
            )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(file, str) and Path(file).name == file for file in index["weight_map"].values()):
            raise ValueError("weight_map names something else than files beside it")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(str(path), f"it is no index of weights ({error})", "fetch the folder anew") from error
    return index


def _read_bytes(file: FileIO, tensor: Tensor, offset: int) -> None:
    view: Any = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    file.seek(offset)
    while view:
        count = file.readinto(view)
        if not count:
            raise DataError(str(file.name), f"it ends at byte {file.tell():,}, inside a tensor", "fetch it anew")
        view = view[count:]


def _no_weights(folder: Path) -> DataError:
    if pickled := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        return DataError(
            str(folder),
            f"its weights are pickled ({pickled[0].name}), and reading them can run code",
            "convert them to safetensors where you trust them",
        )
    return DataError(
        str(folder),
        f"it holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}",
        "name a folder with weights, or set model.init to random to start without",
    )
