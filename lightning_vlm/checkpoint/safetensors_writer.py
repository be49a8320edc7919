"""Writes safetensors files tensor by tensor, so that a model larger than memory can be written.

The format's own library wants all tensors of a file at once. Where a file is to be as another one was, its header is
taken over byte by byte; else it is made in the order that is asked for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lightning_vlm.checkpoint.weight_files import DTYPES, parse_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written.

    Attributes:
        key: Its name in the file.
        shape: Its shape.
        dtype: As it is to be stored.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def make_header(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """The bytes in front of the tensors.

    Args:
        entries: In the order in which their bytes follow.
        metadata: Of the file; transformers wants ``{"format": "pt"}``.
    """
    content: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        content[entry.key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def entries_of(header: bytes) -> list[Entry]:
    """What a header describes, in the order of the bytes.

    Args:
        header: With its length in front.
    """
    found = {key: value for key, value in parse_header(header).items() if key != "__metadata__"}
    ordered = sorted(found.items(), key=lambda item: item[1]["data_offsets"])
    return [Entry(key, tuple(value["shape"]), DTYPES[value["dtype"]]) for key, value in ordered]


def write_file(path: Path, header: bytes, read: Callable[[Entry], Tensor], done: Callable[[int], object]) -> None:
    """Writes a file, and makes sure that it is on the disk.

    Args:
        path: Where to.
        header: Of the file.
        read: Makes a tensor of the entry's shape; its dtype is changed to the entry's.
        done: Is told the bytes of each tensor that was written.
    """
    with path.open("wb") as file:
        file.write(header)
        for entry in entries_of(header):
            tensor = read(entry)
            assert tuple(tensor.shape) == entry.shape, f"{entry.key}: {tuple(tensor.shape)} for {entry.shape}"
            tensor = tensor.to(entry.dtype).contiguous()
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            done(entry.num_bytes)
        file.flush()
        os.fsync(file.fileno())
