"""Bytes of a rank's weights, gradients and optimizer states, against the tensors of a real step and of real shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_vlm import NemotronVLConfig, NemotronVLModule
from lightning_vlm.commands.describe import planned_network
from lightning_vlm.strategies.parallelize import Sharding, apply, shard, units
from lightning_vlm.strategies.tensor_parallel import keep_largest_part
from lightning_vlm.training.memory import (
    Gathering,
    gathered_bytes,
    gradient_bytes,
    optimizer_bytes,
    shard_numel,
    weight_bytes,
)
from lightning_vlm.training.optimizers import make_optimizer

TINY: dict[str, Any] = {"pattern": "ME*-", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 2}


def options(**more: Any) -> dict[str, Any]:
    return {"config": NemotronVLConfig.tiny(**TINY).to_dict(), **more}


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 17])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_the_largest_shard_is_the_first_chunk(rows: int, shards: int) -> None:
    tensor = torch.empty(rows, 5)
    assert shard_numel(tensor, shards) == tensor.chunk(shards)[0].numel()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("more", [{}, {"freeze": ["vision"]}, {"lora": {"rank": 4}}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_one_device_they_are_what_a_step_allocates(optimizer: str, more: dict[str, Any], precision: str) -> None:
    planned = planned_network(options(**more), precision)
    real = NemotronVLModule(**options(**more)).network.to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    trained = [p for p in real.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    made = make_optimizer(real, optimizer, 1e-3, (0.9, 0.95), 0.0)
    made.step()
    states = [value for state in made.state.values() for value in state.values() if value.dim()]
    assert weight_bytes(planned) == sum(tensor.nbytes for tensor in [*real.parameters(), *real.buffers()])
    assert gradient_bytes(planned) == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert optimizer_bytes(planned, optimizer) == sum(value.nbytes for value in states)


@pytest.fixture
def eight_ranks() -> Iterator[Any]:
    """A process group whose collectives do nothing: rank 0 of 8, the one with the largest shards."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("param_dtype", [None, "bfloat16"])
def test_fsdp2_holds_and_gathers_what_is_counted(eight_ranks: Any, param_dtype: str | None) -> None:
    planned = planned_network(options(freeze=["vision"]), "32-true")
    model = NemotronVLModule(**options(freeze=["vision"])).network
    shard([model], model, eight_ranks, Sharding(param_dtype))
    local: list[Any] = [parameter.to_local() for parameter in model.parameters()]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weight_bytes(planned, 8) == sum(each.nbytes for each in local) + buffers
    trained = [each for each, p in zip(local, model.parameters()) if p.requires_grad]
    assert gradient_bytes(planned, 8) == sum(each.nbytes for each in trained)
    assert optimizer_bytes(planned, "adamw", 8) == 2 * sum(each.nbytes for each in trained)

    dtype = None if param_dtype is None else torch.bfloat16
    weights, gradients = gathered_bytes(planned, units(planned), Gathering(dtype, torch.float32))
    everything, _ = gathered_bytes(planned, units(planned), Gathering(dtype, torch.float32, frees_layers=False))
    sizes = []
    modules: list[Any] = [model, *units(model)]
    assert all(isinstance(module, FSDPModule) for module in modules)
    for module in modules:
        module.unshard()
        inner = {id(p) for unit in units(model) if unit is not module for p in unit.parameters()}
        own = [p for p in module.parameters() if id(p) not in inner]
        sizes.append((sum(p.nbytes for p in own), sum(p.nbytes for p in own if p.requires_grad), own))
    root, *inside = sizes
    assert weights == root[0] + 2 * max(size for size, _, _ in inside)
    assert everything == sum(size for size, _, _ in sizes)
    summed = [sum(p.numel() * 4 for p in own if p.requires_grad) for _, _, own in sizes]
    layer = max(size for _, size, _ in inside) + max(summed[1:])
    assert gradients == root[1] + max(layer, summed[0])


def test_layers_computed_together_are_held_in_parts(eight_ranks: Any) -> None:
    planned = planned_network(options(freeze=["vision"]), "32-true")
    vocabulary = planned.language_model.lm_head.weight.shape[0]
    model = NemotronVLModule(**options(freeze=["vision"])).network
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("shards", "tensor"))
    apply(model, [model], mesh["tensor"], False, mesh["shards"], Sharding())
    keep_largest_part(planned, 2)
    assert planned.language_model.lm_head.weight.shape[0] == -(-vocabulary // 2)
    local = {name: parameter.to_local() for name, parameter in model.named_parameters()}
    for name, parameter in planned.named_parameters():
        assert shard_numel(parameter, 4) == local[name].numel(), name
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weight_bytes(planned, 4) == sum(each.nbytes for each in local.values()) + buffers
    trained = sum(local[name].nbytes for name, p in model.named_parameters() if p.requires_grad)
    assert gradient_bytes(planned, 4) == trained
    assert optimizer_bytes(planned, "adamw", 4) == 2 * trained


def test_a_pipelines_gradients_stay_whole_in_the_dtype_of_their_sum() -> None:
    planned = planned_network(options(), "32-true")
    gathering = Gathering(torch.bfloat16, torch.float32, frees_layers=False, keeps_gradients=True)
    weights, gradients = gathered_bytes(planned, units(planned), gathering)
    trained = sum(p.numel() for p in planned.parameters() if p.requires_grad)
    assert weights == 2 * sum(p.numel() for p in planned.parameters())
    assert 4 * trained < gradients <= 6 * trained
