"""A checkpoint file is whole or not there: Lightning's plugin that writes it, safe against full disks and kills.

Lightning's own holds a second copy of the checkpoint in memory, writes it to the system's temporary folder, and moves
it: between two disks that is a copy, over the older checkpoint. Here it is written once, beside its place, and renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from lightning_vlm.checkpoint.trained import load_whole
from lightning_vlm.schema import StoppingError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints; remote addresses are left to Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: Plain data and tensors.
            path: The file. If anything fails it is what it was before.
            storage_options: None, as for Lightning's plugin.

        Raises:
            StoppingError: If the disk is full.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.is_dir():  # of a run that was divided
                replaced = path.with_name(f".{path.name}.replaced")
                path.rename(replaced)
                partial.rename(path)
                shutil.rmtree(replaced)
            else:
                partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
            if not is_full(error, partial.parent):
                raise
            raise full_disk(path) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a file, or what a divided run wrote as a folder, put together.

        Args:
            path: Of either.
            *args: As for Lightning's plugin.
            **kwargs: As for Lightning's plugin.
        """
        if "://" not in str(path) and Path(path).is_dir():
            return load_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def use_whole_files(strategy: Any) -> None:
    """Lets a strategy write and read by `AtomicCheckpointIO`, unless the user chose another plugin.

    Args:
        strategy: Of the Trainer.
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def full_disk(path: Path) -> StoppingError:
    """What is told where a checkpoint could not be written.

    Args:
        path: Of the checkpoint.
    """
    kept = "the older checkpoint is as it was" if path.exists() else "older checkpoints are as they were"
    problem = f"the disk is full, this checkpoint could not be written, {kept}"
    return StoppingError(str(path), problem, "make room and resume")


def is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether a full disk is behind an error.

    Args:
        error: From writing.
        folder: Where to.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize < os.sysconf("SC_PAGE_SIZE")
