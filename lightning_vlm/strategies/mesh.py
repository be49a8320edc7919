"""MeshStrategy: what strategies share that divide a model over a grid of ranks.

The grid has up to four axes: ``pipeline`` (stages), ``copies`` (data parallel, whole copies of the shards), ``shards``
(data parallel, FSDP2) and ``tensor``. Ranks that differ in ``copies`` or ``shards`` see different samples; the others
see the same ones and hold the same values, so sums and means over ranks are over these two axes only.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies import checkpoints
from lightning_vlm.strategies.parallelize import Sharding
from lightning_vlm.training.movement import parameters_at_rest
from lightning_vlm.training.optimizer_state import flat, names_of, state_by_name

log = logging.getLogger(__name__)
_PATIENCE_S = 3

AXES = ("pipeline", "copies", "shards", "tensor")


class MeshStrategy(ModelParallelStrategy):
    """Base of `FSDP2Strategy` and `PipelineStrategy`.

    Args:
        stages: Of a pipeline.
        shards: Ranks that share one copy of the model by FSDP2; ``None`` for all that there are.
        tensor: Ranks that share every layer.
        sharding: How FSDP2 shards.
        compiles_layers: Compile each layer of the language model.
        process_group_backend: As of Lightning's strategies.
        timeout: Of collectives.
    """

    def __init__(
        self,
        stages: int,
        shards: int | None,
        tensor: int,
        sharding: Sharding,
        compiles_layers: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        for name, size in (("stages", stages), ("shards", shards), ("tensor", tensor)):
            if size is not None and size < 1:
                raise ValueError(f"strategy.{name} is {size}; expected at least 1")
        self.stages, self.shards, self.tensor = stages, shards, tensor
        self.sharding = sharding
        self.compiles_layers = compiles_layers
        self._divided = False

    def parallelize(self, model: NemotronVL) -> NemotronVL:
        """Divides a model over the grid, in place.

        Args:
            model: Whole, on the meta device or not.
        """
        self._divided = True
        return self.divide(model)

    def divide(self, model: NemotronVL) -> NemotronVL:
        """What `parallelize` does, by each strategy."""
        raise NotImplementedError

    def setup(self, trainer: Any) -> None:
        """Takes over a module that is divided.

        Raises:
            TypeError: If it is not.
        """
        if not self._divided:
            module = type(self.lightning_module).__name__
            raise TypeError(
                f"{type(self).__name__} got a {module} whose model is not divided; train a NemotronVLModule that the "
                "Trainer lets make its model (it was made before, or by another Trainer's fit), or call "
                "trainer.strategy.parallelize(model) in configure_model"
            )
        super().setup(trainer)

    def setup_environment(self) -> None:
        """Starts the process group and lays out the grid.

        Raises:
            ValueError: If the grid does not have as many places as there are processes, or a node has more processes
                than the Trainer was told.
        """
        if self.local_rank >= self.num_processes:
            raise ValueError(
                f"this is process {self.local_rank + 1} of its node, and trainer.devices is {self.num_processes}; set "
                "it to the number of processes that torchrun or SLURM starts on a node"
            )
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        world, divided = self.world_size, self.stages * self.tensor
        shards = self.shards or max(world // divided, 1)
        copies = world // (divided * shards)
        if copies * shards * divided != world:
            raise ValueError(
                f"{type(self).__name__}: stages={self.stages}, shards={shards} and tensor={self.tensor} need a "
                f"multiple of {shards * divided} processes, and there are {world}; change one of them, or "
                "trainer.devices and trainer.num_nodes"
            )
        sizes = (self.stages, copies, shards, self.tensor)
        self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=AXES)
        self._data_mesh = self._device_mesh["copies", "shards"]._flatten("data_parallel")
        if self.tensor > 1:
            self._device_mesh["shards", "tensor"]._flatten("layer")  # norms are then summed up at once
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def data_mesh(self) -> DeviceMesh:
        """Ranks with different samples."""
        return self._data_mesh

    @property
    def sharding_mesh(self) -> DeviceMesh:
        """What ``fully_shard`` takes: copies and shards, or shards alone."""
        copies = self.device_mesh["copies"].size()
        return self.device_mesh["shards"] if copies == 1 else self.device_mesh["copies", "shards"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of data-parallel ranks and this one's."""
        return {"num_replicas": self.data_mesh.size(), "rank": self.data_mesh.get_local_rank()}

    def model_to_device(self) -> None:
        """Moves what FSDP2 does not keep on the CPU."""
        if not self.sharding.cpu_offload:
            super().model_to_device()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Makes the model from the same random numbers on all ranks, as one process would."""
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))
        with super().model_sharded_context():
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What this rank holds of the weights, by the whole model's names."""
        assert self.lightning_module is not None
        parameters_at_rest(self.lightning_module)
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What this rank holds of an optimizer's state, as ``<parameter>.<key>``."""
        assert self.lightning_module is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return flat(state_by_name(inner, names_of(self.lightning_module)))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder, see `lightning_vlm.strategies.checkpoints`.

        Raises:
            TypeError: If ``storage_options`` are given: shards go to a file system.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: shards are written to a file system; leave them out")
        checkpoints.save(checkpoint, Path(self.broadcast(filepath)), self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what this rank holds, from a folder or a single file; always as plain data."""
        assert self.lightning_module is not None
        return checkpoints.load(Path(self.broadcast(checkpoint_path)), self.lightning_module, self.optimizers)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the ranks with different samples."""
        if not isinstance(tensor, Tensor):
            return tensor
        group = group or self.data_mesh.get_group()
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        op: Any = reduce_op
        if isinstance(reduce_op, str):
            op = dist.ReduceOp.SUM if mean else getattr(dist.ReduceOp, reduce_op.upper())
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=op, group=group)
        return total / dist.get_world_size(group) if mean else total

    def on_exception(self, exception: BaseException) -> None:
        """Says which of the processes that this one started has died: the others only see a connection break."""
        processes = getattr(self._launcher, "procs", [])
        for _ in range(_PATIENCE_S):
            codes = {number: process.poll() for number, process in enumerate(processes, start=1)}
            dead = {number: code for number, code in codes.items() if code}
            if dead or not processes or not isinstance(exception, RuntimeError):
                break
            time.sleep(1)
        else:
            return
        for number, code in dead.items():
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            log.error("local rank %d %s; look there for the cause of errors of other ranks", number, how)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Over all ranks."""
        value = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(value)
