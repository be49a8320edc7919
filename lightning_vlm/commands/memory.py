"""``lightning-vlm plan --memory``: GiB of each rank of a run, and whether they fit, before a GPU is rented.

From the config alone: the network is made on the meta device and cut as the strategy would cut it; no weight is read.
Numbers of tensors are exact, activations are counted on the layers, and the sum is an upper bound, see
`lightning_vlm.training.memory`. What no setting tells is an allowance in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_vlm.commands.describe import planned_network
from lightning_vlm.commands.memory_layout import Layout, Piece, layout_of, pieces
from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies.parallelize import units
from lightning_vlm.training.activations import Load, activations, autocast_bytes
from lightning_vlm.training.memory import gathered_bytes, gradient_bytes, optimizer_bytes, weight_bytes

GIB = 2**30
_DEFAULT_GPU_GIB = 80
_CONTEXT_BYTES, _FRAGMENTED = GIB * 3 // 2, 0.05
"""CUDA context, workspaces of libraries and buffers of NCCL; and gaps of the allocator. Round numbers, not measured."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        name: ``rank`` or its stage.
        held: Weights, gradients, optimizer, and what the strategy holds besides.
        activations: By kind; empty if the largest micro-batch is not known.
        worker: The kind of layer whose backward pass takes most.
    """

    name: str
    held: dict[str, int]
    activations: dict[str, int]
    worker: str

    @property
    def allowance(self) -> int:
        """For what is not counted: CUDA context, libraries, and gaps of the allocator."""
        return _CONTEXT_BYTES + round(_FRAGMENTED * sum((self.held | self.activations).values()))

    @property
    def total(self) -> int:
        """All of it."""
        return sum((self.held | self.activations).values()) + self.allowance


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What ``plan --memory`` found.

    Attributes:
        layout: How the run is divided.
        precision: Of the Trainer.
        load: The largest micro-batch; ``None`` if no setting tells.
        source: Where it is from, or what to set.
        ranks: One, or one of each stage.
        gpu_gib: Memory of a device.
        model: Options of the module.
    """

    layout: Layout
    precision: str
    load: Load | None
    source: str
    ranks: tuple[RankMemory, ...]
    gpu_gib: float
    model: dict[str, Any]

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool | None:
        """Whether all fit; ``None`` if that depends on what is not known."""
        if self.worst.total > self.gpu_gib * GIB:
            return False
        return None if self.load is None else True


def plan_memory(config: Any) -> MemoryPlan:
    """Plans the memory of a run.

    Args:
        config: Of the command ``plan``, parsed.

    Raises:
        DataError: If the model's config, or data that is there, cannot be read.
        ValueError: If settings do not fit each other.
        NotImplementedError: Likewise.
    """
    layout = layout_of(config.trainer, config.ranks)
    options = config.model.as_dict()
    if layout.gathering is not None and options["optimizer"] == "adamw8bit":
        raise NotImplementedError("optimizer 'adamw8bit' does not work with shards; set optimizer to adamw")
    network = planned_network(options, config.trainer.precision)
    precision = str(config.trainer.precision or "32-true")
    load, source = _load(config.data, network.config, layout.data_ranks)
    found = []
    for rank, piece in enumerate(pieces(network, layout)):
        held = _held(piece.model, layout, options["optimizer"], precision)
        found.append(RankMemory(piece.name, held, *_activations(piece, layout, load, rank)))
    return MemoryPlan(layout, precision, load, source, tuple(found), config.gpu_memory or _gpu_gib(), options)


def _held(model: NemotronVL, layout: Layout, optimizer: str, precision: str) -> dict[str, int]:
    shards = layout.shards
    held = {}
    if not layout.offloads:
        held["weights"] = weight_bytes(model, shards)
        held["gradients"] = gradient_bytes(model, shards)
        held[optimizer] = optimizer_bytes(model, optimizer, shards)
    if layout.gathering is not None:
        held["gathered weights"], held["whole gradients"] = gathered_bytes(model, units(model), layout.gathering)
    if layout.strategy == "ddp":
        held["DDP's buckets"] = held["gradients"]
    if "mixed" in precision:
        held["autocast"] = autocast_bytes(model)
    return held


def _activations(piece: Piece, layout: Layout, load: Load | None, rank: int) -> tuple[dict[str, int], str]:
    if load is None:
        return {}, ""
    dtype = None if layout.gathering is None else layout.gathering.param_dtype
    found = activations(piece.model, load, dtype, piece.first, piece.last)
    times = layout.in_flight(rank)
    own = {name: times * number for name, number in found.kept.items()}
    own["layer at work"] = found.at_work
    return ({**own, "logits": found.logits} if found.logits else own), found.worker


def _load(data: Any, config: NemotronVLConfig, ranks: int) -> tuple[Load | None, str]:
    """The largest micro-batch, from settings, or from the data where it is there."""
    tokens, patches = None, data.batch_patches
    if data.batch_tokens is not None and (data.packing or data.sampler == "token_budget"):
        tokens, source = data.batch_tokens, "data.batch_tokens"
    elif data.max_tokens is not None:
        tokens, source = data.batch_size * data.max_tokens, "data.batch_size x data.max_tokens"
    elif _is_there(data.train):
        datamodule = VLMDataModule(**data.as_dict())
        datamodule.setup("fit")
        largest = datamodule.summary(ranks).largest
        tokens, source = max(batch.tokens for batch in largest), "the largest batch of the data"
        patches = max(batch.patches for batch in largest) if patches is None else patches
    if tokens is None:
        return None, "set data.batch_tokens (and data.batch_patches), or data.max_tokens"
    if patches is not None and patches == data.batch_patches:
        source += ", data.batch_patches"
    options = data.processor_options or {}
    if patches is None:
        kept = 1 - ((options.get("video") or {}).get("pruning_rate") or config.video_pruning_rate)
        patches = round(tokens * config.merge_size**2 / kept)
        source += f"; patches as if all were images, {patches / tokens:g} a token (data.batch_patches is not set)"
    return Load(tokens, patches, _frame_patches(options, config)), source


def _frame_patches(options: dict[str, Any], config: NemotronVLConfig) -> int:
    side = getattr(config, "force_image_size", None) or config.vision_config.max_img_size
    most = (side // config.vision_config.patch_size) ** 2
    return min(most, options.get("max_num_patches") or most)


def _is_there(files: Any) -> bool:
    listed = files if isinstance(files, list) else [files]
    paths = [getattr(each, "path", each) for each in listed]
    return all(isinstance(path, str) and Path(path).exists() for path in paths)


def _gpu_gib() -> float:
    if not torch.cuda.is_available():
        return _DEFAULT_GPU_GIB
    return float(torch.cuda.get_device_properties(0).total_memory / GIB)
