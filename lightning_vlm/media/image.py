"""Anything that holds an image -> RGB -> patches of the grids that `geometry` names, and back.

The default path resizes in uint8 and keeps it (a quarter of the memory and transfer of float32; the model normalises
on its device). It rounds, and clamps the bicubic overshoot that a float resize keeps; ``as_float`` is that float path,
by the formula of transformers' torchvision backend, for users who want it. PyTorch resizes both, with the same filter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from lightning_vlm.geometry.images import Grid, ImageGeometry, tile_boxes, tile_ratio


def to_rgb(image: Any) -> Image.Image:
    """A PIL image, numpy array or tensor as an RGB PIL image, without changing it.

    What is transparent shows white, as a page behind it would: Pillow's own ``convert("RGB")``, which transformers
    calls, shows the colours that happen to be stored under it instead, often black (black text on black). 16-bit
    greys are scaled. Colour profiles are not applied.

    Args:
        image: A PIL image of any mode, or pixels in 0..255 of shape ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)``,
            ``(H, W, 4)`` (the last channel is opacity), ``(1, H, W)`` or ``(3, H, W)``.

    Returns:
        A new image; the same one where it is RGB already.

    Raises:
        ValueError: If an array's shape or value range is not an image's.
    """
    if not isinstance(image, Image.Image):
        return _on_white(Image.fromarray(_as_uint8(_channels_last(image))))
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        return to_rgb(np.asarray(image))
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in ("La", "RGBa"):  # opacity multiplied in: Pillow divides it out, and converts no further
        image = image.convert(image.mode.upper())
    return _on_white(image)


def array_size(image: np.ndarray | Tensor) -> tuple[int, int]:
    """(height, width) of an array that `to_rgb` takes.

    Args:
        image: The array or tensor.

    Raises:
        ValueError: If its shape is not an image's.
    """
    height, width = _channels_last(image).shape[:2]
    return height, width


def _on_white(image: Image.Image) -> Image.Image:
    """An 8-bit image as RGB: ``(colour * opacity + 255 * (255 - opacity)) / 255``, rounded."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # the colour of a 16-bit file, whose pixels Pillow cut to 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    with_opacity = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(with_opacity, mask=with_opacity.getchannel("A"))
    return page


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # Pillow's own conversion clips: it would turn white
    scaled = (values / 257).round().astype(np.uint8)
    if (key := image.info.get("transparency")) is not None:
        scaled[values == key] = 255
    return Image.fromarray(scaled).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    # Pillow's convert does not know this mode; its colour management does.
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None, "an image is returned unless inPlace is asked for"
    return converted


def _channels_last(image: Any) -> np.ndarray:
    """``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image  # numpy has no such type
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)):
        raise ValueError(f"an image array has shape {array.shape}; expected (H, W), (H, W, 3) or (3, H, W)")
    return array


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 255) or 0 < high <= 1:  # written so that NaN fails
        raise ValueError(f"an image array of {array.dtype} spans {low}..{high}; expected pixels in 0..255")
    return array.round().astype(np.uint8)


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
        ``(num_patches, 3 * patch_size**2)`` patches, row-major, each laid out (channel, row, column), uint8
        or float32, both in 0..255; and the grid of each tile.
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
    tiles = [pixels[:, top:bottom, left:right] for left, top, right, bottom in tile_boxes(rows, columns, side)]
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


def resize_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resizes with an antialiased bicubic filter, as vLLM does it.

    Args:
        pixels: ``(..., 3, H, W)`` in 0..255: uint8 are rounded and clamped, floats keep the overshoot.
        height: Wanted.
        width: Wanted.

    Returns:
        ``(..., 3, height, width)`` of the same type; the same tensor where the size is right already.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels
    rows = pixels if pixels.ndim == 4 else pixels[None]
    resized = torch.nn.functional.interpolate(
        rows, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized if pixels.ndim == 4 else resized[0]


def image_pixels(image: Image.Image) -> Tensor:
    """``(3, H, W)`` uint8 pixels of an RGB image, laid out in memory as Pillow has them: row, column, channel."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def _resize(image: Image.Image, height: int, width: int, as_float: bool) -> Tensor:
    pixels = image_pixels(image)
    return resize_pixels(pixels.float() if as_float else pixels, height, width)
