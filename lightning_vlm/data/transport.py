"""A batch on its way from a worker: its small tensors travel as bytes in one message, its large ones in shared memory.

torch sends every tensor of a worker as a file descriptor of its own, each fetched over a new connection: ten of them
cost the training process milliseconds per batch, whatever their size. Copying bytes is cheaper up to some size, and
shared memory beyond it.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

LARGE_BYTES = 256 * 2**10
"""Tensors from this size on keep shared memory."""


class Parcel:
    """Anything with tensors in it, packed where it is made; whoever receives it gets the thing itself.

    Args:
        content: What to send. Tensors that it holds more than once arrive as one tensor; views of one small tensor do
            not share memory any more.
    """

    def __init__(self, content: Any) -> None:
        stream = io.BytesIO()
        self._large: list[Tensor] = []
        _Packer(stream, self._large).dump(content)
        self._packed = stream.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self._packed, self._large)


class _Packer(pickle.Pickler):
    """Pickles all but large tensors, which it puts into a list."""

    def __init__(self, stream: io.BytesIO, large: list[Tensor]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._large = large

    def persistent_id(self, item: Any) -> int | None:
        """The place in the list of a tensor that is not sent as bytes."""
        if not isinstance(item, Tensor) or _is_small(item):
            return None
        self._large.append(item)
        return len(self._large) - 1

    def reducer_override(self, item: Any) -> Any:
        """Sends a small tensor as bytes: torch's own way writes ten times as many."""
        if not isinstance(item, Tensor):
            return NotImplemented
        content = item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _to_tensor, (bytearray(content), item.dtype, tuple(item.shape))


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: bytes, large: list[Tensor]) -> None:
        super().__init__(io.BytesIO(packed))
        self._large = large

    def persistent_load(self, index: int) -> Tensor:
        return self._large[index]


def _unpack(packed: bytes, large: list[Tensor]) -> Any:
    return _Unpacker(packed, large).load()


def _to_tensor(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def _is_small(tensor: Tensor) -> bool:
    """Whether its bytes, type and shape are all there is to it, and few."""
    special = tensor.requires_grad or tensor.is_nested or tensor.is_quantized or tensor.is_complex()
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu" and not special
    return plain and tensor.nbytes < LARGE_BYTES
