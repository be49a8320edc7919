"""Which ranks see which data, and which hold which parameters.

Ranks of one pipeline or tensor group see the same samples; others see samples of their own. The stages of a pipeline
hold different parameters; otherwise every rank has all of them, or a shard of each.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def data_ranks(trainer: Any) -> tuple[int, int]:
    """Number of data-parallel ranks, and which of them this process is (with others, where the model is divided).

    Args:
        trainer: A Trainer, or ``None``: then there is one rank.
    """
    ranks = None if trainer is None else getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (ranks["num_replicas"], ranks["rank"]) if ranks else (1, 0)


def parameter_group(trainer: Any) -> dist.ProcessGroup | None:
    """The ranks that hold the parameters that this one does, or shards of them; ``None`` for all ranks.

    Args:
        trainer: The Trainer.
    """
    return getattr(trainer.strategy, "parameter_group", None)


def from_stages(trainer: Any, item: T) -> list[T]:
    """What each stage of a pipeline has to say, on all of its ranks; outside of a pipeline, the item alone.

    Args:
        trainer: The Trainer.
        item: Of this rank.
    """
    group = getattr(trainer.strategy, "stage_group", None)
    if group is None:
        return [item]
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items
