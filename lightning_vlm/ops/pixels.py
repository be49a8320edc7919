"""Pixels in 0..255 -> the normalised floats that the vision tower was trained on; always in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_patches(patches: Tensor, mean: Tensor, std: Tensor, frames: int = 1) -> Tensor:
    """Pixels in 0..255 -> float32 ``(x / 255 - mean) / std``, channel by channel.

    Args:
        patches: ``(num_patches, frames * 3 * patch_size**2)``, frame after frame, each channel-major.
        mean: ``(3,)``.
        std: ``(3,)``.
        frames: Frames of a patch: more than one in a video's tubelets.
    """
    values = patches.to(torch.float32, copy=True).div_(255)  # as float32 they are large: one copy, changed in place
    values.unflatten(-1, (frames, 3, -1)).sub_(mean.view(3, 1)).div_(std.view(3, 1))
    return values
