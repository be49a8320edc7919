"""Stages: a model as a row of pieces, each a run of the language model's layers.

The first stage also has the towers, the projectors and the embedding, the last one the norm and the head. A rank keeps
the pieces of its stages and drops the others; names of weights stay those of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.language import packed_inputs
from lightning_vlm.models.load_balancing import Balancing
from lightning_vlm.models.media import MediaInputs, embed_with_media
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import PARTS, parts_of
from lightning_vlm.ops.cross_entropy import linear_cross_entropy, shift_labels
from lightning_vlm.segments import documents_from_cu_seqlens

End = Literal["head", "states"]


def balance(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Divides layers so that the most expensive stage costs as little as can be.

    Args:
        costs: Of each layer, in any unit.
        stages: How many; each gets one layer at least.
        first: What the first stage does besides (towers, embedding).
        last: What the last stage does besides (head).

    Returns:
        The layers of each stage.

    Raises:
        ValueError: If there are fewer layers than stages.
    """
    count = len(costs)
    if count < stages:
        raise ValueError(
            f"the language model has {count} layers, too few for {stages} stages of a pipeline; expected at most "
            f"{count} stages: lower strategy.stages or strategy.stages_per_rank"
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[s][n]: the least cost of the dearest of the first s stages, if they have the first n layers
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        besides = (first if stage == 1 else 0.0) + (last if stage == stages else 0.0)
        for stop in range(stage, count - (stages - stage) + 1):
            for start in range(stage - 1, stop):
                cost = max(best[stage - 1][start], sums[stop] - sums[start] + besides)
                if cost < best[stage][stop]:
                    best[stage][stop], cut[stage][stop] = cost, start
    bounds = [count]
    for stage in range(stages, 0, -1):
        bounds.append(cut[stage][bounds[-1]])
    bounds.reverse()
    return [range(start, stop) for start, stop in pairwise(bounds)]


def divide_by_parameters(model: NemotronVL, stages: int) -> list[range]:
    """The layers of each stage, balanced by the number of parameters.

    Args:
        model: Whole, on the meta device or not.
        stages: How many.
    """

    def size(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    first, last = _ends(model)
    return balance([size(layer) for layer in model.language_model.model.layers], stages, size(*first), size(*last))


def _ends(model: NemotronVL) -> tuple[list[nn.Module], list[nn.Module]]:
    """What the first and the last stage have besides layers."""
    body = model.language_model.model
    return [*media_parts(model), body.embeddings], [body.norm_f, model.language_model.lm_head]


def stage_table(model: NemotronVL, layers: Sequence[range], owners: Sequence[int]) -> str:
    """What each stage holds, a line each.

    Args:
        model: Whole, on the meta device or not.
        layers: Of each stage.
        owners: Rank of each stage in its pipeline.
    """
    first, last = _ends(model)
    media = [name for name in parts_of(model) if PARTS[name].role != "language_model"]
    rows = []
    for index, own in enumerate(layers):
        modules = [model.language_model.model.layers[layer] for layer in own]
        names = [f"layers {own[0]}-{own[-1]}" if len(own) > 1 else f"layer {own[0]}"]
        if index == 0:
            modules += first
            names = [*media, "embeddings", *names]
        if index == len(layers) - 1:
            modules += last
            names += ["norm", "head"]
        size = sum(parameter.numel() for module in modules for parameter in module.parameters())
        rows.append(f"stage {index} on rank {owners[index]}: {size:>14,} parameters  {', '.join(names)}")
    return "\n".join(rows)


class HeldLayers(nn.ModuleDict):
    """Layers that a rank holds, by their numbers in the whole model; iterating gives the layers, as a list would."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())


@dataclass(frozen=True, slots=True)
class StageInputs:
    """What stages are told of their tokens; not a tensor, and nothing that PyTorch would look into for tensors.

    Attributes:
        media: For the first stage.
        labels: ``(B, T)``, for the last stage.
        attention_mask: ``(B, T)`` of padded rows.
        cu_seqlens: ``(num_documents + 1,)`` of a packed row.
        mm_token_type_ids: ``(B, T)``, where images and videos meet.
        balancing: For the routers of all stages.
        sources: Of the rows, for errors.
    """

    media: MediaInputs
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    balancing: Balancing | None = None
    sources: Sequence[str] = ()

    @classmethod
    def of(cls, inputs: dict[str, Any], labels: Tensor | None = None, sources: Sequence[str] = ()) -> StageInputs:
        """From arguments of `NemotronVL.forward`.

        Args:
            inputs: By their names there.
            labels: ``(B, T)``.
            sources: Of the rows.
        """
        media = MediaInputs(**{name: inputs.get(name) for name in MediaInputs.__slots__})
        names = ("attention_mask", "cu_seqlens", "mm_token_type_ids", "balancing")
        return cls(media, labels, **{name: inputs.get(name) for name in names}, sources=sources)


class Stage(nn.Module):
    """A piece of a model that can be called: tokens or hidden states in, hidden states, a loss or logits out.

    It shares its modules with the model.

    Args:
        model: The model, whole or already cut.
        layers: Numbers of its layers.
        is_first: Whether it begins with tokens.
        is_last: Whether it ends with the head.
    """

    model: NemotronVL

    def __init__(self, model: NemotronVL, layers: range, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        whole, own = model.language_model.model, {str(index) for index in layers}
        self.body = copy(whole)
        self.body._modules = dict(whole._modules)
        self.body.layers = nn.ModuleList([layer for name, layer in whole.layers.named_children() if name in own])
        if is_first:
            self.media = nn.ModuleList(media_parts(model))
        else:
            self.body.embeddings = None
        if is_last:
            self.head = model.language_model.lm_head
        else:
            self.body.norm_f = nn.Identity()
        self.__dict__["model"] = model  # to look at: its parts are not this module's

    def forward(
        self,
        x: Tensor,
        inputs: StageInputs,
        scale: Tensor | None = None,
        logits_to_keep: int = 0,
        end: End = "head",
    ) -> Tensor:
        """Goes through the stage.

        Args:
            x: ``(B, T)`` tokens for the first stage, ``(B, T, D)`` hidden states for the others.
            inputs: What the tokens are; media are looked at by the first stage, labels by the last one.
            scale: Of the loss; without one there is none.
            logits_to_keep: Without a loss: of the last so many positions (0: of all).
            end: ``states`` stops the last stage in front of its head.

        Returns:
            ``(B, T, D)``; of the last stage, a float32 scalar, or ``(B, logits_to_keep, V)`` float32.

        Raises:
            DataError: If placeholders and features of media of a row differ in number.
        """
        documents = None
        if inputs.cu_seqlens is not None:
            documents = documents_from_cu_seqlens(inputs.cu_seqlens, x.shape[1])
        if self.is_first:
            # The last stage keeps its labels as they are: none stands where tokens of a pruned video are moved.
            types = inputs.mm_token_type_ids
            try:
                x, _ = embed_with_media(self.model, inputs.media, x, None, None, types, documents, None)
            except FusionError as error:
                raise error.named(inputs.sources) from error.__cause__
        options: dict[str, Any] = {"attention_mask": inputs.attention_mask, "use_cache": False}
        if documents is not None:
            options = packed_inputs(self.model.config.text_config, documents, x.dtype)
        if inputs.balancing is not None:
            options["balancing"] = inputs.balancing
        hidden = self.body(inputs_embeds=x, **options).last_hidden_state
        if not self.is_last or end == "states":
            return hidden
        if scale is None:
            return self.head(hidden[:, -logits_to_keep:, :]).float()
        assert inputs.labels is not None
        return linear_cross_entropy(hidden, self.head, shift_labels(inputs.labels, inputs.cu_seqlens)) * scale


def cut(model: NemotronVL, stages: Sequence[tuple[range, bool, bool]]) -> None:
    """Drops in place what belongs to no stage of this rank.

    Args:
        model: Whole.
        stages: Layers of each, and whether it is the first and the last of the model.

    Raises:
        NotImplementedError: If the head is the embedding: both ends of the pipeline would hold it.
    """
    if model.config.text_config.tie_word_embeddings:
        raise NotImplementedError("tie_word_embeddings: a pipeline would hold the embedding at both of its ends")
    body = model.language_model.model
    held = sorted(index for layers, _, _ in stages for index in layers)
    body.layers = HeldLayers({str(index): body.layers[index] for index in held})
    if not any(first for _, first, _ in stages):
        for part in PARTS.values():
            if part.role != "language_model":
                setattr(model, part.attribute, None)
        body.embeddings = None
    if not any(last for _, _, last in stages):
        body.norm_f = model.language_model.lm_head = None


def media_parts(model: NemotronVL) -> list[nn.Module]:
    """Towers and projectors that a model has."""
    return [module for name, module in parts_of(model).items() if PARTS[name].role != "language_model"]


def hidden_dtype(model: NemotronVL) -> torch.dtype:
    """What hidden states are in, on every rank."""
    return next(iter(model.language_model.model.layers)).norm.weight.dtype
