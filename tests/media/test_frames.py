"""Frames of a video as patches of tubelets, against an independent cutting and against the tower's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RadioConfig, RadioModel

from lightning_vlm.media.frames import frames_to_patches, patches_to_frames
from lightning_vlm.media.image import image_pixels, resize_pixels
from tests.fixtures.media_samples import frames, picture

PATCH = 8


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (2, 2)])
def test_each_patch_holds_its_frames_one_after_another(count: int, size: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    shown = frames(count, rows * PATCH, columns * PATCH)  # of the grid's own size: no resizing
    patches = frames_to_patches(shown, grid, PATCH, size)
    arrays = [np.array(frame) for frame in shown]
    arrays += arrays[-1:] * (-count % size)
    expected = [
        np.concatenate(
            [
                array[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH, channel].ravel()
                for array in arrays[start : start + size]
                for channel in range(3)
            ]
        )
        for start in range(0, len(arrays), size)
        for r in range(rows)
        for c in range(columns)
    ]
    assert patches.dtype == torch.uint8
    assert np.array_equal(patches.numpy(), np.stack(expected))


def test_is_how_transformers_cuts_stacked_frames() -> None:
    shown = frames(4, 32, 48)
    stacked = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in shown])
    tower = RadioModel(RadioConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=PATCH))
    theirs = tower.embeddings._image_to_patches(stacked.reshape(2, 6, 32, 48)).flatten(0, 1)
    assert torch.equal(frames_to_patches(shown, (4, 6), PATCH, 2), theirs)


@pytest.mark.parametrize("as_float", [False, True])
def test_frames_are_resized_as_images_are(as_float: bool) -> None:
    frame = picture(37, 53)
    pixels = image_pixels(frame)
    resized = resize_pixels(pixels.float() if as_float else pixels, 16, 32)
    patches = frames_to_patches([frame], (2, 4), PATCH, 1, as_float)
    assert patches.is_floating_point() is as_float
    back = patches.view(2, 4, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4).reshape(3, 16, 32)
    assert torch.equal(back, resized.reshape(3, 16, 32) if resized.shape[0] == 3 else resized.permute(2, 0, 1))


def test_frames_become_rgb() -> None:
    grey = picture(16, 16).convert("L")
    assert torch.equal(
        frames_to_patches([grey], (2, 2), PATCH, 2), frames_to_patches([grey.convert("RGB")] * 2, (2, 2), PATCH, 2)
    )
    assert isinstance(grey, Image.Image)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("as_float", [False, True])
def test_frames_come_back(count: int, size: int, grid: tuple[int, int], as_float: bool) -> None:
    rows, columns = grid
    shown = frames(count, rows * PATCH, columns * PATCH)
    patches = frames_to_patches(shown, grid, PATCH, size, as_float)
    back = patches_to_frames(patches, grid, size)
    repeated = shown + shown[-1:] * (-count % size)
    assert back.dtype == patches.dtype
    assert torch.equal(back, torch.stack([image_pixels(frame) for frame in repeated]).to(patches.dtype))
