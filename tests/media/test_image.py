"""Images as patches: layout, tiles, and what the uint8 path loses against the float path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lightning_vlm.geometry.images import ImageGeometry
from lightning_vlm.media.image import image_to_patches, patches_to_pixels, pixels_to_patches, to_rgb

DYNAMIC = ImageGeometry(patch_size=8, min_num_patches=4, max_num_patches=256)
STATIC = ImageGeometry(mode="static", patch_size=8, tile_size=32, max_tiles=6)
SIZES = [(37, 53), (100, 200), (8, 8), (300, 40), (500, 700), (1, 77), (16, 31)]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def edges(height: int, width: int) -> Image.Image:
    """Four black and white quarters: where a bicubic filter overshoots."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[:, width // 2 :] = 255
    array[height // 2 :] ^= 255
    return Image.fromarray(array)


def smooth(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [
        127 + 120 * np.sin(columns / 9),
        127 + 120 * np.cos(rows / 7),
        (rows + columns) * 255 / (height + width),
    ]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> Tensor:
    """``(3, H, W)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TestPatches:
    @settings(max_examples=50, deadline=None)
    @given(rows=st.integers(1, 5), columns=st.integers(1, 5), size=st.integers(1, 6), floats=st.booleans())
    def test_survive_the_round_trip(self, rows: int, columns: int, size: int, floats: bool) -> None:
        original = torch.randint(0, 256, (3, rows * size, columns * size), dtype=torch.uint8)
        original = original.float() if floats else original
        patches = pixels_to_patches(original, size)
        assert patches.shape == (rows * columns, 3 * size * size)
        assert patches.dtype == original.dtype
        assert torch.equal(patches_to_pixels(patches, (rows, columns), size), original)

    def test_are_row_major_and_channel_major_inside(self) -> None:
        height, width, size = 4, 6, 2
        original = torch.arange(3 * height * width).reshape(3, height, width)
        patches = pixels_to_patches(original, size)
        for number, patch in enumerate(patches):
            top, left = number // (width // size) * size, number % (width // size) * size
            naive = [
                int(original[channel, top + y, left + x])
                for channel in range(3)
                for y in range(size)
                for x in range(size)
            ]
            assert patch.tolist() == naive

    def test_of_a_grid_that_is_asked_for(self) -> None:
        patches, grids = image_to_patches(noise(50, 70), DYNAMIC, grid=(2, 6))
        assert grids == [(2, 6)]
        assert patches.shape == (12, 192)


class TestResizing:
    @pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
    @pytest.mark.parametrize("size", [(32, 32), (64, 48), (16, 128)], ids=str)
    def test_is_left_out_when_the_size_already_matches(self, size: tuple[int, int], as_float: bool) -> None:
        image = noise(*size)
        grid = (size[0] // 8, size[1] // 8)
        patches, grids = image_to_patches(image, DYNAMIC, grid, as_float)
        assert grids == [grid]
        assert torch.equal(patches, pixels_to_patches(pixels(image), 8).to(patches.dtype))

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("make", [noise, edges, smooth], ids=lambda function: function.__name__)
    def test_in_float_is_an_antialiased_bicubic_filter_without_clamping(self, make: Any, size: tuple[int, int]) -> None:
        image = make(*size)
        patches, [(rows, columns)] = image_to_patches(image, DYNAMIC, as_float=True)
        ours = patches_to_pixels(patches, (rows, columns), 8)
        target = (columns * 8, rows * 8)
        # Independent of torch: Pillow's float mode, channel by channel, which does not clamp either.
        channels = [Image.fromarray(np.asarray(image)[..., c].astype(np.float32)) for c in range(3)]
        theirs = np.stack([np.asarray(c.resize(target, Image.Resampling.BICUBIC)) for c in channels])
        # Measured worst case: 5.8e-3 of 255 (noise, 500 x 700 scaled down), elsewhere at most 7e-4.
        assert (ours - torch.from_numpy(theirs)).abs().max() < 1e-2

    @pytest.mark.parametrize(
        ("make", "clamped", "overshoot"),
        [
            # Measured worst cases over SIZES, of 255: float clamped to 0..255 minus uint8; float as it is
            # minus uint8. uint8 clamps twice, after the rows and after the columns, so even the clamped
            # difference is not rounding alone where neighbours jump between black and white. Mean difference:
            # 0.27, 0.27, 0.43.
            (smooth, 1.5, 4.0),  # 0.99, 2.64
            (edges, 15.0, 50.0),  # 10.8, 39.3
            (noise, 30.0, 35.0),  # 22.1, 26.8
        ],
        ids=["smooth", "edges", "noise"],
    )
    def test_in_uint8_loses_only_the_overshoot(self, make: Any, clamped: float, overshoot: float) -> None:
        worst_clamped = worst_overshoot = worst_mean = 0.0
        for size in SIZES:
            in_uint8, grids = image_to_patches(make(*size), DYNAMIC)
            in_float, float_grids = image_to_patches(make(*size), DYNAMIC, as_float=True)
            assert grids == float_grids
            assert in_uint8.dtype == torch.uint8
            assert in_float.dtype == torch.float32
            difference = (in_float.clamp(0, 255) - in_uint8.float()).abs()
            worst_clamped = max(worst_clamped, float(difference.max()))
            worst_mean = max(worst_mean, float(difference.mean()))
            worst_overshoot = max(worst_overshoot, float((in_float - in_uint8.float()).abs().max()))
        assert worst_clamped < clamped
        assert worst_mean < 0.6
        assert worst_clamped < worst_overshoot < overshoot

    def test_leaves_the_image_alone(self) -> None:
        image = noise(37, 53)
        before = image.tobytes()
        for as_float in (False, True):
            patches, _ = image_to_patches(image, DYNAMIC, as_float=as_float)
            patches.zero_()
        same, _ = image_to_patches(noise(32, 32), DYNAMIC)
        same.zero_()
        assert image.tobytes() == before


class TestTiles:
    @pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
    def test_come_row_by_row_with_the_thumbnail_last(self, as_float: bool) -> None:
        image = noise(64, 96)  # 2 x 3 tiles of 32 pixels, no resizing
        patches, grids = image_to_patches(image, STATIC, as_float=as_float)
        assert grids == [(4, 4)] * 7
        tiles = [patches_to_pixels(tile, (4, 4), 8) for tile in patches.split(16)]
        original = pixels(image).to(patches.dtype)
        for number, tile in enumerate(tiles[:6]):
            top, left = number // 3 * 32, number % 3 * 32
            assert torch.equal(tile, original[:, top : top + 32, left : left + 32]), number
        thumbnail, _ = image_to_patches(image, DYNAMIC, grid=(4, 4), as_float=as_float)
        assert torch.equal(tiles[6], patches_to_pixels(thumbnail, (4, 4), 8))

    def test_of_a_small_image_are_one_without_thumbnail(self) -> None:
        patches, grids = image_to_patches(noise(20, 20), STATIC)
        assert grids == [(4, 4)]
        assert patches.shape == (16, 192)

    def test_without_thumbnail_are_the_same_tiles(self) -> None:
        image = noise(50, 90)
        without = ImageGeometry(mode="static", patch_size=8, tile_size=32, max_tiles=6, use_thumbnail=False)
        patches, grids = image_to_patches(image, without)
        with_thumbnail, _ = image_to_patches(image, STATIC)
        assert len(grids) == 2
        assert torch.equal(patches, with_thumbnail[: len(patches)])


class TestToRgb:
    array = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)

    @pytest.mark.parametrize(
        "image",
        [
            Image.fromarray(array),
            array,
            array.astype(np.int64),
            array.astype(np.float32),
            np.moveaxis(array, -1, 0),
            torch.from_numpy(array),
            torch.from_numpy(array).permute(2, 0, 1),
            torch.from_numpy(array).permute(2, 0, 1).float(),
            torch.from_numpy(array).to(torch.bfloat16).requires_grad_(),
            np.concatenate([array, np.full((6, 10, 1), 255, dtype=np.uint8)], axis=-1),
        ],
        ids=["PIL", "HWC", "int64", "float", "CHW", "tensor HWC", "tensor CHW", "float tensor", "bf16", "opaque"],
    )
    def test_takes_what_people_have(self, image: Any) -> None:
        expected = self.array
        if isinstance(image, torch.Tensor) and image.dtype == torch.bfloat16:
            expected = torch.from_numpy(self.array).to(torch.bfloat16).to(torch.uint8).numpy()  # 8 bits of precision
        assert np.array_equal(np.asarray(to_rgb(image)), expected)

    @pytest.mark.parametrize("shape", [(6, 10), (6, 10, 1), (1, 6, 10)], ids=str)
    def test_grey_is_repeated(self, shape: tuple[int, ...]) -> None:
        grey = self.array[..., 0].reshape(shape)
        assert np.array_equal(np.asarray(to_rgb(grey)), self.array[..., :1].repeat(3, axis=-1))

    @pytest.mark.parametrize("value", [-1.0, 256.0, 0.5, 1.0, float("nan"), float("inf")])
    def test_values_outside_0_to_255_or_only_up_to_1_are_refused(self, value: float) -> None:
        bad = np.full((6, 10, 3), value)
        with pytest.raises(ValueError, match=r"float64 spans .* expected pixels in 0\.\.255"):
            to_rgb(bad)
        partly = np.full((6, 10, 3), 0.0)
        partly[0, 0, 0] = value
        with pytest.raises(ValueError, match=r"expected pixels in 0\.\.255"):
            to_rgb(partly)

    def test_all_black_floats_are_an_image(self) -> None:
        assert to_rgb(np.zeros((6, 10, 3))).getextrema() == ((0, 0),) * 3

    @pytest.mark.parametrize("shape", [(6,), (6, 10, 2), (4, 6, 10), (2, 6, 10, 3)], ids=str)
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"expected \(H, W\), \(H, W, 3\) or \(3, H, W\)"):
            to_rgb(np.zeros(shape, dtype=np.uint8))

    def test_rgb_image_is_passed_on_as_it_is(self) -> None:
        image = Image.fromarray(self.array)
        assert to_rgb(image) is image


def on_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """The formula, in whole numbers: rounded half up."""
    mixed = colours.astype(np.int64) * opacity + 255 * (255 - opacity.astype(np.int64))
    return ((2 * mixed + 255) // 510).astype(np.uint8)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
DEEP = ["I", "F", "I;16", "I;16L", "I;16B", "I;16N"]


class TestTransparency:
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    opacity = generator.integers(0, 256, (6, 10, 1), dtype=np.uint8)

    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
    def test_shows_white_by_the_formula(self, red: int, green: int, blue: int, opacity: int) -> None:
        expected = on_white(np.array([red, green, blue]), np.array(opacity)).tolist()
        pixel = np.array([[[red, green, blue, opacity]]], dtype=np.uint8)
        for image in (pixel, torch.from_numpy(pixel), Image.fromarray(pixel)):
            assert list(to_rgb(image).getpixel((0, 0))) == expected

    def test_of_every_opacity_and_grey(self) -> None:
        grey, opacity = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opacity)])
        assert np.array_equal(np.asarray(to_rgb(image))[..., 1], on_white(grey, opacity))

    def test_hides_the_colour_that_is_stored_under_it(self) -> None:
        """The case that this is for: black text on a transparent page."""
        page = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        page.paste((0, 0, 0, 255), (2, 2, 4, 4))
        shown = np.asarray(to_rgb(page))
        assert shown[3, 3].tolist() == [0, 0, 0]
        assert shown[6, 6].tolist() == [255, 255, 255]
        assert not np.asarray(page.convert("RGB")).any(), "what Pillow alone would show: all black"

    @pytest.mark.parametrize("way", ["bytes", "index", "palette with opacity", "PA"])
    def test_of_a_palette(self, way: str) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.putdata([0, 1, 2])
        expected = [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
        if way == "bytes":  # an opacity per colour, as PNG stores them
            image.info["transparency"] = bytes([255, 0, 128])
            expected[2] = (127, 127, 255)
        elif way == "index":
            image.info["transparency"] = 1
        elif way == "palette with opacity":
            image.putpalette([255, 0, 0, 255, 0, 255, 0, 0, 0, 0, 255, 255], "RGBA")
        else:
            image = image.convert("PA")
            image.putalpha(Image.frombytes("L", (3, 1), bytes([255, 0, 255])))
        assert [to_rgb(image).getpixel((x, 0)) for x in range(3)] == expected

    @pytest.mark.parametrize(
        ("mode", "key", "values", "expected"),
        [
            ("1", 0, [0, 255], [(255, 255, 255), (255, 255, 255)]),
            ("L", 7, [7, 8], [(255, 255, 255), (8, 8, 8)]),
            ("RGB", (1, 2, 3), [(1, 2, 3), (1, 2, 4)], [(255, 255, 255), (1, 2, 4)]),
            ("RGB", (257, 514, 771), [(1, 2, 3), (1, 2, 4)], [(255, 255, 255), (1, 2, 4)]),
        ],
        ids=["1", "L", "RGB", "RGB of a 16-bit file"],
    )
    def test_of_one_colour(self, mode: str, key: Any, values: list[Any], expected: list[Any]) -> None:
        image = Image.new(mode, (2, 1))
        image.putdata(values)
        image.info["transparency"] = key
        assert [to_rgb(image).getpixel((x, 0)) for x in range(2)] == expected
        assert image.info["transparency"] == key

    def test_of_one_16_bit_grey(self) -> None:
        image = Image.fromarray(np.array([[1000, 1001, 65535]], dtype=np.uint16))
        image.info["transparency"] = 1000
        assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [255, 4, 255]

    @pytest.mark.parametrize(("mode", "straight"), [("La", "LA"), ("RGBa", "RGBA")])
    def test_multiplied_in_is_the_same_picture(self, mode: str, straight: str) -> None:
        rgba = Image.fromarray(np.concatenate([self.colours, self.opacity], axis=-1)).convert(straight)
        multiplied = rgba.convert(mode)
        difference = np.asarray(to_rgb(multiplied)).astype(int) - np.asarray(to_rgb(rgba))
        assert np.abs(difference).max() <= 2  # what storing colour * opacity in 8 bits costs


class TestEveryMode:
    @settings(max_examples=150, deadline=None)
    @given(mode=st.sampled_from([*MODES, *DEEP]), width=st.integers(1, 9), height=st.integers(1, 9), data=st.data())
    def test_becomes_rgb_of_the_same_size_and_is_left_alone(
        self, mode: str, width: int, height: int, data: st.DataObject
    ) -> None:
        size = len(Image.new(mode, (width, height)).tobytes())
        if mode in ("I", "F"):
            values = np.array(
                data.draw(st.lists(st.integers(2, 255), min_size=width * height, max_size=width * height))
            )
            image = Image.fromarray(values.reshape(height, width).astype(np.int32 if mode == "I" else np.float32))
        else:
            image = Image.frombytes(mode, (width, height), data.draw(st.binary(min_size=size, max_size=size)))
            if mode == "P":
                image.putpalette(bytes(range(256)) * 3)
        before, info = image.tobytes(), dict(image.info)
        rgb = to_rgb(image)
        assert (rgb.mode, rgb.size) == ("RGB", (width, height))
        assert (image.mode, image.tobytes(), image.info) == (mode, before, info)

    @pytest.mark.parametrize("mode", [*MODES, "I;16", "I;16B"])
    @pytest.mark.parametrize("colour", ["white", "black"])
    def test_keeps_white_and_black(self, mode: str, colour: str) -> None:
        level = 255 if colour == "white" else 0
        if mode.startswith("I;16"):
            image = Image.new(mode, (3, 2), level * 257)
        elif mode == "LAB":
            image = Image.new("LAB", (3, 2), (level, 128, 128))
        elif mode in ("La", "PA", "RGBa"):
            image = Image.new("RGB", (3, 2), colour).convert("RGBA")
            image = (
                image.convert("RGBa") if mode == "RGBa" else image.convert("LA" if mode == "La" else "P").convert(mode)
            )
        else:
            image = Image.new("RGB", (3, 2), colour).convert(mode)
        assert image.mode == mode
        off = 1 if mode == "LAB" else 0  # colour management rounds twice
        assert all(abs(value - level) <= off for pair in to_rgb(image).getextrema() for value in pair)

    def test_lab_has_its_colours(self) -> None:
        # CIE L*a*b* (D50) of sRGB red and of a grey, rounded to Pillow's 8 bits: L * 2.55, a + 128, b + 128.
        for lab, rgb in (((138, 209, 198), (255, 0, 0)), ((137, 128, 128), (128, 128, 128))):
            assert to_rgb(Image.new("LAB", (1, 1), lab)).getpixel((0, 0)) == pytest.approx(rgb, abs=6)
