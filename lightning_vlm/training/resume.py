"""Checkpoints that always stand between two optimizer steps, and continue on any number of ranks.

A run can stop anywhere: inside a step, or with half of its gradients accumulated, and gradients are not saved. A
checkpoint written then counts batches whose gradient is lost. Here its counters are set back to the last finished step,
so that the resumed run repeats those batches instead of leaving them out.
"""

from __future__ import annotations

from typing import Any


def rewind_to_last_step(checkpoint: dict[str, Any], datamodule_key: str, applied: tuple[int, int]) -> int:
    """Sets the batch counters and data positions of a checkpoint back to the last optimizer step, in place.

    Args:
        checkpoint: What Lightning is about to save.
        datamodule_key: Where the datamodule's state is in it.
        applied: An epoch, and how many of its batches have their gradient in the weights; none of a later epoch's have.

    Returns:
        Number of batches that were taken back: 0 for a checkpoint written between two steps.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    current = progress["current"]
    # The epoch that the batch counters belong to; `Trainer.current_epoch` is one further after its last batch.
    epoch = loop["epoch_progress"]["current"]["ready"] - 1
    done = applied[1] if applied[0] == epoch else 0
    # Also where the loop has not counted a batch yet: it left the loader, and then failed on its way to the device.
    for position in (*loop["state_dict"].get("combined_loader", []), checkpoint.get(datamodule_key)):
        if position and position["epoch"] == epoch:
            position["yielded"] = min(position["yielded"], done)
    taken_back = max(current["ready"] - done, 0)
    if not taken_back:
        return 0
    _set_batches_done(progress, done)
    return taken_back


def move_progress(checkpoint: dict[str, Any], yielded: int) -> None:
    """Sets the batch counters of a checkpoint to where another number of ranks continues its epoch, in place.

    Args:
        checkpoint: What Lightning is about to restore.
        yielded: Batches done, on the scale of the new number of batches per epoch.
    """
    _set_batches_done(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], yielded)


def _set_batches_done(progress: dict[str, Any], done: int) -> None:
    current, total = progress["current"], progress["total"]
    for counter in ("ready", "started", "processed", "completed"):
        total[counter] += done - current[counter]
        current[counter] = done
    progress["is_last_batch"] = False
