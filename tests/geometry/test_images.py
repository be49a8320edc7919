"""Geometry: the released models' own numbers, the rule restated naively, processor and model in agreement."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_vlm import NemotronVL, NemotronVLProcessor
from lightning_vlm.geometry.images import (
    Grid,
    ImageGeometry,
    dynamic_grid,
    fit_dynamic_grids,
    lay_out_images,
    num_tiles,
    tile_boxes,
    tile_ratio,
)
from lightning_vlm.models.projector import shuffle_images
from lightning_vlm.processing.tiny import tiny_processor

OMNI = ImageGeometry()
TILES = ImageGeometry(mode="static")

# From one pixel to 30,000 a side, as many small ones as large ones: extreme aspect ratios are common.
side = st.floats(0, math.log10(30_000)).map(lambda exponent: int(10**exponent))


def random_sizes(count: int, largest: int, seed: int = 0) -> list[tuple[int, int]]:
    """(height, width), log-uniform in 1..largest."""
    generator = random.Random(seed)
    draw = lambda: int(largest ** generator.random())  # noqa: E731
    return [(draw(), draw()) for _ in range(count)]


class TestDynamicMode:
    @pytest.mark.parametrize(
        ("width", "height", "tokens", "grid"),
        [
            (224, 224, 256, (32, 32)),
            (64, 32, 276, (24, 46)),
            (512, 512, 256, (32, 32)),
            (1000, 500, 512, (32, 64)),
            (1024, 1024, 1024, (64, 64)),
            (1536, 1536, 2304, (96, 96)),
            (1920, 1080, 2040, (68, 120)),
            (4000, 3000, 3300, (100, 132)),
        ],
        ids=lambda value: str(value),
    )
    def test_gives_the_released_models_numbers(self, width: int, height: int, tokens: int, grid: Grid) -> None:
        assert OMNI.image_grids(height, width) == [grid]
        assert OMNI.num_image_tokens(height, width) == tokens

    @pytest.mark.parametrize("text_tokens", [12, 14, 16])
    def test_three_full_hd_images_share_a_small_context(self, text_tokens: int) -> None:
        grids = fit_dynamic_grids([(1080, 1920)] * 3, OMNI, max_tokens=4096, text_tokens=text_tokens)
        assert [OMNI.num_tokens([grid]) for grid in grids] == [1344, 1344, 1344]

    def test_equals_a_naive_restatement_of_the_reference_rule(self) -> None:
        generator = random.Random(1)
        compared = 0
        for height, width in random_sizes(5000, largest=30_000):
            budget = generator.choice([13312, generator.randint(1025, 13312)])
            theirs = reference_grid(height, width, budget)
            if theirs is not None:
                assert dynamic_grid(height, width, budget, OMNI) == theirs, (height, width, budget)
                compared += 1
        assert compared > 4500  # the reference has no answer for a few extremes (measured: 4965 of 5000 compared)

    def test_reference_rule_has_an_answer_for_every_sane_image_at_the_released_budget(self) -> None:
        sane = [(h, w) for h, w in random_sizes(2000, largest=10_000, seed=2) if max(h / w, w / h) <= 64]
        assert len(sane) > 1000
        assert [OMNI.image_grids(h, w)[0] for h, w in sane] == [reference_grid(h, w, 13312) for h, w in sane]

    @settings(max_examples=300, deadline=None)
    @given(
        height=side,
        width=side,
        patch_size=st.sampled_from([8, 14, 16]),
        merge_size=st.sampled_from([1, 2, 3]),
        limits=st.tuples(st.integers(9, 3000), st.integers(9, 14_000)).map(sorted),
    )
    def test_every_grid_is_whole_tokens_within_the_budget(
        self, height: int, width: int, patch_size: int, merge_size: int, limits: list[int]
    ) -> None:
        geometry = ImageGeometry(
            patch_size=patch_size,
            merge_size=merge_size,
            min_num_patches=limits[0],
            max_num_patches=limits[1],
            tile_size=patch_size * merge_size,
        )
        ((rows, columns),) = geometry.image_grids(height, width)
        assert rows % merge_size == columns % merge_size == 0
        assert merge_size**2 <= rows * columns <= geometry.image_budget() <= limits[1]
        assert geometry.num_image_tokens(height, width) * merge_size**2 == rows * columns

    def test_released_limits_hold_for_every_size(self) -> None:
        for height, width in random_sizes(5000, largest=100_000, seed=3):
            tokens = OMNI.num_image_tokens(height, width)
            assert 1024 // 4 <= tokens <= 13312 // 4

    @pytest.mark.parametrize(
        "size", [(1, 1), (1, 100_000), (100_000, 1), (1, 13312 * 16), (15, 17), (10**6, 10**6)], ids=str
    )
    def test_extreme_sizes_get_a_grid(self, size: tuple[int, int]) -> None:
        ((rows, columns),) = OMNI.image_grids(*size)
        assert rows >= 2
        assert columns >= 2
        assert 1024 <= rows * columns <= 13312

    @pytest.mark.parametrize(
        ("max_model_len", "images", "text", "budget"),
        [
            (16384, 1, 0, 13312),  # the configured maximum is less than the context
            (2004, 1, 0, 8000),  # the context is less: (2004 - 4) * 4
            (2004, 1, 1000, 4000),
            (100, 1, 0, 1024),  # never below the minimum
            (100, 5, 0, 5120),
        ],
    )
    def test_budget_is_what_the_context_leaves(self, max_model_len: int, images: int, text: int, budget: int) -> None:
        assert ImageGeometry(max_model_len=max_model_len).image_budget(images, text) == budget

    @settings(max_examples=200, deadline=None)
    @given(
        sizes=st.lists(st.tuples(side, side), min_size=1, max_size=12),
        max_tokens=st.integers(10, 30_000),
        text_tokens=st.integers(0, 30_000),
    )
    def test_images_that_share_a_context_fit_it(
        self, sizes: list[tuple[int, int]], max_tokens: int, text_tokens: int
    ) -> None:
        grids = fit_dynamic_grids(sizes, OMNI, max_tokens, text_tokens)
        context = (max_tokens - text_tokens - 4) * 4
        assert len(grids) == len(sizes)
        # A context too small for every image's minimum gets the minimum: the caller's length check refuses
        # it.
        assert sum(rows * columns for rows, columns in grids) <= max(context, 1024 * len(sizes))
        assert all(rows % 2 == columns % 2 == 0 and rows * columns >= 4 for rows, columns in grids)

    def test_one_large_image_among_small_ones_gives_way_until_all_fit(self) -> None:
        # The small ones cannot shrink, so each round takes a little from the large one: more than ten are needed.
        sizes = [(2000, 4000)] + [(530, 512)] * 5
        grids = fit_dynamic_grids(sizes, OMNI, max_tokens=1559)
        assert OMNI.num_tokens(grids) <= 1559 - 4

    def test_context_smaller_than_one_token_per_image_gives_one_each(self) -> None:
        geometry = ImageGeometry(merge_size=3, tile_size=480, min_num_patches=1)
        assert fit_dynamic_grids([(500, 500)] * 3, geometry, max_tokens=1) == [(3, 3)] * 3

    def test_images_with_room_enough_are_not_scaled(self) -> None:
        sizes = [(224, 224), (1080, 1920)]
        grids = fit_dynamic_grids(sizes, OMNI, max_tokens=16384)
        assert grids == [OMNI.image_grids(*size)[0] for size in sizes]


class TestLayout:
    """Several images of one sample under one bound."""

    @settings(max_examples=150, deadline=None)
    @given(
        sizes=st.lists(st.tuples(side, side), min_size=1, max_size=6),
        max_patches=st.integers(-5, 40_000),
        geometry=st.sampled_from([OMNI, TILES, ImageGeometry(max_model_len=1500), ImageGeometry(min_num_patches=4)]),
    )
    def test_fits_the_bound_or_is_the_smallest(
        self, sizes: list[tuple[int, int]], max_patches: int, geometry: ImageGeometry
    ) -> None:
        own = lay_out_images(sizes, geometry)
        assert own.grids == tuple(tuple(geometry.image_grids(*size)) for size in sizes)
        assert own.num_tokens == [geometry.num_image_tokens(*size) for size in sizes]
        layout = lay_out_images(sizes, geometry, max_patches)
        assert layout.num_patches == sum(rows * columns for tiles in layout.grids for rows, columns in tiles)
        assert sum(layout.num_tokens) * geometry.merge_size**2 == layout.num_patches
        if own.num_patches <= max_patches:
            assert layout == own
            return
        if layout.num_patches > max_patches:
            per_image = [sum(rows * columns for rows, columns in tiles) for tiles in layout.grids]
            smallest = 1024 if geometry.mode == "static" else geometry.min_num_patches
            assert max(per_image) <= smallest
        assert layout.scaled is (layout.grids != own.grids)
        assert layout.num_patches <= own.num_patches
        if geometry.mode == "static":
            assert layout.grids == tuple(tuple(layout.geometry.image_grids(*size)) for size in sizes)

    def test_gives_the_grids_that_serving_gives_in_such_a_context(self) -> None:
        compared = 0
        for seed in range(600):
            sizes = random_sizes(1 + seed % 4, largest=10_000, seed=seed)
            max_tokens = 256 * len(sizes) + 4 * seed
            layout = lay_out_images(sizes, OMNI, 4 * max_tokens)
            served = fit_dynamic_grids(sizes, OMNI, max_tokens=max_tokens + 4)
            if layout.scaled:
                assert [tiles[0] for tiles in layout.grids] == served
                compared += 1
        assert compared > 100

    def test_of_equal_images_are_equal(self) -> None:
        layout = lay_out_images([(2000, 1000)] * 3, OMNI, 9000)
        assert len(set(layout.grids)) == 1
        assert 8500 < layout.num_patches <= 9000

    def test_no_image_grows_because_the_bound_is_generous(self) -> None:
        geometry = ImageGeometry(max_model_len=1500)  # (1500 - 4) * 4 = 5984 patches per image
        sizes = [(2000, 2000), (600, 800)]
        own = lay_out_images(sizes, geometry)
        for bound in range(own.num_patches - 1000, own.num_patches, 20):
            bounded = lay_out_images(sizes, geometry, bound)
            assert bounded.scaled
            assert all(mine <= before for mine, before in zip(bounded.num_tokens, own.num_tokens, strict=True))

    def test_tiles_are_as_many_as_fit_and_alike_for_all(self) -> None:
        sizes = [(1024, 1024), (512, 2048)]  # 4 + 1 and 4 + 1 tiles of 1024 patches
        layout = lay_out_images(sizes, TILES, 9 * 1024)
        assert layout.geometry.max_tiles == 3
        assert [len(tiles) for tiles in layout.grids] == [1, 4]

    def test_without_images_there_is_nothing_to_scale(self) -> None:
        assert lay_out_images([], OMNI, 0) == lay_out_images([], OMNI)


class TestStaticMode:
    @pytest.mark.parametrize(
        ("width", "height", "ratio", "tiles"),
        [
            (512, 512, (1, 1), 1),  # one tile needs no thumbnail
            (100, 100, (1, 1), 1),
            (1024, 512, (1, 2), 3),
            (512, 1024, (2, 1), 3),
            (1024, 1024, (2, 2), 5),
            (2048, 1536, (3, 4), 13),  # the most: 12 and the thumbnail
            (4000, 100, (1, 12), 13),
            (100, 4000, (12, 1), 13),
        ],
        ids=lambda value: str(value),
    )
    def test_tiles_cover_the_aspect_ratio(self, width: int, height: int, ratio: Grid, tiles: int) -> None:
        assert tile_ratio(height, width, TILES) == ratio
        assert num_tiles(height, width, TILES) == tiles
        assert TILES.image_grids(height, width) == [(32, 32)] * tiles
        assert TILES.num_image_tokens(height, width) == 256 * tiles

    def test_largest_image_has_3328_tokens(self) -> None:
        assert max(TILES.num_image_tokens(h, w) for h, w in random_sizes(2000, 10_000)) == 3328

    @pytest.mark.parametrize(
        ("side", "ratio"),
        # On equal aspect ratios more tiles win only above half of their area: 512 * sqrt(0.5 * 4) = 724.08,
        # 512 * sqrt(0.5 * 9) = 1086.1.
        [(724, (1, 1)), (725, (2, 2)), (1086, (2, 2)), (1087, (3, 3)), (9000, (3, 3))],
        ids=str,
    )
    def test_tie_goes_to_more_tiles_only_for_an_image_of_more_than_half_their_area(
        self, side: int, ratio: Grid
    ) -> None:
        assert tile_ratio(side, side, TILES) == ratio

    def test_thumbnail_can_be_left_out(self) -> None:
        geometry = ImageGeometry(mode="static", use_thumbnail=False)
        assert num_tiles(1024, 1024, geometry) == 4
        assert num_tiles(512, 512, geometry) == 1

    def test_equals_a_naive_restatement_of_the_reference_rule(self) -> None:
        for max_tiles in (1, 6, 12):
            geometry = ImageGeometry(mode="static", max_tiles=max_tiles)
            for height, width in random_sizes(1000, largest=10_000, seed=max_tiles):
                assert tile_ratio(height, width, geometry) == reference_tiles(height, width, max_tiles)

    def test_boxes_are_row_major_and_cover_each_pixel_once(self) -> None:
        boxes = tile_boxes(2, 3, tile_size=4)
        assert boxes[:4] == [(0, 0, 4, 4), (4, 0, 8, 4), (8, 0, 12, 4), (0, 4, 4, 8)]
        canvas = torch.zeros(8, 12, dtype=torch.int64)
        for left, top, right, bottom in boxes:
            canvas[top:bottom, left:right] += 1
        assert (canvas == 1).all()


class TestWrongNumbers:
    @pytest.mark.parametrize(
        ("options", "numbers"),
        [
            ({"mode": "tiles"}, ["'tiles'", "'dynamic' or 'static'"]),
            ({"patch_size": 0}, ["patch_size (0)"]),
            ({"merge_size": 0}, ["merge_size (0)"]),
            ({"max_num_patches": 3, "min_num_patches": 1}, ["max_num_patches (3)", "4"]),
            ({"max_num_patches": 512}, ["min_num_patches (1024)", "max_num_patches (512)"]),
            ({"max_tiles": 0}, ["max_tiles is 0"]),
            ({"tile_size": 500}, ["tile_size (500)", "16 * 2"]),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_are_refused_with_the_numbers(self, options: dict, numbers: list[str]) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is checked below
            ImageGeometry(**options)
        assert all(number in str(caught.value) for number in numbers)

    @pytest.mark.parametrize("geometry", [OMNI, TILES], ids=["dynamic", "static"])
    def test_image_without_pixels_is_refused(self, geometry: ImageGeometry) -> None:
        with pytest.raises(ValueError, match="0 x 5 pixels"):
            geometry.image_grids(0, 5)


class TestThreeAgree:
    """A size's number of tokens by geometry, by the processor's placeholders, by rows of image features."""

    @pytest.mark.parametrize(
        "options",
        [
            {"max_num_patches": 64},
            {"mode": "static", "tile_size": 16, "max_tiles": 6},
            {"mode": "static", "tile_size": 16, "max_tiles": 4, "use_thumbnail": False},
            {"max_num_patches": 64, "downsample_ratio": 0.25, "min_num_patches": 16},
        ],
        ids=["dynamic", "static", "static without thumbnail", "dynamic merging 4 x 4"],
    )
    def test_on_thousands_of_sizes(self, options: dict) -> None:
        processor = tiny_processor(**{"tile_size": 32, **options})
        geometry = processor.geometry
        for height, width in random_sizes(2500, largest=300, seed=4):
            expected = geometry.num_image_tokens(height, width)
            encoded = processor(text="<image>", images=Image.new("RGB", (width, height)))
            assert encoded["input_ids"][0].count(processor.image_token_id) == expected

            grids = geometry.image_grids(height, width)
            assert encoded["image_grid_hw"].tolist() == [list(grid) for grid in grids]
            assert encoded["pixel_values"].shape[0] == sum(rows * columns for rows, columns in grids)
            features = torch.empty(encoded["pixel_values"].shape[0], 1)
            assert shuffle_images(features, grids, geometry.merge_size, "v2").shape[0] == expected

    def test_at_the_released_sizes(self) -> None:
        for geometry in (OMNI, TILES):
            for height, width in random_sizes(1500, largest=8000, seed=5):
                grids = geometry.image_grids(height, width)
                features = torch.empty(sum(rows * columns for rows, columns in grids), 1)
                rows = shuffle_images(features, grids, geometry.merge_size, "v2").shape[0]
                assert rows == geometry.num_image_tokens(height, width)

    @pytest.mark.parametrize(
        "options",
        [{"max_num_patches": 64}, {"mode": "static", "tile_size": 16, "max_tiles": 6}],
        ids=["dynamic", "static"],
    )
    def test_in_a_real_model(self, make_model: Callable[..., NemotronVL], options: dict) -> None:
        processor, model = tiny_processor(**options), make_model()
        images = [Image.new("RGB", (width, height)) for height, width in random_sizes(30, largest=200, seed=6)]
        encoded = processor(text="<image>" * len(images), images=images, return_tensors="pt")
        with torch.no_grad():
            features, per_grid = model.get_image_features(encoded["pixel_values"], encoded["image_grid_hw"])
        expected = [processor.geometry.num_image_tokens(image.height, image.width) for image in images]
        assert features.shape[0] == sum(per_grid) == sum(expected)
        assert placeholder_runs(encoded["input_ids"][0].tolist(), processor) == expected


def placeholder_runs(input_ids: list[int], processor: NemotronVLProcessor) -> list[int]:
    """Lengths of the runs of image placeholders."""
    runs = itertools.groupby(input_ids, key=lambda token: token == processor.image_token_id)
    return [len(list(run)) for is_image, run in runs if is_image]


def reference_grid(height: int, width: int, budget: int, minimum: int = 1024) -> Grid | None:
    """The dynamic rule in the spec's order of words; None where it divides by zero or leaves the budget."""
    grid = [round(side / 16 + 0.5) for side in (height, width)]
    factor = min(math.sqrt(budget / (grid[0] * grid[1])), 1)
    grid = [int(factor * side) for side in grid]
    if 0 in grid:
        return None
    if budget > minimum and grid[0] * grid[1] < minimum:
        factor = math.sqrt(minimum / (grid[0] * grid[1]))
        grid = [math.ceil(factor * side) for side in grid]
    for this, other in ((0, 1), (1, 0)):
        if grid[this] % 2:
            fits = (grid[this] + 1) * grid[other] <= budget
            grid[this] += 1 if fits else -1
    return (grid[0], grid[1]) if 0 not in grid and grid[0] * grid[1] <= budget else None


def reference_tiles(height: int, width: int, max_tiles: int) -> Grid:
    """The static rule in the order of the spec's words: (rows, columns) of 512-pixel tiles."""
    pairs = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    pairs.sort(key=lambda pair: pair[0] * pair[1])
    difference = {(i, j): abs(width / height - i / j) for i, j in pairs}
    best, *later = [pair for pair in pairs if difference[pair] == min(difference.values())]
    for i, j in later:
        if width * height > 0.5 * 512**2 * i * j:
            best = (i, j)
    return best[1], best[0]


class TestTheMost:
    """What memory is planned for; vLLM's profiling asks the same three questions."""

    @given(
        mode=st.sampled_from(["dynamic", "static"]),
        max_tiles=st.integers(1, 12),
        use_thumbnail=st.booleans(),
        max_model_len=st.integers(64, 4096),
        sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    )
    @settings(deadline=None, max_examples=200)
    def test_no_image_has_more_tokens(self, mode, max_tiles, use_thumbnail, max_model_len, sizes):
        geometry = ImageGeometry(
            mode, max_tiles=max_tiles, use_thumbnail=use_thumbnail, max_model_len=max_model_len, min_num_patches=16
        )
        assert max(geometry.num_image_tokens(*size) for size in sizes) <= geometry.max_image_tokens

    @pytest.mark.parametrize(
        ("max_tiles", "thumbnail", "tokens"), [(12, True, 3328), (12, False, 3072), (1, True, 256)]
    )
    def test_static_tiles_reach_it(self, max_tiles, thumbnail, tokens):
        geometry = ImageGeometry("static", max_tiles=max_tiles, use_thumbnail=thumbnail)
        assert geometry.max_image_tokens == tokens
        height, width = geometry.size_with_most_tokens
        assert geometry.num_image_tokens(height, width) == tokens
        assert height * width == max_tiles * 512**2

    def test_a_square_comes_near_it(self):
        geometry = ImageGeometry()
        assert geometry.max_image_tokens == 13312 // 4
        # 57 tokens per side: the largest square of at most 3,328 tokens (vLLM's rule, rounded down to whole tokens).
        assert geometry.size_with_most_tokens == (57 * 32, 57 * 32)
        assert geometry.num_image_tokens(57 * 32, 57 * 32) == 57**2

    def test_vllms_own_example(self):
        # Its docstring: 8,192 tokens asked for are 2,880 x 2,880 pixels, which are 8,100 tokens.
        geometry = ImageGeometry(min_num_patches=4, max_num_patches=16384 * 4)
        assert geometry.size_for_tokens(8192) == (2880, 2880)
        assert (2880 // 16) ** 2 // 4 == 8100

    def test_nothing_is_no_size(self):
        with pytest.raises(ValueError, match="an image of 0 tokens was asked for"):
            ImageGeometry().size_for_tokens(0)
