"""How a config divides a model over ranks, read from its settings: no Trainer is made, and no process started.

A Trainer would refuse a config for GPUs on a machine without them, and start looking for its nodes; a strategy is made,
because its constructor checks numbers and touches nothing. Strategies that it does not know are refused, not guessed.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_vlm.commands.plan import planned_ranks
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy
from lightning_vlm.strategies.schedules import stages_of_ranks
from lightning_vlm.strategies.stages import cut, divide_by_parameters
from lightning_vlm.strategies.tensor_parallel import keep_largest_part
from lightning_vlm.training.memory import Gathering

_OURS = {"fsdp2": FSDP2Strategy, "pipeline": PipelineStrategy}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is divided.

    Attributes:
        strategy: ``single``, ``ddp``, ``fsdp2`` or ``pipeline``.
        world_size: Ranks.
        stages: Ranks of a pipeline; 1 without one.
        shards: Ranks that share one copy of the model, or of a stage, or of one rank's part of each layer.
        tensor: Ranks that compute each layer together.
        gathering: How FSDP2 gathers; ``None`` where nothing is sharded.
        schedule: Of a pipeline.
        stages_per_rank: Of a pipeline.
        micro_batches: Of an optimizer step.
        offloads: Whether shards, their gradients and the optimizer stay on the CPU.
    """

    strategy: str
    world_size: int
    stages: int = 1
    shards: int = 1
    tensor: int = 1
    gathering: Gathering | None = None
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    micro_batches: int = 1
    offloads: bool = False

    @property
    def data_ranks(self) -> int:
        """Ranks with different samples."""
        return self.world_size // (self.stages * self.tensor)

    def in_flight(self, rank: int) -> int:
        """Most micro-batches whose activations a pipeline's rank keeps at a time.

        1F1B starts as many as there are stages from this one on; of the other schedules, all are taken.

        Args:
            rank: In the pipeline.
        """
        if self.stages == 1:
            return 1
        rounded = -(-self.micro_batches // self.stages) * self.stages
        return min(rounded, self.stages - rank) if self.schedule == "1f1b" else rounded

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        if self.strategy in ("single", "ddp"):
            return f"{ranks}, {'DDP' if self.strategy == 'ddp' else 'one device'}"
        copies = self.data_ranks // self.shards
        shared = f"{self.shards} shards" + (f", {copies} copies" if copies > 1 else "")
        if self.strategy == "fsdp2":
            shared += f", layers computed by {self.tensor} together" if self.tensor > 1 else ""
            return f"{ranks}, FSDP2: {shared}"
        steps = f"{self.schedule}, {self.micro_batches} micro-batches"
        inside = f", FSDP2 in stages: {shared}" if self.gathering is not None else ""
        return f"{ranks}, pipeline of {self.stages} ({steps}){inside}"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What one rank, or one rank of each pipeline, has of a model.

    Attributes:
        name: ``rank``, or of a stage.
        model: It.
        first: Whether it has the first stage.
        last: Whether it has the last one.
    """

    name: str
    model: NemotronVL
    first: bool = True
    last: bool = True


def layout_of(trainer: Any, ranks: int | None = None) -> Layout:
    """The layout that a config asks for.

    Args:
        trainer: The ``trainer`` part of a parsed config.
        ranks: Data-parallel ranks instead of those that the config asks for.

    Raises:
        ValueError: If the strategy is not known here, or its numbers do not go with the number of ranks.
    """
    kind, options = _strategy(trainer.strategy)
    steps: dict[str, Any] = {"micro_batches": trainer.accumulate_grad_batches}
    strategy = None if kind is None or kind is DDPStrategy else kind(**options)
    divided = 1 if strategy is None else strategy.stages * strategy.tensor
    world = ranks * divided if ranks else planned_ranks(trainer) or divided
    if strategy is None:
        return Layout("ddp" if kind is DDPStrategy or world > 1 else "single", world, **steps)
    stages, tensor = strategy.stages, strategy.tensor
    shards = strategy.shards or max(world // divided, 1)
    if world % (divided * shards):
        raise ValueError(
            f"stages={stages}, shards={shards} and tensor={tensor} need a multiple of {divided * shards} ranks, and "
            f"there are {world}; change one of them, or trainer.devices and trainer.num_nodes"
        )
    own, is_pipeline = strategy.sharding, isinstance(strategy, PipelineStrategy)
    param = None if own.param_dtype is None else getattr(torch, own.param_dtype)
    reduce = getattr(torch, own.reduce_dtype)
    gathering = Gathering(param, reduce, own.reshard_after_forward, keeps_gradients=is_pipeline)
    steps["offloads"] = own.cpu_offload
    if not is_pipeline:
        return Layout("fsdp2", world, 1, shards, tensor, gathering, **steps)
    steps |= {"schedule": strategy.schedule, "stages_per_rank": strategy.stages_per_rank}
    return Layout("pipeline", world, stages, shards, 1, gathering if world > stages else None, **steps)


def pieces(network: NemotronVL, layout: Layout) -> list[Piece]:
    """What the ranks have, each stage once.

    Args:
        network: Whole, on the meta device; tensor parallelism cuts it in place.
        layout: How it is divided.
    """
    if layout.tensor > 1:
        keep_largest_part(network, layout.tensor)
    if layout.stages == 1:
        return [Piece("rank", network)]
    owners = stages_of_ranks(layout.schedule, layout.stages, layout.stages_per_rank)
    layers, found = divide_by_parameters(network, len(owners)), []
    for rank in range(layout.stages):
        own = [index for index, owner in enumerate(owners) if owner == rank]
        model = copy.deepcopy(network)
        cut(model, [(layers[index], index == 0, index == len(owners) - 1) for index in own])
        found.append(Piece(f"stage {rank}", model, 0 in own, len(owners) - 1 in own))
    return found


def _strategy(setting: Any) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of a strategy; ``None`` for the Trainer's choice."""
    if setting in ("auto", "single", "single_device"):
        return None, {}
    if isinstance(setting, str):
        if setting.startswith("ddp"):
            return DDPStrategy, {}
        if setting in _OURS:
            return _OURS[setting], {}
    elif hasattr(setting, "class_path"):
        module, _, name = setting.class_path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        if issubclass(kind, (DDPStrategy, *_OURS.values())):
            given = getattr(setting, "init_args", None)
            return (DDPStrategy if issubclass(kind, DDPStrategy) else kind), ({} if given is None else given.as_dict())
    named = getattr(setting, "class_path", setting)
    raise ValueError(f"plan --memory does not know trainer.strategy {named!r}; expected auto, ddp, fsdp2 or pipeline")
