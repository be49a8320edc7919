"""``strategy: fsdp2``: every rank holds a shard of the weights, gradients and optimizer states, and sees its own data.

On PyTorch's ``fully_shard``. Weights are read straight into shards; nothing is ever whole on one rank but the layer
that is being computed.
"""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.constants import default_pg_timeout

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies.mesh import MeshStrategy
from lightning_vlm.strategies.parallelize import Sharding, apply


class FSDP2Strategy(MeshStrategy):
    """Fully sharded data parallelism.

    Args:
        shards: Ranks that share one copy of the model, e.g. those of a node (hybrid sharding); all by default.
        tensor: Ranks that compute each layer together (tensor parallelism), on the same samples.
        param_dtype: See `Sharding`.
        reduce_dtype: See `Sharding`.
        reshard_after_forward: See `Sharding`.
        cpu_offload: See `Sharding`.
        compile_layers: Compile each layer of the language model.
        process_group_backend: As of Lightning's strategies.
        timeout: Of collectives.
    """

    def __init__(
        self,
        shards: int | None = None,
        tensor: int = 1,
        param_dtype: str | None = None,
        reduce_dtype: str = "float32",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        compile_layers: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        sharding = Sharding(param_dtype, reduce_dtype, reshard_after_forward, cpu_offload)
        super().__init__(1, shards, tensor, sharding, compile_layers, process_group_backend, timeout)

    def divide(self, model: NemotronVL) -> NemotronVL:
        """Divides layers, then shards, in place.

        Args:
            model: On the meta device or not.
        """
        tensor = self.device_mesh["tensor"] if self.tensor > 1 else None
        apply(model, [model], tensor, self.compiles_layers, self.sharding_mesh, self.sharding)
        return model


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallelism (PyTorch's fully_shard)")
