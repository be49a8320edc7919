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
    if taken_back:
        _set_batches_done(checkpoint, done)
    return taken_back


def reopen_epoch(checkpoint: dict[str, Any], datamodule_key: str, num_batches: int) -> None:
    """Undoes that Lightning counts an epoch as done in which ``max_steps`` or a callback has stopped the run, in place.

    A run that is extended later would begin the next epoch, and the samples that were left would never be seen.

    Args:
        checkpoint: What Lightning is about to save.
        datamodule_key: Where the datamodule's state is in it.
        num_batches: Batches that were to be taken of the epoch.
    """
    epochs, state = checkpoint["loops"]["fit_loop"]["epoch_progress"], checkpoint.get(datamodule_key)
    current, total = epochs["current"], epochs["total"]
    before = current["ready"] - 1
    if not state or state["epoch"] != before or state["yielded"] >= num_batches or current["processed"] == before:
        return
    for counter in ("processed", "completed"):
        total[counter] += before - current[counter]
        current[counter] = before
    checkpoint["epoch"] = before
    _set_batches_done(checkpoint, state["yielded"])


def move_progress(checkpoint: dict[str, Any], yielded: int, micro_batches: int, ended: bool) -> None:
    """Sets the batch counters of a checkpoint to where another plan continues its epoch, in place.

    Args:
        checkpoint: What Lightning is about to restore.
        yielded: Batches done, on the scale of the new number of batches per epoch.
        micro_batches: Batches of an optimizer step.
        ended: Whether they were the last of their epoch.
    """
    epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    if epoch["processed"] < epoch["ready"]:  # else Lightning has left the epoch behind, and its counters with it
        _set_batches_done(checkpoint, yielded, ended or yielded % micro_batches == 0, ended)


def _set_batches_done(checkpoint: dict[str, Any], done: int, ends_step: bool = True, ends_epoch: bool = False) -> None:
    """Makes a checkpoint one of those that Lightning writes in ``on_train_batch_end``: it makes up for the last counts.

    Any other is resumed with an iteration without a batch at some places, which is a step too many for the loggers.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    for counter, count in {"ready": done, "started": done, "processed": done, "completed": done - 1}.items():
        total[counter] += count - current[counter]
        current[counter] = count
    progress["is_last_batch"] = ends_epoch
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - ends_step
