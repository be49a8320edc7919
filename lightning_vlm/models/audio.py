"""The sound branch: transformers' Parakeet encoder over clips, each as if it were alone, and a projector after it.

Clips of a batch are padded to the longest and masked in every layer. What would mix them all the same is off: batch
normalisation keeps the statistics it was trained with, also while it is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ParakeetEncoder, ParakeetEncoderConfig

from lightning_vlm.models.projector import MultiModalProjector


class FixedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation by the statistics of its checkpoint, also in training; weight and bias are trained.

    Those of a batch would make a clip depend on the others and on padding.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """``(num_clips, channels, T)`` to the same."""
        mean: Any = self.running_mean
        # FSDP2's mixed precision casts parameters and not statistics; kernels take both as float32 beside bfloat16.
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return nn.functional.batch_norm(hidden, mean, self.running_var, weight, bias, training=False, eps=self.eps)


def make_audio_tower(config: ParakeetEncoderConfig) -> ParakeetEncoder:
    """A Parakeet encoder whose clips do not see each other."""
    tower = ParakeetEncoder(config)
    for module in tower.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = FixedBatchNorm1d  # adds no state
    return tower


def make_audio_projector(config: Any, output_size: int) -> MultiModalProjector:
    """The projector after it, ``sound_projection`` of the released checkpoints.

    Args:
        config: Of the tower, with ``projection_hidden_size`` and ``projection_bias``.
        output_size: Width of the language model.
    """
    return MultiModalProjector(config.hidden_size, config.projection_hidden_size, output_size, config.projection_bias)


def encode_sounds(
    tower: nn.Module, projector: nn.Module, input_features: Tensor, mask: Tensor | None
) -> tuple[Tensor, list[int]]:
    """Clips as language-model tokens.

    Args:
        tower: The encoder.
        projector: The projector.
        input_features: ``(num_clips, num_frames, num_mel_bins)``.
        mask: ``(num_clips, num_frames)`` bool, true for frames that count.

    Returns:
        ``(num_tokens, hidden_size)``, clips one after another without their padding; and the tokens of each.
    """
    weight = next(projector.parameters())
    mask = torch.ones(input_features.shape[:2], dtype=torch.bool, device=weight.device) if mask is None else mask.bool()
    outputs = tower(input_features=input_features.to(weight.dtype), attention_mask=mask)
    is_token = outputs.attention_mask.bool()
    return projector(outputs.last_hidden_state[is_token]), is_token.sum(-1).tolist()
