"""What a model consists of: parameters, memory and share of each component and part, trainable or frozen.

The map is that of `lightning_vlm.models.parts`, by which a run freezes parts and sets learning rates. Everything is
read off the modules, so a model on the meta device, which holds no weights, is told like a loaded one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from lightning_vlm.models.census import Census, Count
from lightning_vlm.models.parts import PARTS, Part, parts_of

COMPONENTS = ("language_model", "vision_model", "projector", "audio", "other")
LAYER_KINDS = {"linear_attention": "Mamba2", "full_attention": "attention", "mlp": "MLP", "moe": "MoE"}
"""Names of the layers of the language model, by their type in transformers."""


@dataclass(frozen=True, slots=True)
class PartSummary:
    """One part of the model.

    Attributes:
        name: By which users freeze it and set its learning rate.
        place: Where it is, and what it is to the others.
        kind: Its class.
        count: What it holds.
    """

    name: str
    place: Part
    kind: str
    count: Count

    def to_dict(self) -> dict[str, Any]:
        """All but the name."""
        place = {"attribute": self.place.attribute, "role": self.place.role, "component": self.place.component}
        return {**place, "class": self.kind, **self.count.to_dict()}


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """Equal layers of a part, or what stands beside them.

    Attributes:
        part: Name of the part.
        path: Where they are in it.
        kind: ``Mamba2``, ``attention``, ``MLP``, ``MoE``, or a class.
        layers: How many.
        count: What they hold together.
        active: Weights that one token meets in them: of the routed experts only those that it is sent to.
    """

    part: str
    path: str
    kind: str
    layers: int
    count: Count
    active: int

    @property
    def each(self) -> int:
        """Weights of one layer."""
        return self.count.parameters // self.layers

    def to_dict(self) -> dict[str, Any]:
        """All numbers, by name."""
        place = {"part": self.part, "path": self.path, "kind": self.kind}
        return {**place, "layers": self.layers, "each": self.each, "active": self.active, **self.count.to_dict()}


@dataclass(frozen=True, slots=True)
class Inside:
    """The inside of the parts.

    Attributes:
        blocks: In the order of the flow.
        pattern: Layers of the language model: ``M`` Mamba2, ``*`` attention, ``-`` MLP, ``E`` mixture of experts.
        tied: Whether the head's weights are the embedding's; they are counted as the embedding then.
        experts: Routed experts of a layer, and how many of them a token is sent to; ``None`` without a mixture.
    """

    blocks: tuple[BlockSummary, ...]
    pattern: str
    tied: bool
    experts: tuple[int, int] | None

    @property
    def language_parameters(self) -> int:
        """Weights of the language model."""
        return sum(block.count.parameters for block in self.blocks if block.part == "language")

    @property
    def language_active(self) -> int:
        """Weights of the language model that one token meets; the embedding table, of which it reads a row, whole."""
        return sum(block.active for block in self.blocks if block.part == "language")

    def to_dict(self) -> dict[str, Any]:
        """All numbers, by name."""
        routed, chosen = self.experts or (0, 0)
        return {
            "pattern": self.pattern,
            "tied_embeddings": self.tied,
            "language_parameters": self.language_parameters,
            "language_active": self.language_active,
            "routed_experts": routed,
            "experts_per_token": chosen,
            "blocks": [block.to_dict() for block in self.blocks],
        }

    def __str__(self) -> str:
        rows = []
        for block in self.blocks:
            if block.count.parameters:  # a module of buffers alone is in the sum of what is fixed
                numbers = (block.layers, block.each, block.count.parameters, block.active)
                rows.append((block.part, block.path, block.kind, *(f"{number:,}" for number in numbers)))
        header = ("part", "block", "kind", "layers", "each", "parameters", "per token")
        lines = [
            aligned([header, *rows], left=(0, 1, 2)),
            "",
            f"pattern  {self.pattern}",
            f"head     {'the embedding again (tied), counted once' if self.tied else 'of its own, not tied'}",
        ]
        if self.experts is not None:
            routed, chosen = self.experts
            lines.append(
                f"experts  a token meets {chosen} of {routed} in each MoE layer: {self.language_active:,} of the "
                f"language model's parameters ({_percent(self.language_active, self.language_parameters)})"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model in numbers; as a string, its tables.

    Attributes:
        parts: In the order of the flow.
        other: What no part holds.
        dtypes: Parameters of each dtype.
        inside: The inside of the parts, where it was asked for.
    """

    parts: tuple[PartSummary, ...]
    other: Count
    dtypes: dict[str, int]
    inside: Inside | None = None

    @property
    def components(self) -> dict[str, Count]:
        """What each of `COMPONENTS` holds; zeros for what the model lacks."""
        counts = dict.fromkeys(COMPONENTS, Count()) | {"other": self.other}
        for part in self.parts:
            counts[part.place.component] += part.count
        return counts

    @property
    def total(self) -> Count:
        """What the model holds."""
        return sum((part.count for part in self.parts), self.other)

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, shares in percent of the parameters."""
        whole = max(self.total.parameters, 1)
        data: dict[str, Any] = {
            "total": self.total.to_dict(),
            "dtypes": dict(self.dtypes),
            "components": {
                name: {**count.to_dict(), "share": 100 * count.parameters / whole}
                for name, count in self.components.items()
            },
            "parts": {part.name: part.to_dict() for part in self.parts},
        }
        return data if self.inside is None else {**data, "inside": self.inside.to_dict()}

    def __str__(self) -> str:
        total = self.total
        components = [("component", "parameters", "share", "memory", "trainable", "state")]
        for name, count in [*self.components.items(), ("total", total)]:
            share = _percent(count.parameters, total.parameters)
            memory = format_bytes(count.parameter_bytes)
            components.append((name, f"{count.parameters:,}", share, memory, f"{count.trainable:,}", count.state))
        parts = [("part", "module", "role", "class", "parameters", "state")]
        for part in self.parts:
            where = (part.name, part.place.attribute, part.place.role, part.kind)
            parts.append((*where, f"{part.count.parameters:,}", part.count.state))
        dtypes = ", ".join(f"{number:,} {dtype}" for dtype, number in self.dtypes.items())
        lines = [
            aligned(components, left=(0, 5)),
            "",
            aligned(parts, left=(0, 1, 2, 3, 5)),
            "",
            f"dtypes   {dtypes}",
            f"fixed    {total.fixed:,} values in {format_bytes(total.fixed_bytes)} that no training changes: buffers, "
            "and layer scales of 1",
        ]
        return "\n".join(lines if self.inside is None else [*lines, "", str(self.inside)])


def describe_architecture(model: nn.Module, detailed: bool = False) -> Architecture:
    """Counts a model.

    Args:
        model: The `NemotronVL`, on any device, also the meta device.
        detailed: Also count the inside of its parts.
    """
    census = Census(model)
    parts = tuple(
        PartSummary(name, PARTS[name], type(module).__name__, census.count(module))
        for name, module in parts_of(model).items()
    )
    other = census.count(model)  # what no part has held so far
    return Architecture(parts, other, census.dtypes, _inside(model) if detailed else None)


def print_architecture(model: nn.Module, detailed: bool, save_to_file: str | os.PathLike[str] | None) -> None:
    """Prints what a model consists of.

    Args:
        model: The `NemotronVL`.
        detailed: Also the inside of its parts.
        save_to_file: Where to write the same text, besides.
    """
    text = str(describe_architecture(model, detailed))
    print(text)
    if save_to_file is not None:
        save_text(text, save_to_file)


def save_text(text: str, path: str | os.PathLike[str]) -> None:
    """Writes a text, and the folder for it where there is none.

    Args:
        text: Without its last line end.
        path: The file; an earlier one is replaced.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def format_bytes(number: int) -> str:
    """A number of bytes for people.

    Args:
        number: The bytes.
    """
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{number} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many there are besides.

    Args:
        names: At least one.
        most: How many are named.
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Rows as lines with aligned columns.

    Args:
        rows: Cells, as many in each row.
        left: Columns that are aligned to the left; the others, numbers, to the right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [f"{cell:<{widths[i]}}" if i in left else f"{cell:>{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _inside(model: nn.Module) -> Inside:
    census, parts = Census(model), parts_of(model)
    blocks = tuple(block for name, module in parts.items() for block in _blocks(module, name, "", census))
    language: Any = parts["language"]
    mixtures = [module for module in language.modules() if isinstance(module, NemotronHMoE)]
    experts = (mixtures[0].gate.num_experts, mixtures[0].gate.top_k) if mixtures else None
    tied = language.get_output_embeddings().weight is language.get_input_embeddings().weight
    return Inside(blocks, language.config.hybrid_override_pattern, tied, experts)


def _blocks(module: nn.Module, part: str, prefix: str, census: Census) -> Iterator[BlockSummary]:
    """Repeated layers by kind, and by their names what stands beside them."""
    own = census.count(module, recurse=False)
    if own != Count():
        yield BlockSummary(part, prefix.rstrip("."), type(module).__name__, 1, own, own.parameters)
    for name, child in module.named_children():
        if _are_layers(child):
            yield from _grouped(list(child.children()), part, prefix + name, census)
        elif any(_are_layers(inner) for inner in child.modules()):
            yield from _blocks(child, part, f"{prefix}{name}.", census)
        elif (count := census.count(child)) != Count():
            yield BlockSummary(part, prefix + name, type(child).__name__, 1, count, count.parameters)


def _are_layers(module: nn.Module) -> bool:
    layers = list(module.children()) if isinstance(module, nn.ModuleList) else []
    return any(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def _grouped(layers: list[nn.Module], part: str, path: str, census: Census) -> Iterator[BlockSummary]:
    """Layers of one kind and one size together, in the order in which they come first."""
    groups: dict[tuple[str, Count], list[nn.Module]] = {}
    for layer in layers:
        kind = LAYER_KINDS.get(getattr(layer, "block_type", ""), type(layer).__name__)
        groups.setdefault((kind, census.count(layer)), []).append(layer)
    for (kind, each), alike in groups.items():
        count = sum([each] * len(alike), Count())
        yield BlockSummary(part, path, kind, len(alike), count, count.parameters - sum(map(_idle_parameters, alike)))


def _idle_parameters(layer: nn.Module) -> int:
    """Weights of the experts that one token is not sent to."""
    idle = 0
    for mixture in layer.modules():
        if isinstance(mixture, NemotronHMoE):
            held = sum(parameter.numel() for parameter in mixture.experts.parameters())
            idle += held - held * mixture.gate.top_k // mixture.gate.num_experts
    return idle


def _percent(number: int, whole: int) -> str:
    return f"{100 * number / max(whole, 1):.2f} %"
