"""``strategy: pipeline``: every rank holds some of the layers, and micro-batches flow through them.

The micro-batches of a step are the batches that the Trainer accumulates (``trainer.accumulate_grad_batches``): padded
or packed, they are collected until the step is complete, and its backward pass runs the whole schedule. So the data,
its plan and its position in a checkpoint are those of any other strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.schema import DataError, VLMBatch
from lightning_vlm.strategies.layer_times import measure_layers
from lightning_vlm.strategies.mesh import MeshStrategy
from lightning_vlm.strategies.micro_batches import blank_like, equal_shapes
from lightning_vlm.strategies.parallelize import Sharding, apply
from lightning_vlm.strategies.schedules import Pipeline, ScheduleName, check_schedule, stages_of_ranks
from lightning_vlm.strategies.staged_model import StagedNemotronVL
from lightning_vlm.strategies.stages import (
    Stage,
    StageInputs,
    balance,
    cut,
    divide_by_parameters,
    hidden_dtype,
    stage_table,
)


class PipelineStrategy(MeshStrategy):
    """Pipeline parallelism, with FSDP2 inside of stages where there are more ranks.

    Args:
        stages: Ranks of one pipeline.
        schedule: ``gpipe``, ``1f1b``; with several stages on each rank ``interleaved_1f1b``, ``zero_bubble`` or
            ``zbv``.
        stages_per_rank: Stages on each rank.
        balance: Give stages layers by their ``parameters``, or by the ``time`` that each kind of layer is measured to
            take on rank 0 (see `lightning_vlm.strategies.layer_times`).
        shards: Ranks that share one copy of a stage by FSDP2; 1 for whole copies; all that there are by default.
        param_dtype: See `Sharding`.
        reduce_dtype: See `Sharding`.
        cpu_offload: See `Sharding`.
        compile_layers: Compile each layer of the language model.
        process_group_backend: As of Lightning's strategies.
        timeout: Of collectives.
    """

    def __init__(
        self,
        stages: int = 2,
        schedule: ScheduleName = "1f1b",
        stages_per_rank: int = 1,
        balance: Literal["parameters", "time"] = "parameters",
        shards: int | None = None,
        param_dtype: str | None = None,
        reduce_dtype: str = "float32",
        cpu_offload: bool = False,
        compile_layers: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        check_schedule(schedule, stages_per_rank)
        # What a stage gathers stays gathered for all of a step's micro-batches.
        sharding = Sharding(param_dtype, reduce_dtype, False, cpu_offload)
        super().__init__(stages, shards, 1, sharding, compile_layers, process_group_backend, timeout)
        if balance not in ("parameters", "time"):
            raise ValueError(f"strategy.balance is {balance!r}; expected parameters or time")
        self.schedule, self.stages_per_rank, self.balance = schedule, stages_per_rank, balance
        self._pipeline: Pipeline | None = None
        self._collected: list[tuple[VLMBatch, Tensor]] = []

    @property
    def stage_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's pipeline."""
        return self.device_mesh["pipeline"].get_group()

    @property
    def parameter_group(self) -> dist.ProcessGroup:
        """The ranks that hold the stages that this one does, or shards of them."""
        return self.data_mesh.get_group()

    @property
    def pipeline(self) -> Pipeline:
        """The stages of this rank and the way through all."""
        if self._pipeline is None:
            raise RuntimeError("the model is not divided yet; the module makes it with build_network")
        return self._pipeline

    def setup_environment(self) -> None:
        """As of `MeshStrategy`; also a way for batches, which are on the CPU."""
        super().setup_environment()
        self._batch_group = self.stage_group
        if self.root_device.type != "cpu":
            columns = self.device_mesh.mesh.flatten(1).T.tolist()
            groups = [dist.new_group(ranks, backend="gloo") for ranks in columns]  # every rank makes all of them
            self._batch_group = next(group for ranks, group in zip(columns, groups) if self.global_rank in ranks)

    def share_batches(self, load: Callable[[], Iterator[Any]], count: int) -> Iterator[Any]:
        """Batches that the first stage's rank loads, for it and, without their media, for the others of its pipeline.

        Args:
            load: Starts loading.
            count: How many there are.
        """
        if self.device_mesh["pipeline"].get_local_rank() == 0:
            for batch in load():
                sent = batch.without_media() if isinstance(batch, VLMBatch) else batch
                dist.broadcast_object_list([sent], group=self._batch_group, group_src=0)
                yield batch
            return
        for _ in range(count):
            box: list[Any] = [None]
            dist.broadcast_object_list(box, group=self._batch_group, group_src=0)
            yield box[0]

    def divide(self, model: NemotronVL) -> NemotronVL:
        """Cuts a model to what this rank holds, in place.

        Args:
            model: Whole, on the meta device or not.
        """
        owners = stages_of_ranks(self.schedule, self.stages, self.stages_per_rank)
        layers = self._layers_of_stages(model, len(owners))
        rank = self.device_mesh["pipeline"].get_local_rank()
        own = [index for index, owner in enumerate(owners) if owner == rank]
        rank_zero_info(stage_table(model, layers, owners))
        ends = {index: (index == 0, index == len(owners) - 1) for index in own}
        cut(model, [(layers[index], *ends[index]) for index in own])
        stages = {index: Stage(model, layers[index], *ends[index]) for index in own}
        mesh = self.sharding_mesh if self.data_mesh.size() > 1 else None
        apply(model, list(stages.values()), None, self.compiles_layers, mesh, self.sharding)
        dtype = hidden_dtype(model) if self.sharding.param_dtype is None else getattr(torch, self.sharding.param_dtype)
        size = model.config.text_config.hidden_size
        self._pipeline = Pipeline(stages, owners, self.schedule, self.stage_group, self.root_device, size, dtype)
        model.__class__ = StagedNemotronVL  # adds no state but the way through all stages
        model.__dict__["pipeline"] = self._pipeline
        return model

    def _layers_of_stages(self, model: NemotronVL, count: int) -> list[range]:
        if self.balance == "parameters":
            return divide_by_parameters(model, count)
        measured = measure_layers(model, self.root_device) if self.is_global_zero else None
        costs, first, last = self.broadcast(measured)
        layers = balance(costs, count, first, last)
        total = sum(costs) + first + last
        shares = [sum(costs[index] for index in own) / total for own in layers]
        shares[0], shares[-1] = shares[0] + first / total, shares[-1] + last / total
        rank_zero_info(f"stages by measured time: {', '.join(f'{share:.0%}' for share in shares)} of a micro-batch")
        return layers

    def setup(self, trainer: Any) -> None:
        """Starts with nothing collected; says where steps have too few micro-batches to fill the pipeline."""
        self._collected = []
        super().setup(trainer)
        given = trainer.accumulate_grad_batches
        if trainer.state.fn == TrainerFn.FITTING and (needed := self.pipeline.num_micro_batches(given)) > given:
            rank_zero_warn(
                f"trainer.accumulate_grad_batches is {given}, and a step of {self.stages} stages runs in rounds of "
                f"{self.stages} micro-batches: {needed - given} of {needed} are blank; set it to a multiple of "
                f"{self.stages}, large ones leave ranks idle for less of the time"
            )

    def training_step(self, batch: VLMBatch, batch_idx: int) -> Tensor:
        """Keeps a micro-batch for `backward`.

        Returns:
            Not a number: the loss is known at the end of the step, as ``train/loss``.
        """
        self._collected.append((batch, self.lightning_module.begin_micro_batch(batch)))
        return torch.full((), float("nan"), requires_grad=True)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the schedule when the last micro-batch of a step is there."""
        module = self.lightning_module
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        if not module.trainer.fit_loop._should_accumulate():
            collected, self._collected = self._collected, []
            with self.precision_plugin.train_step_context():
                loss = self._run(*zip(*collected))
            module.add_loss(loss)
        return self.precision_plugin.post_backward(closure_loss, module)

    def _run(self, batches: Sequence[VLMBatch], label_tokens: Sequence[Tensor]) -> Tensor:
        pipeline, module, ranks = self.pipeline, self.lightning_module, self.data_mesh.size()
        config = module.network.config.text_config
        pad = config.pad_token_id or 0
        batches = equal_shapes(batches, pad)
        missing = pipeline.num_micro_batches(len(batches)) - len(batches)
        batches += [blank_like(batches[0], pad)] * missing
        scale = (ranks / label_tokens[0]).to(torch.float32)  # FSDP2 averages over data-parallel ranks
        told = [module.balance.begin(batch, config, label_tokens[0], ranks) for batch in batches]
        inputs = [
            StageInputs.of(batch.model_inputs() | more, batch.labels, batch.sources)
            for batch, more in zip(batches, told)
        ]
        try:
            loss = pipeline.step([batch.input_ids for batch in batches], inputs, [scale] * len(batches))
        except RuntimeError as error:
            if isinstance(error.__cause__, (FusionError, DataError)):
                raise error.__cause__ from None
            raise
        return loss / ranks


StrategyRegistry.register("pipeline", PipelineStrategy, description="Pipeline parallelism over stages of layers")
