"""What a micro-batch leaves behind on a rank until its backward pass, kind by kind; from shapes alone.

What a layer saves is counted on the layer (`lightning_vlm.training.saved_activations`); here it is added up over the
layers, with what is recomputed, what is frozen and what passes of the tower leave. Sounds are not counted: how many a
batch holds, no setting says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_vlm.models.architecture import LAYER_KINDS
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.ops.cross_entropy import CHUNK_TOKENS
from lightning_vlm.training.saved_activations import Inputs, SavedCounts, document

_RECOMPUTED, _KEPT = 2.5, 1.0
"""Memory of a layer's backward pass beyond what it kept, in units of what it saves. Measured on a CPU (tests): with
recomputation at most 2.5 (Mamba2 in bfloat16, whose scan runs in float32), else at most 1.0."""


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch of a rank.

    Attributes:
        tokens: Its tokens, padding included.
        patches: Its vision patches.
        frame_patches: Most patches of one frame: an image, a tile, or a frame of a video.
    """

    tokens: int
    patches: int
    frame_patches: int


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        kept: From the forward to the backward pass, by kind of layer and by part.
        at_work: The layer whose backward pass runs: what is recomputed of it, and gradients on their way.
        worker: Which that is.
        logits: One chunk of the head: rounded and float32 logits, their log-softmax, or their gradients.
    """

    kept: dict[str, int]
    at_work: int
    worker: str
    logits: int


def activations(
    model: NemotronVL, load: Load, dtype: torch.dtype | None = None, first: bool = True, last: bool = True
) -> Activations:
    """Activations of a micro-batch, all of whose tokens are labelled.

    Args:
        model: What the rank has of the model, frozen as in the run, on the meta device.
        load: The micro-batch.
        dtype: That parameters are computed in, where it is not their own.
        first: Whether the rank has the first stage of a pipeline, or there is none.
        last: Whether it has the last one, or there is none.
    """
    tally = _Tally(model, SavedCounts(dtype), dtype)
    needs_gradient = True  # what comes from another stage needs one
    if first:
        needs_gradient = tally.vision(load)
        needs_gradient |= any(p.requires_grad for p in model.language_model.model.embeddings.parameters())
    logits = tally.language(load.tokens, needs_gradient, last)
    kept = {name: number for name, number in tally.kept.items() if number}
    return Activations(kept, tally.at_work, tally.worker, logits)


class _Tally:
    def __init__(self, model: NemotronVL, counts: SavedCounts, dtype: torch.dtype | None) -> None:
        self.model, self.counts = model, counts
        layers: list[Any] = list(model.language_model.model.layers)
        self.dtype = dtype or layers[0].norm.weight.dtype
        self.width_bytes = model.config.text_config.hidden_size * self.dtype.itemsize
        self.kept: Counter[str] = Counter()
        self.at_work, self.worker = 0, ""

    def language(self, tokens: int, needs_gradient: bool, last: bool) -> int:
        """Layers, last norm and head; returns the bytes of logits."""
        body, width = self.model.language_model.model, self.model.config.text_config.hidden_size

        def layer_inputs(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = torch.empty(1, size, width, dtype=self.dtype)
            return (x,), {"documents": document(size), "attention_mask": None, "use_cache": False}

        needs_gradient = self._layers(body.layers, layer_inputs, tokens, self.width_bytes, needs_gradient)
        if not last:
            return 0
        norm = self.counts.count(body.norm_f, self._rows(width), needs_gradient)
        # The head takes a copy of the labelled positions.
        self.kept["head"] += (norm.of(tokens) + tokens * self.width_bytes) * norm.passes_gradients
        vocabulary = self.model.config.text_config.vocab_size
        return min(tokens, CHUNK_TOKENS) * vocabulary * (2 * torch.float32.itemsize + self.dtype.itemsize)

    def vision(self, load: Load) -> bool:
        """Tower and projector; returns whether their output needs a gradient."""
        tower: Any = self.model.vision_model
        width, config = tower.config.hidden_size, tower.config
        if not load.patches:
            return any(p.requires_grad for p in self.model.multi_modal_projector.parameters())
        at_once, passes = load.patches, 1
        if tower.micro_batch is not None:
            at_once = min(load.patches, tower.micro_batch * load.frame_patches)
            passes = -(-load.patches // at_once)
        layers = list(tower.encoder.layer)
        # As in the tower's forward: several passes, each recomputed as a whole.
        whole_passes = passes > 1 and any(layer.gradient_checkpointing for layer in layers)
        size, row = (at_once if whole_passes else load.patches), width * self.dtype.itemsize

        def layer_inputs(few: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            documents = document(few)
            x = torch.empty(1, few, width, dtype=self.dtype)
            return (x,), {"cu_seqlens": documents.cu_seqlens, "documents": documents}

        embedder = tower.embeddings.patch_projection.weight
        prefix = config.num_summary_tokens * -(-size // load.frame_patches)
        before = self.kept.copy()
        needs = self._layers(layers, layer_inputs, size + prefix, row, embedder.requires_grad, "vision")
        self.kept["vision"] += size * config.patch_dim * self.dtype.itemsize * embedder.requires_grad
        if whole_passes:
            self.at_work += self.kept["vision"] - before["vision"]
            self.kept["vision"] = load.patches * row * needs  # a pass keeps its result

        merged = self.model.config.merge_size**2
        saved = self.counts.count(self.model.multi_modal_projector, self._rows(width * merged), needs)
        if whole_passes:
            self._work("projector", _RECOMPUTED * saved.of(size // merged))
            self.kept["projector"] += load.patches * row * saved.passes_gradients
        else:
            self.kept["projector"] += saved.of(load.patches // merged) * saved.passes_gradients
            self._work("projector", _KEPT * saved.of(load.patches // merged))
        return saved.passes_gradients

    def _layers(
        self, layers: Iterable[Any], inputs: Inputs, size: int, row: int, needs_gradient: bool, name: str = ""
    ) -> bool:
        for layer in layers:
            kind = name or LAYER_KINDS[layer.block_type]
            saved = self.counts.count(layer, inputs, needs_gradient)
            if not saved.passes_gradients:  # nothing is kept; while it runs, it needs about what it would save
                self._work(kind, self.counts.count(layer, inputs, True).of(size))
            elif layer.gradient_checkpointing and layer.training:
                self.kept[kind] += size * row
                self._work(kind, _RECOMPUTED * saved.of(size))
            else:
                self.kept[kind] += saved.of(size)
                self._work(kind, _KEPT * saved.of(size))
            needs_gradient = saved.passes_gradients
        return needs_gradient

    def _work(self, kind: str, number: float) -> None:
        if number > self.at_work:
            self.at_work, self.worker = round(number), kind

    def _rows(self, width: int) -> Inputs:
        return lambda size: ((torch.empty(size, width, dtype=self.dtype),), {})


def autocast_bytes(model: nn.Module) -> int:
    """Half-precision copies of matrices that mixed precision keeps for a forward pass.

    Args:
        model: What the rank has of the model.
    """
    return 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
