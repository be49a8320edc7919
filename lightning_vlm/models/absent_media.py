"""Batches without images, videos or sounds: a pass over an absent one, whose result nobody sees, with zero gradients.

Ranks that train together must call the same collectives. One whose batch has no image calls none of the tower's, and
the others wait for it forever, so it runs the tower and the projector on the smallest image there is; likewise for
videos and sounds. That stays outside the token sequence, where a Mamba state would see it. The price is a pass over
four patches; what is gained is that no strategy has to look for unused parameters, and that the batch's numbers are
those without the pass, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache

from lightning_vlm.models.whole_passes import without_recomputation

_SHORTEST_SOUND = 8  # spectrogram frames: one token at the released subsampling


def absent_features(model: Any, kind: str, cache: Cache | None) -> Tensor | None:
    """Features of the smallest medium of a kind that the batch has none of, if the model has to run one.

    Nothing is multiplied by zero, for 0 * inf is NaN: the backward pass starts from zeros (see `weight_zero`) and keeps
    to them even where parameters or activations are no longer finite (but inside checkpointing that is not
    transformers' own, which recomputes the true activations). Dropout in a tower or in an adapter of it does not move
    the random numbers of the language model.

    Args:
        model: The `NemotronVL`.
        kind: ``image``, ``video`` or ``sound``.
        cache: Of a generation in progress.

    Returns:
        ``(num_tokens, hidden_size)``, or ``None`` where nobody waits for it.
    """
    path, own = _parts(model, kind)
    if not path or not needs_absent_medium(path, own, model.training, cache):
        return None
    device = next(path[0].parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        without_recomputation(*path),  # a recomputed layer would bypass `_neutral`; four patches need no saving either
        saved_tensors_hooks(torch.Tensor.detach, _neutral),
    ):
        if kind == "sound":
            bins = model.config.audio_config.num_mel_bins
            return model.get_audio_features(torch.zeros(1, _SHORTEST_SOUND, bins, device=device))[0]
        vision, merge = model.config.vision_config, model.config.merge_size
        if kind == "image":
            pixels = torch.zeros(merge**2, vision.patch_dim, dtype=torch.uint8, device=device)
            return model.get_image_features(pixels, torch.tensor([[merge, merge]], device=device))[0]
        pixels = torch.zeros(merge**2, vision.video_patch_dim, dtype=torch.uint8, device=device)
        return model.get_video_features(pixels, torch.tensor([[1, merge, merge]], device=device))[0]


def needs_absent_medium(
    path: Sequence[nn.Module], own: Sequence[nn.Module], training: bool, cache: Cache | None
) -> bool:
    """The rule: whether a forward without media of a kind runs the modules for them all the same.

    It does where a rank with such media would call a collective in them:

    - In a training forward, if any parameter is trained that no other kind reaches (also by an adapter). DDP averages
      every such gradient over the ranks, FSDP2 scatters them, and this rank must bring its own, zero.
    - If any parameter on their way is a shard (a `DTensor`), trained or not, in training, validation and generation
      alike: FSDP2 gathers shards in the forward itself. Only the prompt's forward of a generation can have media; a
      step that continues a cache has none on any rank.

    Everywhere else (frozen whole parameters, evaluation of whole parameters) nothing waits and nothing is run. What
    is asked is the same on every rank but for the cache, which generation in step (``synced_gpus``) keeps alike.

    Args:
        path: The modules that media of the kind go through.
        own: Those that the batch's other media may not reach.
        training: Whether the model is in training mode.
        cache: Of a generation in progress.
    """
    if training and torch.is_grad_enabled() and any(p.requires_grad for part in own for p in part.parameters()):
        return True
    sharded = any(isinstance(parameter, DTensor) for part in path for parameter in part.parameters())
    return sharded and (cache is None or not cache.get_seq_length())


def weight_zero(inputs_embeds: Tensor, features: Tensor) -> Tensor:
    """Lets embeddings depend on features with weight zero.

    Args:
        inputs_embeds: ``(B, T, D)``.
        features: From `absent_features`.

    Returns:
        ``inputs_embeds``, the same numbers.
    """
    return _WeightZero.apply(inputs_embeds, features)


def _parts(model: Any, kind: str) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """The modules on a kind's way, and those that are its own; none where the model does not know the kind."""
    if kind == "sound":
        path = () if model.audio_tower is None else (model.audio_tower, model.embed_audio)
        return path, path
    path = (model.vision_model, model.multi_modal_projector)
    if kind == "image":
        return path, path
    embedder = model.vision_model.embeddings.video_patch_projection
    return ((), ()) if embedder is None else (path, (embedder,))  # without one, frames go the way of images


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
