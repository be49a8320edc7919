"""Pixels to normalised floats: the formula bit by bit, with one copy of them in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_vlm.ops.pixels import normalize_patches

MEAN, STD = torch.tensor([0.48, 0.45, 0.4]), torch.tensor([0.27, 0.26, 0.28])


def formula(patches: Tensor, frames: int) -> Tensor:
    channels = patches.float().div(255).unflatten(-1, (frames, 3, -1))
    return ((channels - MEAN.view(3, 1)) / STD.view(3, 1)).flatten(-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frames", [1, 2])
def test_is_the_formula_and_leaves_its_input(dtype: torch.dtype, frames: int) -> None:
    patches = (255 * torch.rand(7, frames * 3 * 16)).to(dtype)
    for given in (patches, patches[:0], patches.T.contiguous().T, patches[::2]):
        before = given.clone()
        expected = formula(given, frames)
        found = normalize_patches(given, MEAN, STD, frames)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert torch.equal(given, before)


def test_gradients_pass_through() -> None:
    patches = (255 * torch.rand(3, 48)).requires_grad_()
    (expected,) = torch.autograd.grad(formula(patches, 1).square().sum(), patches)
    (found,) = torch.autograd.grad(normalize_patches(patches, MEAN, STD).square().sum(), patches)
    assert torch.equal(found, expected)


def test_needs_one_copy() -> None:
    patches = torch.randint(0, 256, (1000, 768), dtype=torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        normalized = normalize_patches(patches, MEAN, STD)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(itertools.accumulate(changes)) < 1.01 * 4 * normalized.numel()
