"""Image size -> patch grid -> number of tokens: the one answer to "how long is this image?".

Integer maths only, no tensors and no pixels, so a plan can be made from image headers alone. The processor
resizes to exactly these grids and the model returns exactly these many rows; tests hold the three together.

Two modes, as in the released models: ``dynamic`` (Nemotron-3-Nano-Omni: one grid near the image's own size)
and ``static`` (Nemotron-Nano-12B-v2-VL: InternVL tiles of one size plus a thumbnail).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Grid = tuple[int, int]
"""A patch grid: (height, width) in patches."""

Box = tuple[int, int, int, int]
"""A pixel box (left, top, right, bottom)."""


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """How images become grids of patches.

    Attributes:
        mode: ``dynamic`` or ``static``.
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per side that pixel shuffle merges into one token (1 / downsample_ratio).
        min_num_patches: Dynamic mode: smaller images are enlarged to about this many patches.
        max_num_patches: Dynamic mode: no image gets more patches.
        max_model_len: Dynamic mode: context length in tokens, which also bounds the patches of one image.
        tile_size: Static mode: side of a tile, in pixels.
        max_tiles: Static mode: most tiles of one image, the thumbnail not counted.
        use_thumbnail: Static mode: append a whole-image tile when there is more than one tile.
    """

    mode: Literal["dynamic", "static"] = "dynamic"
    patch_size: int = 16
    merge_size: int = 2
    min_num_patches: int = 1024
    max_num_patches: int = 13312
    max_model_len: int = 16384
    tile_size: int = 512
    max_tiles: int = 12
    use_thumbnail: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("dynamic", "static"):
            raise ValueError(f"geometry mode is {self.mode!r}; expected 'dynamic' or 'static'")
        if self.merge_size < 1 or self.patch_size < 1:
            raise ValueError(f"patch_size ({self.patch_size}) and merge_size ({self.merge_size}) must be at least 1")
        if self.max_num_patches < self.merge_size**2:
            raise ValueError(f"max_num_patches ({self.max_num_patches}) is less than one token's {self.merge_size**2}")
        if self.min_num_patches > self.max_num_patches:
            raise ValueError(
                f"min_num_patches ({self.min_num_patches}) is more than max_num_patches ({self.max_num_patches})"
            )
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles is {self.max_tiles}; expected at least 1")
        if self.tile_size % (self.patch_size * self.merge_size):
            raise ValueError(
                f"tile_size ({self.tile_size}) is not a multiple of patch_size * merge_size "
                f"({self.patch_size} * {self.merge_size})"
            )

    def image_grids(self, height: int, width: int) -> list[Grid]:
        """The grids of one image: one in dynamic mode, one per tile (thumbnail last) in static mode.

        Args:
            height: Image height, in pixels.
            width: Image width, in pixels.
        """
        _require_pixels(height, width)
        if self.mode == "dynamic":
            return [dynamic_grid(height, width, self.image_budget(), self)]
        side = self.tile_size // self.patch_size
        return [(side, side)] * num_tiles(height, width, self)

    @property
    def max_image_tokens(self) -> int:
        """Most language-model tokens that one image can become."""
        if self.mode == "dynamic":
            return self.image_budget() // self.merge_size**2
        tiles = self.max_tiles + (self.use_thumbnail and self.max_tiles > 1)
        return tiles * (self.tile_size // self.patch_size // self.merge_size) ** 2

    @property
    def size_with_most_tokens(self) -> tuple[int, int]:
        """The smallest (height, width) in pixels of an image that becomes the most tokens: what memory is planned for.

        In dynamic mode a square of nearly as many tokens as there may be, see `size_for_tokens`.
        """
        if self.mode == "dynamic":
            return self.size_for_tokens(self.max_image_tokens)
        rows, columns = max(_tile_ratios(self.max_tiles), key=lambda ratio: (ratio[0] * ratio[1], -max(ratio)))
        return rows * self.tile_size, columns * self.tile_size

    def size_for_tokens(self, num_tokens: int) -> tuple[int, int]:
        """(height, width) in pixels of a square that becomes nearly so many tokens, never more.

        Source: vLLM's nano_nemotron_vl, whose memory profiling uses it. Dynamic mode only enlarges what is below
        ``min_num_patches``.

        Args:
            num_tokens: Tokens wanted.

        Raises:
            ValueError: If it is less than one.
        """
        if num_tokens < 1:
            raise ValueError(f"an image of {num_tokens} tokens was asked for; expected at least 1")
        side = math.isqrt(num_tokens) * self.merge_size * self.patch_size
        return side, side

    def image_budget(self, num_images: int = 1, text_tokens: int = 0) -> int:
        """Patches that one image may have: what the context leaves, clamped to the configured range."""
        available = self.context_patches(num_images, text_tokens)
        return max(min(available, self.max_num_patches), self.min_num_patches)

    def context_patches(self, num_images: int, text_tokens: int) -> int:
        """Patches of all images together that the context has room for beside a text.

        Never less than ``min_num_patches`` each: then the sample is longer than the context. Source: vLLM's
        nano_nemotron_vl, its reserve of four tokens included.

        Args:
            num_images: Number of images.
            text_tokens: Tokens of everything else.
        """
        room = (self.max_model_len - text_tokens - 4) * self.merge_size**2
        return max(room, self.min_num_patches * num_images)

    def num_tokens(self, grids: Sequence[Grid]) -> int:
        """Language-model tokens of the given grids, image start and end markers not counted."""
        return sum(height * width // self.merge_size**2 for height, width in grids)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Language-model tokens of one image of ``height`` x ``width`` pixels."""
        return self.num_tokens(self.image_grids(height, width))


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What the images of one sample become.

    Attributes:
        geometry: The numbers that the grids follow from; in static mode with fewer ``max_tiles`` where ``scaled``.
        grids: Per image, the grids of its tiles (one in dynamic mode).
        scaled: Whether any image was made smaller than the geometry alone makes it.
    """

    geometry: ImageGeometry
    grids: tuple[tuple[Grid, ...], ...]
    scaled: bool = False

    @property
    def num_tokens(self) -> list[int]:
        """Language-model tokens per image, start and end markers not counted."""
        return [self.geometry.num_tokens(tiles) for tiles in self.grids]

    @property
    def num_patches(self) -> int:
        """Vision patches of all images."""
        return sum(rows * columns for tiles in self.grids for rows, columns in tiles)


def lay_out_images(
    sizes: Sequence[tuple[int, int]], geometry: ImageGeometry, max_patches: int | None = None
) -> ImageLayout:
    """Grids of the images of one sample, smaller than their own only where together they exceed ``max_patches``.

    A bound in tokens is a bound in patches, because every grid is whole tokens. Dynamic mode scales as
    `fit_dynamic_grids` does, so that it is what serving does in a context of that size; static mode gives all images
    fewer tiles. Where even the smallest grids exceed the bound they are returned all the same: whether that is an
    error is the caller's to say.

    Args:
        sizes: (height, width) in pixels per image.
        geometry: The numbers.
        max_patches: Most patches of all images together; unbounded when ``None``.
    """
    own = ImageLayout(geometry, tuple(tuple(geometry.image_grids(height, width)) for height, width in sizes))
    if max_patches is None or own.num_patches <= max_patches:
        return own
    if geometry.mode == "dynamic":
        budget = max(min(max_patches, geometry.image_budget()), geometry.min_num_patches)
        shared = tuple((grid,) for grid in _share_patches(sizes, geometry, budget, max_patches))
        return ImageLayout(geometry, shared, shared != own.grids)
    layout = own
    for max_tiles in range(geometry.max_tiles - 1, 0, -1):  # not bisected: fewer allowed tiles can mean more used
        smaller = replace(geometry, max_tiles=max_tiles)
        grids = tuple(tuple(smaller.image_grids(height, width)) for height, width in sizes)
        layout = ImageLayout(smaller, grids, grids != own.grids)
        if layout.num_patches <= max_patches:
            break
    return layout


def dynamic_grid(height: int, width: int, budget: int, geometry: ImageGeometry) -> Grid:
    """The grid that an image is resized to in dynamic mode.

    Close to the image's own grid, scaled into ``[min_num_patches, budget]``, both sides multiples of
    ``merge_size``. Source: Nemotron-3-Nano-Omni's image processor as shipped by transformers and vLLM;
    ``round(x + 0.5)`` keeps their half-to-even rounding, which is part of the contract (64 x 32 pixels must
    give 276 tokens).

    Args:
        height: Image height, in pixels.
        width: Image width, in pixels.
        budget: Most patches of this image.
        geometry: The other numbers.
    """
    merge, minimum = geometry.merge_size, geometry.min_num_patches
    rows = round(height / geometry.patch_size + 0.5)
    columns = round(width / geometry.patch_size + 0.5)

    scale = min(math.sqrt(budget / (rows * columns)), 1.0)
    rows, columns = math.floor(scale * rows), math.floor(scale * columns)
    # The reference has no guard here: an extreme aspect ratio floors one side to zero, then divides by it.
    rows, columns = max(rows, 1), max(columns, 1)

    if budget > minimum and rows * columns < minimum:
        scale = math.sqrt(minimum / (rows * columns))
        rows, columns = math.ceil(scale * rows), math.ceil(scale * columns)

    rows = _to_multiple(rows, merge, fits=lambda side: side * columns <= budget)
    columns = _to_multiple(columns, merge, fits=lambda side: rows * side <= budget)
    if rows * columns > budget:  # a side was held above, or the budget is hardly more than the minimum
        if columns >= rows:
            columns = max(merge, budget // rows // merge * merge)
        else:
            rows = max(merge, budget // columns // merge * merge)
    return rows, columns


def fit_dynamic_grids(
    sizes: Sequence[tuple[int, int]], geometry: ImageGeometry, max_tokens: int, text_tokens: int = 0
) -> list[Grid]:
    """Grids of several images that share one context of ``max_tokens`` tokens.

    The images are scaled down together, in proportion, until their sum fits or each is at the minimum.
    Source: vLLM's nano_nemotron_vl, which gives up after ten rounds; transformers does not scale across images.

    Args:
        sizes: (height, width) in pixels per image.
        geometry: The numbers; its ``max_model_len`` is replaced by ``max_tokens``.
        max_tokens: Context length in tokens.
        text_tokens: Tokens of the context that are taken by text.
    """
    geometry = replace(geometry, max_model_len=max_tokens)
    budget = geometry.image_budget(len(sizes), text_tokens)
    return _share_patches(sizes, geometry, budget, geometry.context_patches(len(sizes), text_tokens))


def _share_patches(
    sizes: Sequence[tuple[int, int]], geometry: ImageGeometry, budget: int, available: int
) -> list[Grid]:
    """Scales images down from ``budget`` patches each until together they fit ``available`` or none can shrink."""
    minimum, budgets = geometry.min_num_patches, [budget] * len(sizes)
    while True:
        grids = [dynamic_grid(h, w, budget, geometry) for (h, w), budget in zip(sizes, budgets)]
        patches = [rows * columns for rows, columns in grids]
        scaled = [max(minimum, int(count * available / sum(patches))) for count in patches]
        smaller = [min(budget, count) for budget, count in zip(budgets, scaled)]
        if sum(patches) <= available or smaller == budgets:
            return grids
        budgets = smaller


def tile_ratio(height: int, width: int, geometry: ImageGeometry) -> Grid:
    """Static mode: how many tiles (rows, columns) cover the image best.

    The aspect ratio closest to the image's wins; on a tie the later (larger) one only if the image has more
    than half of its area. Source: InternVL's preprocessing, as used by Nemotron-Nano-12B-v2-VL.

    Args:
        height: Image height, in pixels.
        width: Image width, in pixels.
        geometry: Gives ``tile_size`` and ``max_tiles``.
    """
    best, best_difference = (1, 1), math.inf
    for columns, rows in _tile_ratios(geometry.max_tiles):
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best, best_difference = (rows, columns), difference
        elif difference == best_difference and width * height > 0.5 * geometry.tile_size**2 * rows * columns:
            best = (rows, columns)
    return best


def num_tiles(height: int, width: int, geometry: ImageGeometry) -> int:
    """Static mode: number of tiles of an image, the thumbnail included."""
    rows, columns = tile_ratio(height, width, geometry)
    count = rows * columns
    return count + 1 if geometry.use_thumbnail and count > 1 else count


def tile_boxes(rows: int, columns: int, tile_size: int) -> list[Box]:
    """Static mode: crop boxes, row-major, in an image that was resized to ``rows`` x ``columns`` tiles."""
    return [
        (column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size)
        for row in range(rows)
        for column in range(columns)
    ]


def _tile_ratios(max_tiles: int) -> list[tuple[int, int]]:
    """All (columns, rows) of up to so many tiles, fewer tiles first."""
    sides = range(1, max_tiles + 1)
    ratios = [(i, j) for i in sides for j in sides if i * j <= max_tiles]
    return sorted(ratios, key=lambda ratio: (ratio[0] * ratio[1], ratio))


def _to_multiple(side: int, merge: int, fits: Callable[[int], bool]) -> int:
    remainder = side % merge
    if not remainder:
        return side
    up = side + merge - remainder
    return up if fits(up) else max(merge, side - remainder)


def _require_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels (height x width) has no pixels")
