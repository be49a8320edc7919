"""How a model is divided over ranks: one function, `apply`, one order. Tensor parallel, then compiling, then FSDP2.

Recomputation is set on the model before (`lightning_vlm.training.recomputation`): transformers recomputes inside its
layers, so what FSDP2 gathers for a layer is gathered for its recomputation too.

A unit is what FSDP2 gathers at once. Each layer of the language model is one, and each tower is one as a whole: ranks
may then take their images in passes of their own number (``vision_micro_batch``) without waiting for each other. The
rest (embeddings, projectors, the last norm and the head) belongs to the root, which stays gathered from the forward to
the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies.tensor_parallel import divide_layers


@runtime_checkable
class Parallelizes(Protocol):
    """A strategy that divides the model itself, after it is adapted and frozen and before its weights are read."""

    root_device: torch.device

    def parallelize(self, model: NemotronVL) -> NemotronVL:
        """Divides a model.

        Args:
            model: Whole, on the meta device or not.
        """
        ...


@dataclass(frozen=True, slots=True)
class Sharding:
    """How FSDP2 shards.

    Attributes:
        param_dtype: What weights are gathered and computed in (``bfloat16``); their own by default.
        reduce_dtype: What gradients are summed up in over ranks.
        reshard_after_forward: Free gathered layers after the forward pass, and gather them once more for the backward
            pass: less memory for more communication.
        cpu_offload: Keep shards, their gradients and the optimizer on the CPU.
    """

    param_dtype: str | None = None
    reduce_dtype: str = "float32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype"):
            if (value := getattr(self, name)) not in (None, "float32", "bfloat16", "float16"):
                raise ValueError(f"strategy.{name} is {value!r}; expected float32, bfloat16 or float16")

    def options(self, mesh: DeviceMesh) -> dict[str, Any]:
        """Arguments of ``fully_shard``, but for when to reshard.

        Args:
            mesh: One dimension, or two: copies and shards.
        """
        param = None if self.param_dtype is None else getattr(torch, self.param_dtype)
        policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=getattr(torch, self.reduce_dtype))
        offload = CPUOffloadPolicy(torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        return {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}


def units(model: NemotronVL) -> list[nn.Module]:
    """What is gathered at once, besides the root: the towers and the layers of the language model.

    Args:
        model: Whole, or what a pipeline's rank has of it.
    """
    towers = [tower for tower in (model.vision_model, model.audio_tower) if tower is not None]
    return [*towers, *model.language_model.model.layers]


def compile_layers(model: NemotronVL) -> None:
    """Compiles each layer of the language model in place, at its first call; names and weights stay.

    Args:
        model: The model.
    """
    for layer in model.language_model.model.layers:
        layer.compile()


def apply(
    model: NemotronVL,
    roots: list[nn.Module],
    tensor: DeviceMesh | None,
    compiles_layers: bool,
    mesh: DeviceMesh | None,
    sharding: Sharding,
) -> None:
    """Divides a model in place, in the one order that works.

    Args:
        model: Whole, or cut to what a pipeline's rank has.
        roots: What is called from outside: the model, or the stages of a pipeline.
        tensor: Ranks that compute each layer together.
        compiles_layers: Whether the language model's layers are compiled.
        mesh: Ranks that share its parameters by FSDP2; ``None`` where there is but one.
        sharding: How they do.
    """
    if tensor is not None:
        divide_layers(model, tensor)
    if compiles_layers:
        compile_layers(model)
    if mesh is not None:
        shard(roots, model, mesh, sharding)


def shard(roots: list[nn.Module], model: NemotronVL, mesh: DeviceMesh, sharding: Sharding) -> None:
    """Shards in place.

    Args:
        roots: What is called from outside: the model, or the stages of a pipeline.
        model: The model.
        mesh: Over which ranks.
        sharding: How.
    """
    options = sharding.options(mesh)
    own = units(model)
    _refuse_mixed_dtypes([*own, *roots], model)
    for unit in own:
        fully_shard(unit, reshard_after_forward=sharding.reshard_after_forward, **options)
    for root in roots:
        fully_shard(root, reshard_after_forward=False, **options)


def _refuse_mixed_dtypes(modules: list[nn.Module], model: NemotronVL) -> None:
    """FSDP2 sums the gradients of a unit up as one tensor."""
    taken: set[int] = set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in modules:
        own = [p for p in module.parameters() if id(p) not in taken]
        taken |= set(map(id, own))
        by_dtype = {p.dtype: names[id(p)] for p in own if p.requires_grad}
        if len(by_dtype) > 1:
            found = " and ".join(f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in by_dtype.items())
            raise ValueError(
                f"FSDP2 sums up gradients of one precision at once, and here it would be {found}; train both by lora, "
                "or both in full, or set trainer.precision to bf16-mixed"
            )
