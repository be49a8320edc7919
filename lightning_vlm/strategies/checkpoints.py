"""Checkpoints of divided models: a folder to which every rank writes what it holds, of the whole model's names.

PyTorch's distributed checkpoints: weights and the states of optimizers are tensors by name and place in the whole, so
any other division reads what it needs of them; the rest is plain data, beside them in ``meta.pt``. A folder is written
beside its place and renamed when all ranks are done. Single files of undivided runs are read too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_vlm.checkpoint.atomic_io import full_disk, is_full
from lightning_vlm.checkpoint.hf_import import copy_held
from lightning_vlm.checkpoint.shards import PlainReader
from lightning_vlm.checkpoint.trained import META, OPTIMIZER, load_plain
from lightning_vlm.models.architecture import few
from lightning_vlm.schema import DataError
from lightning_vlm.strategies.ranks import from_stages
from lightning_vlm.training.movement import parameters_at_rest
from lightning_vlm.training.optimizer_state import Layout, adopt_options, join_layouts, layout, names_of, renamed


def layouts(trainer: Any, module: nn.Module) -> list[Layout]:
    """What the numbers of optimizers mean, over all stages of a pipeline; all ranks call it.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
    """
    names = names_of(module)
    return [join_layouts(from_stages(trainer, layout(optimizer, names))) for optimizer in trainer.optimizers]


def save(checkpoint: dict[str, Any], path: Path, on_rank_zero: bool) -> None:
    """Writes a folder; all ranks call it.

    Args:
        checkpoint: From the Trainer; what each rank holds is taken out of it.
        path: The folder. Until the new one is complete, it is what it was before.
        on_rank_zero: Whether this is rank 0.

    Raises:
        StoppingError: If a disk is full.
    """
    tensors: dict[str, Any] = {"state_dict": checkpoint.pop("state_dict")}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        tensors[f"{OPTIMIZER}{number}"] = state
    partial, replaced = (path.with_name(f".{path.name}.{what}") for what in ("partial", "replaced"))

    def clear() -> None:
        if replaced.exists() and not path.exists():
            replaced.rename(path)  # an earlier save was killed between its two renames
        for folder in (partial, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        torch.save(checkpoint, partial / META)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        if replaced.is_dir():
            shutil.rmtree(replaced)
        else:
            replaced.unlink(missing_ok=True)

    _by_rank_zero(clear, path, on_rank_zero)
    try:
        dcp.save(tensors, checkpoint_id=partial)
    except (Exception, CheckpointException) as error:  # the latter tells all ranks when one of them fails
        full = any(is_full(each, path.parent) for each in (error, *_failures(error)))
        if on_rank_zero:
            shutil.rmtree(partial, ignore_errors=True)
        if full:
            raise full_disk(path) from error
        raise
    _by_rank_zero(finish, path, on_rank_zero)


def _by_rank_zero(act: Callable[[], None], path: Path, on_rank_zero: bool) -> None:
    """Lets rank 0 act; where it fails all ranks raise what it raised, for none of them would hear of it otherwise."""
    failed: list[Exception | None] = [None]
    if on_rank_zero:
        try:
            act()
        except Exception as error:
            failed = [full_disk(path) if is_full(error, path.parent) else error]
            shutil.rmtree(path.with_name(f".{path.name}.partial"), ignore_errors=True)
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]


def _failures(error: BaseException) -> list[BaseException]:
    """What failed on the ranks."""
    return [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]


def load(path: Path, module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """Reads into a module and its optimizers what this rank holds of them; all ranks call it.

    Args:
        path: A folder, or a single file.
        module: The LightningModule.
        optimizers: Its optimizers; none outside of a fit.

    Returns:
        What is no tensor.

    Raises:
        DataError: If it lacks a weight.
    """
    parameters_at_rest(module)
    read = _load_folder if path.is_dir() else _load_file
    rest = read(path, module, list(optimizers))
    for optimizer, groups in zip(optimizers, rest.get("optimizer_layouts", [])):
        adopt_options(optimizer, groups)
    return rest


def _load_folder(path: Path, module: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    reader = PlainReader(path)
    stored = reader.read_metadata().state_dict_metadata
    state = module.state_dict()
    _refuse_missing(path, [name for name in state if f"state_dict.{name}" not in stored])
    wanted: dict[str, Any] = {"state_dict": state}
    names = names_of(module)
    by_parameter: dict[str, dict[str, TensorStorageMetadata]] = {}
    for key, entry in stored.items():
        if isinstance(entry, TensorStorageMetadata):
            parameter_name, _, state_name = key.rpartition(".")
            by_parameter.setdefault(parameter_name, {})[state_name] = entry
    for number, optimizer in enumerate(optimizers):
        tensors: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in (p for p in group["params"] if id(p) in names):
                for key, entry in by_parameter.get(f"{OPTIMIZER}{number}.{names[id(parameter)]}", {}).items():
                    value = _empty_state(parameter, group, tuple(entry.size), entry.properties.dtype)
                    tensors[f"{names[id(parameter)]}.{key}"] = optimizer.state[parameter][key] = value
        wanted[f"{OPTIMIZER}{number}"] = tensors
    dcp.load(wanted, storage_reader=reader)
    return load_plain(path / META)


def _load_file(path: Path, module: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    checkpoint = load_plain(path, mmap=True)
    whole, state = checkpoint.pop("state_dict"), module.state_dict()
    _refuse_missing(path, [name for name in state if name not in whole])
    for name, tensor in state.items():
        copy_held(name, tensor, whole[name])
    names = names_of(module)
    layouts = checkpoint.get("optimizer_layouts", [])
    for optimizer, saved, groups in zip(optimizers, checkpoint.pop("optimizer_states", []), layouts):
        states = renamed(saved, groups)
        for group in optimizer.param_groups:
            for parameter in (p for p in group["params"] if names.get(id(p)) in states):
                for key, value in states[names[id(parameter)]].items():
                    own = _empty_state(parameter, group, tuple(value.shape), value.dtype)
                    copy_held(f"{key} of {names[id(parameter)]}", own, value)
                    optimizer.state[parameter][key] = own
    return checkpoint


def _empty_state(parameter: Tensor, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    on_device = group.get("fused") or group.get("capturable")
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    return torch.empty(shape, dtype=dtype, device=device if on_device else "cpu")


def _refuse_missing(path: Path, missing: list[str]) -> None:
    if missing:
        raise DataError(
            str(path),
            f"it has no {few(missing)}, which the model has",
            "resume with the model (and lora) of the run that wrote it",
        )
