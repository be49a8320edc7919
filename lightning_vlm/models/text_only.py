"""Text-only batches: a pass of the tower over an absent image, whose result nobody sees and whose gradients are zero.

Ranks that train together must call the same collectives. One whose batch has no image calls none of the tower's, and
the others wait for it forever, so it runs the tower and the projector on the smallest image there is. That stays
outside the token sequence, where a Mamba state would see it. The price is a pass over four patches; what is gained is
that no strategy has to look for unused parameters, and that the batch's numbers are those without the pass, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache

from lightning_vlm.models.config import NemotronVLConfig


def needs_absent_image(parts: Sequence[nn.Module], training: bool, cache: Cache | None) -> bool:
    """The rule: whether a forward without images runs the tower and the projector all the same.

    It does where a rank with images would call a collective in them:

    - In a training forward, if any of their parameters is trained (also by an adapter). DDP averages every such
      gradient over the ranks, FSDP2 scatters them, and this rank must bring its own, zero.
    - If any of their parameters is a shard (a `DTensor`), trained or not, in training, validation and generation
      alike: FSDP2 gathers shards in the forward itself. Only the prompt's forward of a generation can have images; a
      step that continues a cache has none on any rank.

    Everywhere else (frozen whole parameters, evaluation of whole parameters) nothing waits and nothing is run. What
    is asked is the same on every rank but for the cache, which generation in step (``synced_gpus``) keeps alike.

    Args:
        parts: The tower and the projector.
        training: Whether the model is in training mode.
        cache: Of a generation in progress.
    """
    parameters = [parameter for part in parts for parameter in part.parameters()]
    if training and torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return True
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    return sharded and (cache is None or not cache.get_seq_length())


def with_absent_image(
    inputs_embeds: Tensor,
    parts: Sequence[nn.Module],
    config: NemotronVLConfig,
    get_image_features: Callable[[Tensor, Tensor], tuple[Tensor, list[int]]],
) -> Tensor:
    """Runs the tower and the projector on the smallest image, and lets the embeddings depend on it with weight zero.

    Nothing is multiplied by zero, for 0 * inf is NaN: the embeddings are handed on as they are, and the backward pass
    starts from zeros and keeps to them even where parameters or activations are no longer finite (but inside
    checkpointing that is not transformers' own, which recomputes the true activations). Dropout in the tower or in
    an adapter of it does not move the random numbers of the language model.

    Args:
        inputs_embeds: ``(B, T, D)``.
        parts: The tower and the projector.
        config: Of the model.
        get_image_features: ``(pixel_values, image_grid_hw)`` to features, through both parts.

    Returns:
        ``inputs_embeds``, the same numbers.
    """
    device, merge = inputs_embeds.device, config.merge_size
    pixels = torch.zeros(merge**2, config.vision_config.patch_dim, dtype=torch.uint8, device=device)
    grid = torch.tensor([[merge, merge]], device=device)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _without_checkpointing(parts),
        saved_tensors_hooks(torch.Tensor.detach, _neutral),
    ):
        features, _ = get_image_features(pixels, grid)
    return _WeightZero.apply(inputs_embeds, features)


class _WeightZero(torch.autograd.Function):
    """The first input; the second one's gradient is zero, but it is there, and so are those of all it came from."""

    @staticmethod
    def forward(ctx: Any, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        ctx.like = features.detach()
        return inputs_embeds.view_as(inputs_embeds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.like)


def _neutral(saved: Tensor) -> Tensor:
    """What the backward pass reads instead of a weight or activation: a finite number, and no zero to divide by."""
    return torch.ones_like(saved) if saved.is_floating_point() else saved


@contextmanager
def _without_checkpointing(parts: Sequence[nn.Module]) -> Iterator[None]:
    """A recomputed layer would bypass `_neutral`; four patches need no saving of memory either."""
    modules: list[Any] = [module for part in parts for module in part.modules()]
    layers = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
