"""PyTorch's distributed checkpoints, read as plain data.

The tensors in them are; their ``.metadata`` is a pickle, which PyTorch loads as any other: it could run code. Here only
what such a file consists of is let through.
"""

from __future__ import annotations

import enum
import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class PlainReader(FileSystemReader):
    """PyTorch's reader, whose metadata is unpickled without running code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads what is stored where.

        Raises:
            UnpicklingError: If there is anything else in the file.
        """
        with (pathlib.Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Plain(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_path = module.partition(".")[0] == "pathlib" and isinstance(getattr(pathlib, name, None), type)
        if (module, name) == ("builtins", "getattr"):  # how some versions of Python write members of enums
            return _member
        if name in _ALLOWED.get(module, ()) or is_dtype or is_path:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


def _member(owner: Any, name: str) -> Any:
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"{name} of {owner!r} is no part of a checkpoint")
