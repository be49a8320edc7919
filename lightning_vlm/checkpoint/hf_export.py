"""Trained weights -> a folder as released: names, files, dtypes and their order as the base model has them.

What the model computes without comes from the base byte by byte, and what was not trained goes through a training
unchanged where its precision holds it, so a model that was imported and exported again is the same files. Tensors pass
one at a time; the folder appears under its name when it is complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lightning_vlm.checkpoint.differences import Difference, differences_error
from lightning_vlm.checkpoint.hf_import import names_from_scratch
from lightning_vlm.checkpoint.layout import (
    Shape,
    Stretch,
    canonical_key,
    is_implied,
    is_not_ours,
    is_optional,
    may_be_zero,
    released_tensors,
    stays_float32,
)
from lightning_vlm.checkpoint.model_card import CARD, TAG, has_card
from lightning_vlm.checkpoint.safetensors_writer import Entry, entries_of, make_header, write_file
from lightning_vlm.checkpoint.trained import TrainedWeights
from lightning_vlm.checkpoint.weight_files import WeightFiles, parse_header
from lightning_vlm.schema import DataError

SHARD_BYTES = 5_000_000_000
"""Of a file, where no base says how weights are split; transformers' default."""

_KEPT = 2
"""Trained tensors that stay in memory: those of experts are asked for expert after expert, of two projections."""

Joined = tuple[Shape, list[Stretch]]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Which file gets what.

    Attributes:
        files: Header of each file, by its name.
        trained: By key, what a tensor is joined from.
        index: Content of the index file; ``None`` for a single file.
    """

    files: dict[str, bytes]
    trained: dict[str, Joined]
    index: bytes | None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.num_bytes for header in self.files.values() for entry in entries_of(header))

    @property
    def dtype(self) -> torch.dtype:
        """Of the largest tensor: what a config calls the model's."""
        entries = [entry for header in self.files.values() for entry in entries_of(header)]
        return max(entries, key=lambda entry: entry.num_bytes).dtype


def plan_weights(trained: TrainedWeights, base: WeightFiles | None, dtype: torch.dtype | None = None) -> WeightPlan:
    """Decides what is written where, before anything is.

    Args:
        trained: The weights.
        base: Of the model that the training began with; ``None`` if it began with none.
        dtype: Of all weights but those that stay in float32; by default as in the base, or as trained.

    Raises:
        DataError: If trained weights and base are of different models.
    """
    released = released_tensors({name: trained.shape(name) for name in trained})
    if base is None:
        _check_implied(trained, trained)
        return _plan_anew(trained, {key: joined for key, joined in released.items() if not is_implied(key)}, dtype)
    new = names_from_scratch(list(trained), trained.hyperparameters.get("from_scratch") or ())
    own = {canonical_key(name): (trained.shape(name), [Stretch(name)]) for name in trained}
    found = {key: joined for key in base if (joined := released.get(canonical_key(key)) or own.get(canonical_key(key)))}
    differences = [
        Difference("other shape", key, shape, base[key].shape)
        for key, (shape, stretches) in found.items()
        if shape != base[key].shape and not all(stretch.name in new for stretch in stretches)
    ]
    differences += [
        Difference("unexpected", key, None, base[key].shape)
        for key in base
        if key not in found and not _is_handed_on(canonical_key(key))
    ]
    written = {stretch.name for _, stretches in found.values() for stretch in stretches}
    _check_implied(trained, trained.keys() - written)
    added = {
        key: joined
        for key, joined in released.items()
        if not is_optional(key) and not any(stretch.name in written for stretch in joined[1])
    }
    differences += [
        Difference("missing", key, shape, None)
        for key, (shape, stretches) in added.items()
        if not all(stretch.name in new for stretch in stretches)
    ]
    if differences:
        raise differences_error(f"{base.folder} (the base of {trained.path})", differences)
    return _plan_like(base, found, added, dtype)


def write_weights(folder: Path, plan: WeightPlan, trained: Mapping[str, Tensor], base: WeightFiles | None) -> None:
    """Writes all weights and their index.

    Args:
        folder: Where to.
        plan: What is written where.
        trained: The weights.
        base: Gives what was not trained.

    Raises:
        DataError: If the disk is too small.
    """
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise _no_space(folder, f"{free / 1e9:.2f} GB are free, the weights take {plan.num_bytes / 1e9:.2f} GB")

    @lru_cache(_KEPT)
    def whole(name: str) -> Tensor:
        return trained[name]

    def read(entry: Entry) -> Tensor:
        if entry.key not in plan.trained:
            assert base is not None
            return base.read(entry.key)
        parts = [
            whole(part.name) if part.index is None else whole(part.name)[part.index]
            for part in plan.trained[entry.key][1]
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="export", disable=_is_short(plan)) as bar:
        for file, header in plan.files.items():
            write_file(folder / file, header, read, bar.update)
    if plan.index is not None:
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_bytes(plan.index)


@contextmanager
def complete_folder(out: Path, overwrite: bool = False, needed: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which appears under its name when all is written.

    Args:
        out: Its name.
        overwrite: Replace an earlier export.
        needed: What must not be replaced, whatever was asked for.

    Yields:
        The folder to write into. It is beside ``out``; what an earlier, killed export left there is gone.

    Raises:
        DataError: If there is something already, or the disk is full; nothing is left behind then.
    """
    _check_place(out, overwrite, needed)
    partial, previous = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(str(out), f"no folder can be made there ({error.strerror})", "name another folder") from error
    try:
        yield partial
        if out.exists():
            shutil.rmtree(previous, ignore_errors=True)
            out.replace(previous)
        partial.replace(out)
        _sync(out.parent)
    except OSError as error:
        if previous.exists() and not out.exists():
            previous.replace(out)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(out, f"the disk was full after {_size(partial) / 1e9:.2f} GB") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def _check_place(out: Path, overwrite: bool, needed: Sequence[Path]) -> None:
    """Refuses to replace anything but an export: a run's folder, its base and the working folder are more than that."""
    if out.exists() and not out.is_dir():
        raise DataError(str(out), "there is a file, expected a folder or nothing", "name another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    for path in (*needed, Path.cwd()):
        if path.resolve().is_relative_to(out.resolve()):
            raise DataError(str(out), f"an export there would replace {path}, which is needed", "name another folder")
    if not overwrite:
        raise DataError(str(out), "there is something already", "name another folder, or pass --overwrite")
    if not has_card(out):
        found = f"it has no {CARD} with the tag {TAG}: it is no export, and --overwrite would delete it"
        raise DataError(str(out), found, "name another folder")


def _plan_like(
    base: WeightFiles, found: dict[str, Joined], added: dict[str, Joined], dtype: torch.dtype | None
) -> WeightPlan:
    """The base's files; those in which nothing changes its form keep their header to the byte."""
    files: dict[str, bytes] = {}
    last = max(base.files)
    for file in base.files:
        old = entries_of(base.headers[file])
        shapes = {entry.key: found[entry.key][0] if entry.key in found else entry.shape for entry in old}
        new = [Entry(entry.key, shapes[entry.key], _dtype(entry.key, entry.dtype, dtype)) for entry in old]
        if file == last:
            main = max(old, key=lambda entry: entry.num_bytes).dtype
            new += [Entry(key, shape, _dtype(key, main, dtype)) for key, (shape, _) in added.items()]
        metadata = parse_header(base.headers[file]).get("__metadata__", {})
        files[file] = base.headers[file] if new == old else make_header(new, metadata)
    is_same = all(files[file] == base.headers[file] for file in base.files)
    index: bytes | None = None
    if base.index is not None and is_same:
        index = (base.folder / SAFE_WEIGHTS_INDEX_NAME).read_bytes()
    elif base.index is not None:
        weight_map = {**base.index["weight_map"], **dict.fromkeys(added, last)}
        size = sum(entry.num_bytes for header in files.values() for entry in entries_of(header))
        index = _index({**(base.index.get("metadata") or {}), "total_size": size}, weight_map)
    return WeightPlan(files, found | added, index)


def _plan_anew(trained: TrainedWeights, released: dict[str, Joined], dtype: torch.dtype | None) -> WeightPlan:
    """Files of at most `SHARD_BYTES`, in the order of the model."""
    shards: list[list[Entry]] = [[]]
    for key, (shape, stretches) in released.items():
        entry = Entry(key, shape, _dtype(key, trained.dtype(stretches[0].name), dtype))
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + entry.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        return WeightPlan({SAFE_WEIGHTS_NAME: make_header(shards[0], metadata)}, released, None)
    stem, suffix = os.path.splitext(SAFE_WEIGHTS_NAME)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    weight_map = {entry.key: name for name, shard in zip(names, shards) for entry in shard}
    size = sum(entry.num_bytes for shard in shards for entry in shard)
    files = {name: make_header(shard, metadata) for name, shard in zip(names, shards)}
    return WeightPlan(files, released, _index({"total_size": size}, weight_map))


def _check_implied(trained: TrainedWeights, left_out: Iterable[str]) -> None:
    """Refuses to leave out a layer scale that does something: released files have no place for it."""
    for name in left_out:
        if "layer_scale" in name and not bool((trained[name] == 1).all()):
            raise DataError(
                str(trained.path),
                f"{name} is not 1 everywhere, and the released layout has no place for a layer scale",
                "train with it frozen, as NemotronVLModule has it",
            )


def _is_handed_on(key: str) -> bool:
    return is_not_ours(key) or is_optional(key) or may_be_zero(key)


def _dtype(key: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is None or not stored.is_floating_point or stays_float32(key):
        return stored
    return wanted


def _index(metadata: dict[str, object], weight_map: dict[str, str]) -> bytes:
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def _no_space(folder: Path, found: str) -> DataError:
    return DataError(str(folder), f"{found}, nothing was kept", "make room, or name a folder on another disk")


def _is_short(plan: WeightPlan) -> bool | None:
    return None if plan.num_bytes > 2**30 else True


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
