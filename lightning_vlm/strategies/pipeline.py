"""``strategy: pipeline``: every rank holds some of the layers, and micro-batches flow through them.

The micro-batches of a step are the batches that the Trainer accumulates (``trainer.accumulate_grad_batches``): padded
or packed, they are collected until the step is complete, and its backward pass runs the whole schedule. So the data,
its plan and its position in a checkpoint are those of any other strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.schema import VLMBatch
from lightning_vlm.strategies.mesh import MeshStrategy
from lightning_vlm.strategies.micro_batches import blank_like, equal_shapes
from lightning_vlm.strategies.parallelize import Sharding, apply
from lightning_vlm.strategies.schedules import Pipeline, ScheduleName, check_schedule, stages_of_ranks
from lightning_vlm.strategies.staged_model import StagedNemotronVL
from lightning_vlm.strategies.stages import Stage, StageInputs, cut, divide_by_parameters, hidden_dtype


class PipelineStrategy(MeshStrategy):
    """Pipeline parallelism, with FSDP2 inside of stages where there are more ranks.

    Args:
        stages: Ranks of one pipeline.
        schedule: ``gpipe``, ``1f1b``; with several stages on each rank ``interleaved_1f1b``, ``zero_bubble`` or
            ``zbv``.
        stages_per_rank: Stages on each rank.
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
        self.schedule, self.stages_per_rank = schedule, stages_per_rank
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

    def divide(self, model: NemotronVL) -> NemotronVL:
        """Cuts a model to what this rank holds, in place.

        Args:
            model: Whole, on the meta device or not.
        """
        owners = stages_of_ranks(self.schedule, self.stages, self.stages_per_rank)
        layers = divide_by_parameters(model, len(owners))
        rank = self.device_mesh["pipeline"].get_local_rank()
        own = [index for index, owner in enumerate(owners) if owner == rank]
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
        pipeline = self.pipeline
        pad = self.lightning_module.network.config.text_config.pad_token_id or 0
        batches = equal_shapes(batches, pad)
        missing = pipeline.num_micro_batches(len(batches)) - len(batches)
        batches += [blank_like(batches[0], pad)] * missing
        scale = (self.data_mesh.size() / label_tokens[0]).to(torch.float32)  # FSDP2 averages over data-parallel ranks
        inputs = [StageInputs.of(batch.model_inputs(), batch.labels) for batch in batches]
        try:
            loss = pipeline.step([batch.input_ids for batch in batches], inputs, [scale] * len(batches))
        except RuntimeError as error:
            if isinstance(error.__cause__, FusionError):
                raise error.__cause__ from None
            raise
        return loss / self.data_mesh.size()


StrategyRegistry.register("pipeline", PipelineStrategy, description="Pipeline parallelism over stages of layers")
