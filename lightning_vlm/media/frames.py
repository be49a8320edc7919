"""Frames of a video <-> patches of tubelets: successive frames side by side in each patch, as the tower embeds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lightning_vlm.geometry.images import Grid
from lightning_vlm.media.image import image_pixels, patches_to_pixels, pixels_to_patches, resize_pixels, to_rgb


def frames_to_patches(
    frames: Sequence[Image.Image], grid: Grid, patch_size: int, frames_per_tubelet: int, as_float: bool = False
) -> Tensor:
    """Resizes frames and cuts them into tubelets.

    Args:
        frames: RGB images.
        grid: (rows, columns) of patches of each frame.
        patch_size: Side of a patch, in pixels.
        frames_per_tubelet: Frames that share a patch; the last frame is repeated where it does not divide them.
        as_float: Resize in float32 without clamping instead of in uint8.

    Returns:
        ``(num_tubelets * rows * columns, frames_per_tubelet * 3 * patch_size**2)``, tubelet after tubelet; a patch
        holds its frames one after another, each channel-major. Source: Megatron's packing of frames, as in vLLM.
    """
    rows, columns = grid
    patches = []
    for frame in frames:
        pixels = image_pixels(to_rgb(frame))
        pixels = resize_pixels(pixels.float() if as_float else pixels, rows * patch_size, columns * patch_size)
        patches.append(pixels_to_patches(pixels, patch_size))
    patches += patches[-1:] * (-len(patches) % frames_per_tubelet)
    tubelets = torch.stack(patches).unflatten(0, (-1, frames_per_tubelet))
    return tubelets.transpose(1, 2).flatten(2).flatten(0, 1)


def patches_to_frames(patches: Tensor, grid: Grid, frames_per_tubelet: int) -> Tensor:
    """Inverse of `frames_to_patches`: what the model saw, for people to look at.

    Args:
        patches: ``(num_tubelets * rows * columns, frames_per_tubelet * 3 * patch_size**2)``.
        grid: (rows, columns) of patches of each frame.
        frames_per_tubelet: Frames that share a patch.

    Returns:
        ``(num_tubelets * frames_per_tubelet, 3, H, W)``, the repeated frames at the end included.
    """
    rows, columns = grid
    patch_size = math.isqrt(patches.shape[-1] // (3 * frames_per_tubelet))
    tubelets = patches.unflatten(0, (-1, rows * columns)).unflatten(2, (frames_per_tubelet, -1)).transpose(1, 2)
    return torch.stack([patches_to_pixels(frame, grid, patch_size) for frame in tubelets.flatten(0, 1)])
