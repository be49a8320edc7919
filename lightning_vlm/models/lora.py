"""LoRA adapters in a model (peft's), by its parts and kinds of layers, and what exactly they cover.

Recipes for LoRA name modules as Llama calls them; in a hybrid model ``q_proj`` is in six layers of fifty, and an
adapter that trains next to nothing looks like a run that learns slowly. Here one says what is meant, and gets a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHMoE,
)

from lightning_vlm.models.architecture import aligned
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import PARTS, parts_of
from lightning_vlm.schema import DataError

Scope = Literal["attention", "mamba", "mlp", "experts"]
How = Literal["lora", "full", "frozen"]

DEFAULT_SCOPES: tuple[Scope, ...] = ("attention", "mamba", "mlp")
"""Of the language model. Not the routed experts: each sees a few percent of the tokens, their adapters (one per expert)
are larger than all others together, and the hub's adapter format has no name for them in the released layout."""

_ADAPTER = "default"  # peft's own name for a single one
_LOW_COVERAGE = 0.5
_KINDS = {NemotronHAttention: "attention", NemotronHMamba2Mixer: "mamba", NemotronHMLP: "mlp"}


@dataclass(frozen=True, slots=True)
class Lora:
    """Which parts are trained how; the fields but the last three are parts of the model.

    Attributes:
        language: Kinds of layers that get adapters, or ``lora`` for attention, mamba and mlp, ``full`` or ``frozen``.
        vision: The vision tower.
        projector: Its projector.
        audio: The sound tower.
        audio_projector: Its projector.
        rank: Of the adapters.
        alpha: Their updates are scaled by ``alpha / rank``.
        dropout: Of their inputs while training.

    Raises:
        ValueError: If nothing gets adapters, or a number is none.
    """

    language: list[Scope] | How = "lora"
    vision: How = "frozen"
    projector: How = "frozen"
    audio: How = "frozen"
    audio_projector: How = "frozen"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in PARTS:
            value = getattr(self, name)
            known = get_args(Scope) if isinstance(value, list) else get_args(How)
            if unknown := [entry for entry in (value if isinstance(value, list) else [value]) if entry not in known]:
                raise ValueError(f"lora.{name} is {unknown[0]!r}; expected {', '.join(known)}")
        if self.language == [] or all(self.how(name) != "lora" for name in PARTS):
            raise ValueError("lora gives adapters to nothing; name kinds of layers in lora.language, or leave lora out")
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora has rank {self.rank}, alpha {self.alpha:g} and dropout {self.dropout:g}; expected a rank of at "
                "least 1, an alpha above 0, and a dropout of at least 0 and below 1"
            )
        if self.dropout and "experts" in self.scopes:
            raise ValueError("lora.dropout does not work with adapters on experts; set it to 0, or leave experts out")

    def how(self, part: str) -> How:
        """How a part is trained."""
        value = getattr(self, part)
        return "lora" if isinstance(value, list) else value

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Kinds of layers of the language model that get adapters."""
        if isinstance(self.language, list):
            return tuple(self.language)
        return DEFAULT_SCOPES if self.language == "lora" else ()


@dataclass(frozen=True, slots=True)
class Covered:
    """A line of the coverage table.

    Attributes:
        part: Of the model.
        kind: Of its layers.
        how: They are trained.
        matched: Matrices that have an adapter.
        total: Matrices there are; a stack of experts is one for each expert.
        parameters: Of the adapters, or of what is trained in full.
    """

    part: str
    kind: str
    how: How
    matched: int
    total: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What adapters cover.

    Attributes:
        lines: By part and kind of layer.
        rank: Of the adapters.
    """

    lines: tuple[Covered, ...]
    rank: int

    def __str__(self) -> str:
        rows = [("part", "layers", "trained", "adapters", "matrices", "covered", "parameters")]
        for line in self.lines:
            share = f"{line.matched / line.total:.0%}" if line.how != "full" else "all"
            counts = (f"{line.matched:,}", f"{line.total:,}", share, f"{line.parameters:,}")
            rows.append((line.part, line.kind, line.how, *counts))
        return f"LoRA of rank {self.rank}:\n" + aligned(rows, left=(0, 1, 2))

    def warnings(self) -> list[str]:
        """Parts of which adapters reach less than half, though they were asked for."""
        found = []
        for part in dict.fromkeys(line.part for line in self.lines):
            lines = [line for line in self.lines if line.part == part]
            if all(line.how != "lora" for line in lines):
                continue
            # Experts are left out for a reason, and would be nearly all there is.
            lines = [line for line in lines if line.kind != "experts" or line.how == "lora"]
            matched, total = sum(line.matched for line in lines), sum(line.total for line in lines)
            if matched < _LOW_COVERAGE * total:
                left = ", ".join(line.kind for line in lines if line.how != "lora")
                found.append(
                    f"adapters are on {matched:,} of the {total:,} matrices of {part} ({matched / total:.0%}); it has "
                    f"{left} besides: name them in lora.{part} unless this is meant"
                )
        return found


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter by the names of its tensors in the state dict: ``weight + scaling * b @ a``.

    Attributes:
        base: Name of the weight it is on, in the adapted model.
        a: Name of ``(rank, in)``, or ``(num_experts * rank, in)``.
        b: Name of ``(out, rank)``, or ``(out, rank * num_experts)``.
        scaling: Of the update.
        num_experts: Of the stack it is on; ``None`` for a matrix.
    """

    base: str
    a: str
    b: str
    scaling: float
    num_experts: int | None = None

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """The update, in float32 and the shape of the weight.

        Args:
            a: The tensor called `a`.
            b: The tensor called `b`.
        """
        a, b = a.float(), b.float()
        if self.num_experts is None:
            return self.scaling * (b @ a)
        # As peft has it: experts outside in the one, inside in the other.
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts)
        return self.scaling * torch.einsum("ore,eri->eoi", b, a)


class Float32Factor(nn.Linear):
    """A factor of an adapter: its weight is never in half precision, whatever the model is cast to.

    There most steps of an optimizer are smaller than the distance to the next number, and are lost. The weights that
    adapters are on take no steps and may be halved. Computing is in the precision of the input, as under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rounds the small factor, not the input: the backward pass keeps that, once for all adapters that take it."""
        return nn.functional.linear(input, self.weight.to(input.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

        return super()._apply(moved, recurse)


def add_adapters(model: NemotronVL, lora: Lora) -> Coverage:
    """Adds adapters in place, in float32, and freezes all but them and what is trained in full.

    Args:
        model: With its weights, or on the meta device.
        lora: What is wanted.

    Returns:
        What is covered.

    Raises:
        ImportError: If peft is missing.
        DataError: If a kind of layers or a part that was named is not in the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'lightning-vlm[lora]'") from error
    layers = list(_layers(model))
    present = parts_of(model)
    for name in PARTS:
        if name not in present and lora.how(name) != "frozen":
            raise DataError(
                f"model.lora.{name}", f"{lora.how(name)!r} is for a part that the model has not", "leave it out"
            )
    if isinstance(lora.language, list):
        kinds = {layer.kind for layer in layers if layer.part == "language"}
        if missing := [scope for scope in lora.language if scope not in kinds]:
            pattern = model.config.text_config.hybrid_override_pattern
            raise DataError(
                "model.lora.language",
                f"{missing[0]!r} matches nothing, no layer of {pattern} is one",
                f"name some of {', '.join(sorted(kinds))}",
            )
    chosen = [layer for layer in layers if _has_adapters(lora, layer.part, layer.kind)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=[layer.name for layer in chosen if not layer.stacked],
        target_parameters=[layer.name for layer in chosen if layer.stacked] or None,
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    _keep_float32(model)
    for name, module in present.items():
        if lora.how(name) == "full":
            module.requires_grad_(True)
        elif lora.how(name) == "frozen":
            module.eval()
    return Coverage(tuple(_cover(model, lora, layers)), lora.rank)


def adapters_of(model: nn.Module) -> list[Adapter]:
    """All adapters of a model.

    Args:
        model: After `add_adapters`, also on the meta device.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or _ADAPTER not in module.lora_A:
            continue
        a, b = (f"{name}.lora_{which}.{_ADAPTER}.weight" for which in "AB")
        if isinstance(module, ParamWrapper):
            inside, base = name, module.base_layer
            while isinstance(base, ParamWrapper):
                inside, base = f"{inside}.base_layer", base.base_layer
            weight = f"{inside}.base_layer.{module.parameter_name}"
            found.append(Adapter(weight, a, b, module.scaling[_ADAPTER], module.num_experts))
        else:
            found.append(Adapter(f"{name}.base_layer.weight", a, b, module.scaling[_ADAPTER]))
    return found


def fresh_adapters(model: nn.Module) -> dict[str, Tensor]:
    """What peft initialises adapters with, whole and on the CPU: ``b @ a`` is zero.

    Args:
        model: After `add_adapters`, whole, also on the meta device.
    """
    state = model.state_dict(keep_vars=True)
    values = {}
    for adapter in adapters_of(model):
        a = torch.empty(state[adapter.a].shape, dtype=torch.float32)
        values[adapter.a] = nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        values[adapter.b] = torch.zeros(state[adapter.b].shape, dtype=torch.float32)
    return values


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters; peft need not be there to ask.

    Args:
        model: Any.
    """
    return any(hasattr(module, "lora_A") for module in model.modules())


def without_adapters(name: str) -> str:
    """The name that a tensor of an adapted model has in the model itself.

    Args:
        name: In the state dict of the adapted model. An adapter's own weights keep theirs: those of a stack of experts
            have one around the other.
    """
    return name if ".lora_" in name else name.replace(".base_layer", "")


@dataclass(frozen=True, slots=True)
class _Layer:
    """A weight matrix, or a stack of them, that can have an adapter."""

    part: str
    kind: str
    name: str
    count: int = 1
    stacked: bool = False


def _layers(model: NemotronVL) -> Iterator[_Layer]:
    names = {id(module): name for name, module in model.named_modules()}
    for part, module in parts_of(model).items():
        if part != "language":
            kind = "projector" if PARTS[part].role == "connector" else "blocks"
            inside: Any = module if kind == "projector" else _blocks(module)
            yield from (_Layer(part, kind, names[id(m)]) for m in inside.modules() if isinstance(m, nn.Linear))
    for block in model.language_model.model.layers:
        mixer = block.mixer
        if isinstance(mixer, NemotronHMoE):
            for parameter in ("up_proj", "down_proj"):
                stack = getattr(mixer.experts, parameter)
                yield _Layer("language", "experts", f"{names[id(mixer.experts)]}.{parameter}", len(stack), True)
            shared = mixer.shared_experts
            yield from (_Layer("language", "mlp", names[id(m)]) for m in shared.modules() if isinstance(m, nn.Linear))
            continue
        kind = next(kind for cls, kind in _KINDS.items() if isinstance(mixer, cls))
        yield from (_Layer("language", kind, names[id(m)]) for m in mixer.modules() if isinstance(m, nn.Linear))


def _blocks(tower: Any) -> nn.ModuleList:
    return tower.encoder.layer if hasattr(tower, "encoder") else tower.layers


def _has_adapters(lora: Lora, part: str, kind: str) -> bool:
    return kind in lora.scopes if part == "language" else lora.how(part) == "lora"


def _keep_float32(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # to the factors' dtype
            for factors in (module.lora_A, module.lora_B):
                factors[_ADAPTER].__class__ = Float32Factor  # adds no state: weights, hooks and names stay
                factors[_ADAPTER].float()


def _cover(model: NemotronVL, lora: Lora, layers: list[_Layer]) -> Iterator[Covered]:
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sizes = {
        without_adapters(adapter.base).removesuffix(".weight"): parameters[adapter.a] + parameters[adapter.b]
        for adapter in adapters_of(model)
    }
    for part, kind in dict.fromkeys((layer.part, layer.kind) for layer in layers):
        found = [layer for layer in layers if (layer.part, layer.kind) == (part, kind)]
        total = sum(layer.count for layer in found)
        matched = sum(layer.count for layer in found if layer.name in sizes)
        how = lora.how(part)
        if how == "lora" and not matched:
            how = "frozen"
        if how == "full":
            sizes |= {layer.name: parameters[layer.name + ("" if layer.stacked else ".weight")] for layer in found}
        size = sum(sizes.get(layer.name, 0) for layer in found)
        yield Covered(part, kind, how, matched, total, size)
