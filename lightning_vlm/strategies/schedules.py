"""PyTorch's pipeline schedules, run over micro-batches that are already split. All that is private of them is here.

PyTorch would split tensors itself, which media of several lengths cannot take, and ask the stages for their shapes by
running them once more than needed. Here shapes are told beforehand, and a schedule is laid out anew when they change.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from lightning_vlm.strategies.stages import End, Stage, StageInputs

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"]

_CLASSES: dict[str, str] = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
}


def check_schedule(schedule: str, stages_per_rank: int) -> None:
    """Checks names and numbers before there are processes.

    Args:
        schedule: One of `ScheduleName`.
        stages_per_rank: Stages that each rank holds.

    Raises:
        ValueError: If there is no such schedule, or it takes another number.
    """
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"strategy.schedule is {schedule!r}; expected one of {', '.join(get_args(ScheduleName))}")
    if schedule in ("gpipe", "1f1b") and stages_per_rank != 1:
        raise ValueError(
            f"strategy.stages_per_rank is {stages_per_rank}, but schedule {schedule} has one stage on each rank; set "
            "it to 1, or schedule to interleaved_1f1b"
        )
    if schedule == "zbv" and stages_per_rank != 2:
        raise ValueError(f"strategy.stages_per_rank is {stages_per_rank}, but schedule zbv has 2; set it to 2")


def stages_of_ranks(schedule: str, ranks: int, stages_per_rank: int) -> list[int]:
    """The rank of each stage: in turns, or there and back (``zbv``).

    Args:
        schedule: One of `ScheduleName`.
        ranks: Of the pipeline.
        stages_per_rank: Stages that each rank holds.
    """
    there = list(range(ranks))
    if schedule == "zbv":
        return there + there[::-1]
    return there * stages_per_rank


class Pipeline:
    """A rank's stages, and the way of micro-batches through all of them.

    Args:
        stages: Of this rank, by their numbers.
        owners: Rank in the group of each stage.
        schedule: One of `ScheduleName`.
        group: The ranks of the pipeline.
        device: Of this rank.
        hidden_size: Of the language model.
        dtype: Of hidden states.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        owners: Sequence[int],
        schedule: str,
        group: dist.ProcessGroup,
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.stages, self.owners, self.group, self.device = stages, list(owners), group, device
        self.hidden_size, self.dtype = hidden_size, dtype
        self._class = get_schedule_class(_CLASSES[schedule])
        self._laid_out: tuple[tuple[int, ...], Any, list[PipelineStage]] | None = None

    def num_micro_batches(self, given: int) -> int:
        """How many micro-batches a step needs that has so many: whole rounds over the ranks.

        Args:
            given: At least one.
        """
        ranks = dist.get_world_size(self.group)
        return -(-given // ranks) * ranks

    def step(self, tokens: Sequence[Tensor], inputs: Sequence[StageInputs], scales: Sequence[Tensor]) -> Tensor:
        """Forward and backward passes of all micro-batches of a step.

        Args:
            tokens: ``(B, T)`` of each, of one shape.
            inputs: What they are.
            scales: Of their losses.

        Returns:
            Float32 scalar on every rank of the pipeline: the sum of the micro-batches' losses.
        """
        schedule, stages = self._schedule(len(tokens), tuple(tokens[0].shape))
        for stage in stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        first, last = 0 in self.stages, len(self.owners) - 1 in self.stages
        arguments: list[Any] = [(each,) for each in tokens]
        keywords: list[Any] = [{"inputs": each, "scale": scale} for each, scale in zip(inputs, scales)]
        losses: list[Tensor] = []
        targets: list[Any] = [None] * len(tokens)
        found = losses if last else None
        if "arg_mbs" in inspect.signature(schedule.step).parameters:  # newer than PyTorch 2.13
            schedule.step(
                arg_mbs=arguments if first else None,
                kwarg_mbs=keywords,
                target_mbs=targets if last else None,
                losses=found,
                return_outputs=False,
            )
        else:
            schedule._step_microbatches(
                arguments if first else None, keywords, targets if last else None, found, return_outputs=False
            )
        self._rest()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for loss in losses:
            total += loss.detach()
        return self.from_last(total)

    def relay(
        self, tokens: Tensor, inputs: StageInputs, scale: Tensor | None, shape: tuple[int, ...], end: End = "head"
    ) -> Tensor:
        """A forward pass of one batch; its result on every rank of the pipeline.

        Args:
            tokens: ``(B, T)``.
            inputs: What they are.
            scale: Of the loss; without one, logits are wanted.
            shape: Of the result.
            end: See `Stage.forward`.

        Returns:
            Float32 loss or logits; hidden states in their own dtype.
        """
        rank, x = dist.get_rank(self.group), tokens
        for index, owner in enumerate(self.owners):
            if owner != rank:
                continue
            if index and self.owners[index - 1] != rank:
                x = torch.empty(*tokens.shape, self.hidden_size, dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=self.owners[index - 1])
            x = self.stages[index](x, inputs, scale, shape[1] if len(shape) > 1 else 0, end)
            if index + 1 < len(self.owners) and self.owners[index + 1] != rank:
                dist.send(x.contiguous(), group=self.group, group_dst=self.owners[index + 1])
        self._rest()
        if self.owners[-1] != rank:
            x = torch.empty(shape, dtype=torch.float32 if end == "head" else self.dtype, device=self.device)
        return self.from_last(x.contiguous())

    def from_last(self, tensor: Tensor) -> Tensor:
        """What the last stage's rank has, on every rank.

        Args:
            tensor: Of the same shape and dtype on all of them.
        """
        dist.broadcast(tensor, group=self.group, group_src=self.owners[-1])
        return tensor

    def _rest(self) -> None:
        """Lets FSDP2 put shards back where it gathered them: optimizers and checkpoints know parameters as shards.

        The stages are FSDP2's roots, and not among the model's modules, through which it would be asked to.
        """
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _schedule(self, count: int, shape: tuple[int, ...]) -> tuple[Any, list[PipelineStage]]:
        """The schedule for so many micro-batches of a shape; the last one is kept."""
        key = (count, *shape)
        if self._laid_out is not None and self._laid_out[0] == key:
            return self._laid_out[1], self._laid_out[2]
        stages = []
        for index, stage in self.stages.items():
            hidden = torch.empty(*shape, self.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
            tokens = torch.empty(*shape, dtype=torch.int64, device="meta")
            loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
            stages.append(
                PipelineStage(
                    stage,
                    index,
                    len(self.owners),
                    self.device,
                    input_args=tokens if stage.is_first else hidden,
                    output_args=loss if stage.is_last else hidden,
                    group=self.group,
                )
            )
        options = {"loss_fn": _loss_of, "scale_grads": False}
        is_multi = issubclass(self._class, PipelineScheduleMulti)
        schedule = self._class(stages if is_multi else stages[0], count, **options)
        self._laid_out = (key, schedule, stages)
        return schedule, stages


def _loss_of(output: Tensor, target: None) -> Tensor:
    """The last stage has already computed it, where its head is gathered."""
    return output
