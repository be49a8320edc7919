"""Pixels in 0..255 -> the normalised floats that the vision tower was trained on; always in float32."""

from __future__ import annotations

from torch import Tensor


def normalize_patches(patches: Tensor, mean: Tensor, std: Tensor, frames: int = 1) -> Tensor:
    """Pixels in 0..255 -> float32 ``(x / 255 - mean) / std``, channel by channel.

    Args:
        patches: ``(num_patches, frames * 3 * patch_size**2)``, frame after frame, each channel-major.
        mean: ``(3,)``.
        std: ``(3,)``.
        frames: Frames of a patch: more than one in a video's tubelets.
    """
    channels = patches.float().div(255).unflatten(-1, (frames, 3, -1))
    return ((channels - mean.view(3, 1)) / std.view(3, 1)).flatten(-3)
