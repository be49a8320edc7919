"""Released weights -> a model, each tensor read from its file to where it stays.

The model may be on the meta device, whole, or sharded by FSDP2 and tensor parallelism: a rank reads the rows it holds
and nothing else, so no second copy of the weights ever exists. What does not fit is told in one table before a byte is
read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tqdm import tqdm
from transformers import PreTrainedModel

from lightning_vlm.checkpoint.differences import Difference, differences_error
from lightning_vlm.checkpoint.layout import (
    Place,
    canonical_key,
    is_not_ours,
    is_optional,
    may_be_zero,
    places,
    released_shape,
)
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.models.architecture import few
from lightning_vlm.models.lora import without_adapters
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import PARTS, check_parts
from lightning_vlm.schema import DataError

_THREADS = 4


@dataclass(slots=True)
class Import:
    """What was read, and what was not.

    Attributes:
        folder: Where from.
        tensors: Tensors of the files that are in the model now.
        num_bytes: Of them, in the files.
        new: Our tensors that were made from scratch, because they were to be.
        left_aside: Tensors of the files that the model computes without.
    """

    folder: str
    tensors: int = 0
    num_bytes: int = 0
    new: list[str] = field(default_factory=list)
    left_aside: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"weights: {self.tensors:,} tensors, {self.num_bytes / 2**30:.2f} GiB from {self.folder}"
        if self.left_aside:
            text += f"; left aside: {few(self.left_aside)}"
        if self.new:
            text += f"; made from scratch: {few(self.new)}"
        return text


@dataclass(slots=True)
class ImportPlan:
    """Which tensors of the files go where. Made of the whole model, carried out after it is adapted, sharded or cut.

    Attributes:
        files: The weights.
        sources: Where each tensor of the model is read from.
        values: Of tensors that no file holds: new parts, and adapters that are added afterwards.
        report: What is read.
    """

    files: WeightFiles
    sources: dict[str, list[tuple[str, Place]]]
    values: dict[str, Tensor]
    report: Import

    def fill(self, model: NemotronVL, device: torch.device | None = None) -> Import:
        """Fills a model in place: all that it still has, and of that what this rank holds.

        Args:
            model: On the meta device or not, whole, sharded or cut, with adapters or without; its dtypes stay.
            device: Where a model on the meta device is to be; the CPU by default.
        """
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            model.to_empty(device=device or "cpu")
        state = model.state_dict(keep_vars=True)
        names = {name: without_adapters(name) for name in state}
        jobs = [(state[name], name, self.sources[own]) for name, own in names.items() if own in self.sources]
        _open_thread_pool()
        report = self.report
        with (
            tqdm(total=report.num_bytes, unit="B", unit_scale=True, desc="weights", disable=_is_quiet(report)) as bar,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            for num_bytes in pool.map(lambda job: _fill(self.files, *job), jobs):
                bar.update(num_bytes)
        for name in (made := [name for name, own in names.items() if own in self.values]):
            copy_held(name, state[name], self.values[names[name]])
        mark_loaded(model, [*made, *(name for _, name, _ in jobs)])
        return report


def plan_import(model: NemotronVL, files: WeightFiles, from_scratch: Collection[str] = ()) -> ImportPlan:
    """Finds each tensor of a model in released files, before a byte of them is read.

    Args:
        model: Whole, without adapters; on the meta device or not.
        files: The weights.
        from_scratch: Parts, or modules of parts (``vision.embeddings.video_patch_projection``), that get new random
            weights whatever the files hold.

    Raises:
        DataError: If a tensor is missing, has another shape, or the model has no place for it, or ``from_scratch``
            names what the model does not have.
    """
    new = names_from_scratch(model.state_dict(), from_scratch)
    sources, report = _match(model, files, new)
    return ImportPlan(files, sources, _random_values(model, new), report)


def import_weights(
    model: NemotronVL, files: WeightFiles, from_scratch: Collection[str] = (), device: torch.device | None = None
) -> Import:
    """Fills a model with released weights, in place.

    Args:
        model: On the meta device or not, whole or sharded; its dtypes stay.
        files: The weights.
        from_scratch: See `plan_import`.
        device: Where a model on the meta device is to be; the CPU by default.

    Raises:
        DataError: See `plan_import`; nothing was changed.
    """
    return plan_import(model, files, from_scratch).fill(model, device)


def _open_thread_pool() -> None:
    """Lets PyTorch open its own pool of threads here, before threads of ours race to be the first.

    In a forked process (ranks that a notebook launches) the pool of the parent is replaced at the first use, and two
    threads that come at once fail with "Invalid thread pool!".
    """
    torch.set_num_threads(torch.get_num_threads())


def copy_held(name: str, tensor: Tensor, whole: Tensor) -> None:
    """Copies what this rank holds of a tensor.

    Args:
        name: For errors.
        tensor: To copy to: whole, or a shard.
        whole: What the whole is to be.
    """
    local, start = _held(name, tensor)
    for dim, first in enumerate(start):
        whole = whole.narrow(dim, first, local.shape[dim])
    local.copy_(whole)


def mark_loaded(model: NemotronVL, names: Iterable[str]) -> None:
    """Initialises what was not loaded, and buffers that no file holds; transformers spares what is marked.

    Args:
        model: Not on the meta device.
        names: Of the tensors that hold weights by now.
    """
    state = model.state_dict(keep_vars=True)
    for name in names:
        state[name]._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False  # where it was made with random weights, they are not what it keeps
    model.initialize_weights()


def names_from_scratch(names: Collection[str], wanted: Iterable[str]) -> set[str]:
    """The tensors that entries of ``from_scratch`` mean.

    Args:
        names: Of all tensors of a model.
        wanted: Parts, or modules of parts.

    Raises:
        DataError: If an entry means none.
        ValueError: If it begins with no part.
    """
    chosen: set[str] = set()
    for entry in wanted:
        part, _, inside = entry.partition(".")
        check_parts([part])
        prefix = ".".join(filter(None, (PARTS[part].attribute, inside))) + "."
        found = {name for name in names if name.startswith(prefix) or name + "." == prefix}
        if not found:
            absent = prefix.rstrip(".")
            raise DataError("model.from_scratch", f"{entry!r} is named, but the model has no {absent}", "leave it out")
        chosen |= found
    return chosen


def _match(model: NemotronVL, files: WeightFiles, new: set[str]) -> tuple[dict[str, list[tuple[str, Place]]], Import]:
    """Where each tensor of the model is read from; raises if the two do not fit."""
    keys = {canonical_key(key): key for key in files}
    report = Import(str(files.folder), new=sorted(new))
    sources: dict[str, list[tuple[str, Place]]] = {}
    differences: list[Difference] = []
    used: set[str] = set()
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        wanted = places(name, shape)
        own = canonical_key(name)
        if wanted[0].key not in keys and own in keys:
            wanted = [Place(own)]  # files that keep transformers' own names
        used.update(place.key for place in wanted)
        if name in new:
            continue
        for place in wanted:
            expected = shape if place == Place(own) else released_shape(name, shape, place)
            if place.key not in keys:
                if not is_optional(place.key):
                    differences.append(Difference("missing", place.key, expected, None))
            elif (found := files[keys[place.key]].shape) != expected:
                differences.append(Difference("other shape", place.key, expected, found))
            else:
                sources.setdefault(name, []).append((keys[place.key], place))
    for key in keys.keys() - used:
        if is_not_ours(key) or is_optional(key) or (may_be_zero(key) and not files.read(keys[key]).any()):
            report.left_aside.append(key)
        else:
            differences.append(Difference("unexpected", key, None, files[keys[key]].shape))
    if differences:
        raise differences_error(str(files.folder), list(dict.fromkeys(differences)))
    _warn_of_normalisation(model, files)
    read = {key for found in sources.values() for key, _ in found}
    report.tensors, report.num_bytes = len(read), sum(files[key].num_bytes for key in read)
    report.left_aside.sort()
    return sources, report


@torch.no_grad()
def _random_values(model: NemotronVL, names: set[str]) -> dict[str, Tensor]:
    """What the model's own initialisation gives tensors, whole and on the CPU: the same for every way to shard them."""
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    values: dict[str, Tensor] = {}
    for path in sorted({name.rpartition(".")[0] for name in names}):
        twin = copy(model.get_submodule(path))
        for kind in ("_parameters", "_buffers"):
            own = {
                key: None if value is None else torch.empty(value.shape, dtype=value.dtype, device="cpu")
                for key, value in getattr(twin, kind).items()
            }
            if kind == "_parameters":
                own = {key: None if value is None else nn.Parameter(value) for key, value in own.items()}
            object.__setattr__(twin, kind, own)
            values |= {f"{path}.{key}": value.detach() for key, value in own.items() if value is not None}
        owner = max((name for name in owners if f"{path}.".startswith(f"{name}." if name else "")), key=len)
        owners[owner]._init_weights(twin)
    return {name: values[name] for name in names}


def _held(name: str, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in the whole it starts."""
    local, start = tensor.detach(), (0,) * tensor.ndim
    if isinstance(local, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
        local, start = local.to_local(), tuple(offsets)
        if tuple(local.shape) != tuple(shape):
            raise NotImplementedError(
                f"{name} is sharded as {getattr(tensor, 'placements', None)}, of which no region is contiguous"
            )
    return local, start


def _fill(files: WeightFiles, tensor: Tensor, name: str, found: list[tuple[str, Place]]) -> int:
    """Reads what this rank holds of a tensor; returns how many bytes."""
    local, start = _held(name, tensor)
    num_bytes = 0
    for key, place in found:
        if place.index is not None:
            if not start[0] <= place.index < start[0] + local.shape[0]:
                continue
            target, first = local[place.index - start[0]], start[1:]
        else:
            row = place.rows[0] if place.rows else 0
            target, first = local, (start[0] + row, *start[1:]) if start else ()
        files.read_into(target, key, first)
        num_bytes += target.numel() * files[key].dtype.itemsize
    return num_bytes


def _warn_of_normalisation(model: NemotronVL, files: WeightFiles) -> None:
    """Files may tell what pixels the tower was trained on, beside the config that serving goes by."""
    for name in ("norm_mean", "norm_std"):
        key, ours = f"vision_model.radio_model.input_conditioner.{name}", getattr(model.config, name)
        if key not in files:
            continue
        theirs = [round(value, 4) for value in files.read(key).flatten().tolist()]
        if max(abs(a - b) for a, b in zip(theirs, ours)) > 2e-3:  # bfloat16 rounds by 1e-3
            warnings.warn(
                f"{files.folder}: the tower's own {name} is {theirs}, but config.json says {ours}; the config's is "
                "used, as vLLM does",
                stacklevel=2,
            )


def _is_quiet(report: Import) -> bool | None:
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    return None if is_first and report.num_bytes > 2**30 else True
