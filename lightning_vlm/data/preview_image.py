"""Patches of a sample -> a picture for people, with the grid of the model's tokens drawn between the pixels.

Lines take up room of their own, so no pixel is painted over: between two lines stands exactly what the model gets,
each pixel as a square of equal pixels where the image is small. A picture is thus a little larger than its image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_vlm.geometry.images import Grid, ImageGeometry
from lightning_vlm.media.image import patches_to_pixels

TOKEN_LINE = (0, 168, 204)
"""Colour between the patches of two tokens, and around the image."""
TILE_LINE = (255, 64, 129)
"""Colour between two tiles."""

_SMALLEST_SIDE = 320  # smaller images are enlarged to about this many pixels
_THICKER_FROM = 1200  # pixels; pages show such pictures reduced, where a line of one pixel would fade
_CLEARLY = 0.9  # the second best arrangement of tiles must fit worse than the best by this factor


@dataclass(frozen=True, slots=True, eq=False)
class PreviewImage:
    """One image as the model gets it.

    Attributes:
        pixels: ``(H, W, 3)`` uint8; static tiles put together again.
        tiles: Rows and columns of tiles in ``pixels``; (1, 1) in dynamic mode.
        patches: Rows and columns of patches in one tile.
        thumbnail: ``(tile_size, tile_size, 3)`` uint8, the last tile; ``None`` where there is none.
        arranged: False where the pixels do not tell how the tiles lay in the image: they stand in one row then.
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per side that become one token.
        lossless: Whether its pictures have to be kept to the pixel.
    """

    pixels: np.ndarray
    tiles: Grid
    patches: Grid
    thumbnail: np.ndarray | None
    arranged: bool
    patch_size: int
    merge_size: int
    lossless: ClassVar[bool] = True

    @property
    def num_tokens(self) -> int:
        """Language-model tokens, start and end markers not counted."""
        tiles = self.tiles[0] * self.tiles[1] + (self.thumbnail is not None)
        return tiles * self.patches[0] * self.patches[1] // self.merge_size**2

    @property
    def size(self) -> str:
        """Height and width as the model gets them, the thumbnail left out."""
        return f"{self.pixels.shape[0]} x {self.pixels.shape[1]} pixels"

    def __str__(self) -> str:
        rows, columns = self.tiles
        patches = f"{self.patches[0]} x {self.patches[1]} patches, {said_tokens(self.num_tokens)}"
        if rows * columns == 1:
            return patches
        arranged = f"{rows} x {columns}" if self.arranged else f"{rows * columns}"
        return f"{arranged} tiles{'' if self.thumbnail is None else ' and a thumbnail'} of {patches}"

    def __repr__(self) -> str:
        return f"PreviewImage({self})"

    @property
    def caption(self) -> str:
        """What is said of it beside its pictures."""
        return f"{self.size}, {self}"

    def parts(self) -> list[tuple[str, list[Image.Image]]]:
        """Its pictures, in parts that have names: there is one, without a name."""
        return [("", self.pictures())]

    def pictures(self) -> list[Image.Image]:
        """The image with its grid, and the thumbnail with its own."""
        scale = max(1, _SMALLEST_SIDE // max(self.pixels.shape))
        cell = self.patch_size * self.merge_size
        tile = (self.patches[0] * self.patch_size, self.patches[1] * self.patch_size)
        shown = [self.pixels] if self.thumbnail is None else [self.pixels, self.thumbnail]
        return [draw_grid(pixels, cell, tile, scale) for pixels in shown]


def sample_images(
    patches: Tensor, grids: Sequence[Grid], tokens: Sequence[int], geometry: ImageGeometry, image_processor: Any
) -> list[PreviewImage]:
    """The images of one sample.

    Args:
        patches: ``(num_patches, 3 * patch_size**2)``, uint8 or normalised floats. Floats are put back into 0..255 and
            rounded: what a float resize overshoots cannot be shown.
        grids: Per tile, rows and columns of patches.
        tokens: Per image, its tokens in the text: they say which tiles belong together.
        geometry: The processor's.
        image_processor: Holds the mean and standard deviation of normalised floats.

    Raises:
        ValueError: If text and tiles are not of the same number of tokens.
    """
    in_text, in_tiles = sum(tokens), geometry.num_tokens(grids)
    if in_text != in_tiles:
        raise ValueError(f"the text has {in_text} image tokens for tiles of {in_tiles}")
    counts = [rows * columns for rows, columns in grids]
    pixels = [
        patches_to_pixels(tile, grid, geometry.patch_size)
        for tile, grid in zip(patches.split(counts), grids, strict=True)
    ]
    tiles = [pixels_to_uint8(tile, image_processor).permute(1, 2, 0).numpy() for tile in pixels]
    images, start = [], 0
    for number in tokens:
        end = start + 1
        while geometry.num_tokens(grids[start:end]) < number:
            end += 1
        images.append(_put_together(tiles[start:end], grids[start], geometry))
        start = end
    return images


def arrange_tiles(tiles: np.ndarray, thumbnail: np.ndarray | None) -> Grid | None:
    """How the tiles of an image lay in it: found from the pixels, because a sample does not hold it.

    Args:
        tiles: ``(num_tiles, side, side, 3)`` in reading order, the thumbnail left out.
        thumbnail: ``(side, side, 3)``, the whole image: the arrangement is the one that looks like it. Without one,
            the arrangement is the one whose tiles go on across their borders.

    Returns:
        Rows and columns of tiles; ``None`` if two arrangements fit about as well.
    """
    count = len(tiles)
    ways = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    misfits = [_misfit(join_tiles(tiles, way), tiles.shape[1], thumbnail) for way in ways]
    order = np.argsort(misfits, kind="stable")
    if len(ways) > 1 and not misfits[order[0]] < _CLEARLY * misfits[order[1]]:
        return None
    return ways[order[0]]


def join_tiles(tiles: np.ndarray, grid: Grid) -> np.ndarray:
    """``(num_tiles, h, w, 3)`` tiles in reading order -> ``(rows * h, columns * w, 3)``.

    Args:
        tiles: The tiles.
        grid: (rows, columns) of tiles.
    """
    (rows, columns), (_, height, width, channels) = grid, tiles.shape
    rowwise = tiles.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return rowwise.reshape(rows * height, columns * width, channels)


def draw_grid(pixels: np.ndarray, cell: int, tile: Grid, scale: int = 1) -> Image.Image:
    """Puts lines between the pixels of different tokens, and thicker ones between those of different tiles.

    Args:
        pixels: ``(H, W, 3)`` uint8.
        cell: Side of the patches that become one token, in pixels.
        tile: Height and width of a tile, in pixels.
        scale: Each pixel becomes a square of this side.
    """
    line = 1 if max(pixels.shape) * scale < _THICKER_FROM else 2
    rows = _with_lines(pixels.shape[0], cell, tile[0], scale, line)
    columns = _with_lines(pixels.shape[1], cell, tile[1], scale, line)
    picture = pixels[rows.clip(0)][:, columns.clip(0)]
    for mark, colour in ((_TOKEN, TOKEN_LINE), (_TILE, TILE_LINE)):  # a tile's line is not cut by those of tokens
        picture[rows == mark] = colour
        picture[:, columns == mark] = colour
    return Image.fromarray(picture)


_TOKEN, _TILE = -1, -2


def _with_lines(length: int, cell: int, tile: int, scale: int, line: int) -> np.ndarray:
    """What each row (or column) of a picture shows: the number of a row of pixels, or a line."""
    shown: list[int] = []
    for start in range(0, length, cell):
        shown += [_TILE] * (3 * line) if start and start % tile == 0 else [_TOKEN] * line
        shown += np.repeat(np.arange(start, min(start + cell, length)), scale).tolist()
    return np.array([*shown, *[_TOKEN] * line])


def _put_together(tiles: Sequence[np.ndarray], grid: Grid, geometry: ImageGeometry) -> PreviewImage:
    numbers = {"patch_size": geometry.patch_size, "merge_size": geometry.merge_size}
    if len(tiles) == 1:
        return PreviewImage(tiles[0], (1, 1), grid, None, True, **numbers)
    thumbnail = tiles[-1] if geometry.use_thumbnail else None
    stacked = np.stack(tiles if thumbnail is None else tiles[:-1])
    found = arrange_tiles(stacked, thumbnail)
    way = found or (1, len(stacked))
    return PreviewImage(join_tiles(stacked, way), way, grid, thumbnail, found is not None, **numbers)


def _misfit(pixels: np.ndarray, side: int, thumbnail: np.ndarray | None) -> float:
    if thumbnail is not None:
        small = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        return float(np.abs(np.asarray(small, dtype=np.float32) - thumbnail).mean())
    values = pixels.astype(np.float32)
    below, right = values[side::side], values[:, side::side]
    steps = [np.abs(below - values[side - 1 : -1 : side]), np.abs(right - values[:, side - 1 : -1 : side])]
    return float(np.concatenate([step.ravel() for step in steps]).mean())


def pixels_to_uint8(pixels: Tensor, image_processor: Any) -> Tensor:
    """Pixels for people: normalised ones are put back into 0..255, as of `lightning_vlm.ops.pixels.normalize_patches`.

    Args:
        pixels: ``(..., 3, H, W)``, uint8 or normalised floats.
        image_processor: Holds the mean and standard deviation of normalised floats.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    mean, std = (torch.tensor(getattr(image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (pixels.float() * std + mean).mul(255).round().clamp(0, 255).byte()


def said_tokens(number: int) -> str:
    """A number of tokens in words, e.g. ``1,024 tokens``."""
    return "1 token" if number == 1 else f"{number:,} tokens"
