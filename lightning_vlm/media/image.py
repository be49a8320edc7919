"""An RGB image -> patches of the grids that `geometry` names, and back.

The default path resizes with Pillow and keeps uint8 (a quarter of the memory and transfer of float32; the model
normalises on its device). It clamps the bicubic overshoot that a float resize keeps; ``as_float`` is that exact float
path, equal to transformers' torchvision backend, for parity tests and for users who want it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_vlm.geometry import Grid, ImageGeometry, tile_boxes, tile_ratio


def image_to_patches(
    image: Image.Image, geometry: ImageGeometry, grid: Grid | None = None, as_float: bool = False
) -> tuple[Tensor, list[Grid]]:
    """Resizes one RGB image and cuts it into patches.

    Args:
        image: An RGB image.
        geometry: Mode and numbers.
        grid: Dynamic mode: the grid to use instead of the geometry's own answer (images that share a budget).
        as_float: Resize in float32 without clamping instead of in uint8.

    Returns:
        ``(num_patches, 3 * patch_size**2)`` patches, row-major, each laid out (channel, row, column), uint8 or float32,
        both in 0..255; and the grid of each tile.
    """
    size = geometry.patch_size
    if geometry.mode == "dynamic":
        rows, columns = grid or geometry.image_grids(image.height, image.width)[0]
        pixels = _resize(image, rows * size, columns * size, as_float)
        return pixels_to_patches(pixels, size), [(rows, columns)]

    grids = geometry.image_grids(image.height, image.width)
    rows, columns = tile_ratio(image.height, image.width, geometry)
    side = geometry.tile_size
    pixels = _resize(image, rows * side, columns * side, as_float)
    tiles = [
        pixels[:, top:bottom, left:right] for left, top, right, bottom in tile_boxes(rows, columns, side)
    ]
    if len(grids) > len(tiles):
        tiles.append(_resize(image, side, side, as_float))
    return torch.cat([pixels_to_patches(tile, size) for tile in tiles]), grids


def pixels_to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Cuts ``(3, H, W)`` pixels into ``(H/p * W/p, 3 * p * p)`` patches, row-major, channel-major inside.

    Args:
        pixels: Both sides multiples of ``patch_size``.
        patch_size: Side of a patch, in pixels.
    """
    channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.reshape(channels, rows, patch_size, columns, patch_size).permute(1, 3, 0, 2, 4)
    return grid.reshape(rows * columns, channels * patch_size**2)


def patches_to_pixels(patches: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """Inverse of `pixels_to_patches`: what the model saw, for people to look at.

    Args:
        patches: ``(rows * columns, 3 * patch_size**2)``.
        grid: (rows, columns).
        patch_size: Side of a patch, in pixels.

    Returns:
        ``(3, H, W)``.
    """
    rows, columns = grid
    pixels = patches.reshape(rows, columns, 3, patch_size, patch_size).permute(2, 0, 3, 1, 4)
    return pixels.reshape(3, rows * patch_size, columns * patch_size)


def _resize(image: Image.Image, height: int, width: int, as_float: bool) -> Tensor:
    if not as_float:
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    if image.size == (width, height):
        return pixels
    return torch.nn.functional.interpolate(
        pixels[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )[0]
