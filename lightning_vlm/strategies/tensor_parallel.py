"""Tensor parallelism: the ranks of a group compute one layer together, on the same tokens.

Attention is divided by heads, MLPs and experts by their inner width, the vocabulary by rows: each layer then sums up
over the group once, in the forward and in the backward pass. Mamba layers, norms, routers, towers and projectors are
whole on every rank, which computes them for itself: their state has no axis that the released sizes divide well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention, NemotronHMLP, NemotronHMoE

from lightning_vlm.models.lora import has_adapters
from lightning_vlm.models.nemotron_vl import NemotronVL


class StackedExperts(ParallelStyle):
    """Stacks of experts ``up_proj (E, I, H)`` and ``down_proj (E, H, I)``, divided by their inner width ``I``."""

    dims: ClassVar = {"up_proj": 1, "down_proj": 2}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        dims = self.dims
        for name, dim in dims.items():
            weight = distribute_tensor(module.get_parameter(name), device_mesh, [Shard(dim)])
            module.register_parameter(name, nn.Parameter(weight, requires_grad=weight.requires_grad))

        def enter(experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            for name, dim in dims.items():  # what the forward finds by these names
                weight: Any = experts._parameters[name]
                experts.__dict__[name] = weight.to_local(grad_placements=[Shard(dim)])
            states, chosen, weights = inputs
            return _enter(states, device_mesh), chosen, _enter(weights, device_mesh)

        def leave(experts: nn.Module, inputs: Any, output: Tensor | None) -> Tensor | None:
            for name in dims:
                experts.__dict__.pop(name, None)
            if output is None:
                return None
            return (
                DTensor.from_local(output, device_mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()
            )

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
        return module


def divide_layers(model: NemotronVL, mesh: DeviceMesh) -> None:
    """Divides the language model in place.

    Args:
        model: Whole, on the meta device or not.
        mesh: The ranks of the group.

    Raises:
        ValueError: If heads or inner widths do not divide by their number.
        NotImplementedError: If the model has adapters.
    """
    for module, style, _ in _divided(model, mesh.size()):
        parallelize_module(module, mesh, style)
    model.language_model.lm_head.register_forward_hook(_wait)


def keep_largest_part(model: NemotronVL, ranks: int) -> None:
    """Leaves of a model what that rank of a group holds which holds most, in place: to count, it does not compute.

    Args:
        model: Whole, on the meta device.
        ranks: Of the group.

    Raises:
        ValueError: As of `divide_layers`.
        NotImplementedError: Likewise.
    """
    for module, _, dims in list(_divided(model, ranks)):
        for name, dim in dims.items():
            if (whole := getattr(module, name, None)) is not None:
                part = nn.Parameter(whole.detach().chunk(ranks, dim)[0], requires_grad=whole.requires_grad)
                setattr(module, name, part)


def _divided(model: NemotronVL, ranks: int) -> Iterator[tuple[nn.Module, ParallelStyle, dict[str, int]]]:
    """What is divided, how, and along which dimension each of its weights."""
    if has_adapters(model):
        raise NotImplementedError("lora does not work with strategy.tensor above 1; set it to 1, or train in full")
    _check_sizes(model, ranks)
    columns, rows = {"weight": 0, "bias": 0}, {"weight": 1}
    body = model.language_model.model
    yield model.language_model.lm_head, ColwiseParallel(output_layouts=Replicate()), columns
    yield body.embeddings, RowwiseParallel(input_layouts=Replicate()), columns  # rows of its table
    for layer in body.layers:
        mixer = layer.mixer
        if isinstance(mixer, NemotronHAttention):
            wide, narrow = [mixer.q_proj, mixer.k_proj, mixer.v_proj], mixer.o_proj
        elif isinstance(mixer, NemotronHMoE):
            yield mixer.experts, StackedExperts(), StackedExperts.dims
            wide, narrow = [mixer.shared_experts.up_proj], mixer.shared_experts.down_proj
        elif isinstance(mixer, NemotronHMLP):
            wide, narrow = [mixer.up_proj], mixer.down_proj
        else:
            continue
        for module in wide:
            yield module, ColwiseParallel(), columns
        yield narrow, RowwiseParallel(), rows


def _enter(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tensor, whose gradient is summed up over the group."""
    return DTensor.from_local(tensor, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def _wait(head: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
    """Logits that are there: PyTorch gathers them when they are read, and some calls are not made for them."""
    return logits.wait() if isinstance(logits, AsyncCollectiveTensor) else logits


def _check_sizes(model: NemotronVL, ranks: int) -> None:
    config = model.config.text_config
    kinds = {type(layer.mixer) for layer in model.language_model.model.layers}
    sizes: dict[str, int] = {}
    if NemotronHAttention in kinds:
        sizes |= {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    if NemotronHMLP in kinds:
        sizes["intermediate_size"] = config.intermediate_size
    if NemotronHMoE in kinds:
        names = ("moe_intermediate_size", "moe_shared_expert_intermediate_size")
        sizes |= {name: getattr(config, name) for name in names}
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(
                f"strategy.tensor is {ranks}, and the model's {name} is {size}, which it does not divide; expected a "
                f"divisor of all of {', '.join(f'{key}={value}' for key, value in sizes.items())}"
            )
