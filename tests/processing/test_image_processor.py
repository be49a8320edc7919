"""The image processor: what transformers users call, with any image they have, and both pixel paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lightning_vlm.geometry.images import ImageGeometry
from lightning_vlm.media.image import image_to_patches
from lightning_vlm.ops.pixels import normalize_patches
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor

SMALL = {"patch_size": 8, "min_num_patches": 4, "max_num_patches": 256}


def noise(height: int = 50, width: int = 70, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestDefaults:
    def test_are_the_released_omni_models(self) -> None:
        processor = NemotronVLImageProcessor()
        assert processor.geometry == ImageGeometry()
        assert tuple(processor.image_mean) == tuple(OPENAI_CLIP_MEAN)
        assert tuple(processor.image_std) == tuple(OPENAI_CLIP_STD)
        assert processor.do_normalize is False

    def test_geometry_follows_every_option(self) -> None:
        options: dict[str, Any] = {
            "mode": "static",
            "patch_size": 4,
            "min_num_patches": 5,
            "max_num_patches": 77,
            "max_model_len": 99,
            "tile_size": 64,
            "max_tiles": 3,
            "use_thumbnail": False,
        }
        expected = ImageGeometry(**options, merge_size=4)
        processor = NemotronVLImageProcessor(**options, downsample_ratio=0.25)
        assert processor.geometry == expected
        assert NemotronVLImageProcessor().geometry_with(**options, downsample_ratio=0.25) == expected


class TestPixels:
    def test_are_uint8_patches_and_one_grid_per_image(self) -> None:
        encoded = NemotronVLImageProcessor(**SMALL)([noise(50, 70), noise(16, 16)])
        assert encoded["image_grid_hw"].tolist() == [[8, 10], [2, 2]]
        assert encoded["pixel_values"].shape == (80 + 4, 192)
        assert encoded["pixel_values"].dtype == torch.uint8

    def test_of_static_mode_are_one_grid_per_tile(self) -> None:
        processor = NemotronVLImageProcessor(mode="static", patch_size=8, tile_size=32, max_tiles=6)
        encoded = processor([noise(64, 96), noise(32, 32)])
        assert encoded["image_grid_hw"].tolist() == [[4, 4]] * 8
        assert encoded["pixel_values"].shape == (8 * 16, 192)

    def test_are_those_of_each_image_alone(self) -> None:
        processor = NemotronVLImageProcessor(**SMALL)
        images = [noise(50, 70, seed=1), noise(20, 90, seed=2)]
        alone = [image_to_patches(image, processor.geometry)[0] for image in images]
        assert torch.equal(processor(images)["pixel_values"], torch.cat(alone))

    @pytest.mark.parametrize("channels", [[0.5, 0.5, 0.5], [0.48145466, 0.4578275, 0.40821073]], ids=["half", "CLIP"])
    @pytest.mark.parametrize("mode", ["dynamic", "static"])
    def test_normalised_are_the_float_resize_in_each_channel(self, mode: str, channels: list[float]) -> None:
        std = [0.2, 0.3, 0.4]
        processor = NemotronVLImageProcessor(
            **SMALL, mode=mode, tile_size=32, do_normalize=True, image_mean=channels, image_std=std
        )
        encoded = processor(noise())
        resized, _ = image_to_patches(noise(), processor.geometry, as_float=True)
        pixels = resized.double().view(-1, 3, 64)
        expected = torch.stack([(pixels[:, c] / 255 - channels[c]) / std[c] for c in range(3)], dim=1)
        assert encoded["pixel_values"].dtype == torch.float32
        # Measured worst case: 4.2e-7, the rounding of float32.
        torch.testing.assert_close(encoded["pixel_values"].double().view(-1, 3, 64), expected, rtol=0, atol=2e-6)

    def test_normalised_are_not_the_uint8_path_normalised(self) -> None:
        processor = NemotronVLImageProcessor(**SMALL)
        in_uint8 = processor(noise())["pixel_values"]
        mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
        in_float = processor(noise(), do_normalize=True)["pixel_values"]
        difference = (normalize_patches(in_uint8, mean, std) - in_float).abs()
        assert 0 < float(difference.mean()) < 0.02  # measured: 6.5e-3, under half a grey level (1.5e-2)

    def test_black_and_white_normalise_to_known_numbers(self) -> None:
        processor = NemotronVLImageProcessor(
            **SMALL, do_normalize=True, image_mean=[0.0, 0.5, 1.0], image_std=[1.0, 0.5, 0.25]
        )
        white = processor(Image.new("RGB", (16, 16), "white"))["pixel_values"].view(-1, 3, 64)
        black = processor(Image.new("RGB", (16, 16), "black"))["pixel_values"].view(-1, 3, 64)
        for channel, (low, high) in enumerate([(0.0, 1.0), (-1.0, 1.0), (-4.0, 0.0)]):
            assert black[:, channel].unique().tolist() == [low]
            assert white[:, channel].unique().tolist() == [high]


class TestCalls:
    @pytest.mark.parametrize(
        "convert",
        [
            np.array,
            lambda image: np.array(image).astype(np.float32),
            lambda image: np.moveaxis(np.array(image), -1, 0),
            lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
            lambda image: [[image]],
            lambda image: np.array(image)[None],
        ],
        ids=["numpy", "float numpy", "channels first", "tensor", "nested lists", "batch"],
    )
    def test_take_any_kind_of_image(self, convert: Any) -> None:
        processor = NemotronVLImageProcessor(**SMALL)
        expected = processor(noise())
        encoded = processor(convert(noise()))
        assert torch.equal(encoded["pixel_values"], expected["pixel_values"])
        assert torch.equal(encoded["image_grid_hw"], expected["image_grid_hw"])

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
    def test_take_any_mode_of_image(self, mode: str) -> None:
        image = noise().convert(mode)
        processor = NemotronVLImageProcessor(**SMALL)
        assert torch.equal(processor(image)["pixel_values"], processor(image.convert("RGB"))["pixel_values"])

    @pytest.mark.parametrize("array", [np.array(noise()) / 255, np.array(noise()) - 128.0], ids=["0..1", "-128..127"])
    def test_refuse_an_array_that_was_scaled_already(self, array: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"expected pixels in 0\.\.255"):
            NemotronVLImageProcessor(**SMALL)(array)

    def test_override_options_for_one_call_only(self) -> None:
        processor = NemotronVLImageProcessor(**SMALL)
        before = processor.to_dict()
        assert processor(noise(200, 200), max_num_patches=16)["image_grid_hw"].tolist() == [[4, 4]]
        assert processor(noise(), do_normalize=True)["pixel_values"].dtype == torch.float32
        assert processor.to_dict() == before
        assert processor(noise(200, 200))["image_grid_hw"].tolist() == [[16, 16]]

    @pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray)])
    def test_return_the_tensors_that_are_asked_for(self, kind: str, expected: type) -> None:
        encoded = NemotronVLImageProcessor(**SMALL)(noise(), return_tensors=kind)
        assert {type(value) for value in encoded.values()} == {expected}

    def test_leave_the_image_alone(self) -> None:
        array = np.array(noise())
        before = array.copy()
        NemotronVLImageProcessor(**SMALL)(array, do_normalize=True)
        assert np.array_equal(array, before)


class TestFiles:
    def test_options_survive_saving(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {
            "mode": "static",
            "patch_size": 8,
            "downsample_ratio": 0.25,
            "tile_size": 64,
            "max_tiles": 3,
            "use_thumbnail": False,
            "do_normalize": True,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
        }
        processor = NemotronVLImageProcessor(**options)
        processor.save_pretrained(tmp_path)
        loaded = NemotronVLImageProcessor.from_pretrained(tmp_path)
        assert loaded.geometry == processor.geometry
        assert torch.equal(loaded(noise())["pixel_values"], processor(noise())["pixel_values"])

    def test_released_names_of_mean_and_std_are_read(self, tmp_path: Path) -> None:
        released = {
            "image_processor_type": "NemotronNanoVLV2ImageProcessor",
            "norm_mean": [0.1, 0.2, 0.3],
            "norm_std": [0.4, 0.5, 0.6],
            "patch_size": 16,
            "downsample_ratio": 0.5,
            "max_num_patches": 4096,
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
        loaded = NemotronVLImageProcessor.from_pretrained(tmp_path)
        assert list(loaded.image_mean) == [0.1, 0.2, 0.3]
        assert list(loaded.image_std) == [0.4, 0.5, 0.6]
        assert loaded.geometry.max_num_patches == 4096

    def test_own_names_win_over_released_ones(self) -> None:
        processor = NemotronVLImageProcessor(norm_mean=[0.1] * 3, image_mean=[0.2] * 3)
        assert list(processor.image_mean) == [0.2] * 3


def test_no_maximum_means_the_context_is_the_maximum() -> None:
    unlimited = NemotronVLImageProcessor(max_num_patches=0, max_model_len=6004)
    assert unlimited.geometry.image_budget() == 6000 * 4
    assert unlimited.geometry.num_image_tokens(20_000, 20_000) <= 6000
