"""Fingerprints: any change of any element is seen, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_vlm.training.movement import effects_of_step, fingerprints

CPU = torch.device("cpu")


def one(tensor: torch.Tensor) -> int:
    return int(fingerprints([tensor], CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [1, 7, (1 << 20) + 3])
def test_one_changed_element_is_seen_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    tensor = torch.ones(size, dtype=dtype)
    before = one(tensor)
    assert one(tensor.clone()) == before
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[place] = torch.nextafter(changed[place], changed[place] * 2) if dtype == torch.float32 else 2
        assert one(changed) != before


def test_changes_that_cancel_in_a_sum_are_seen() -> None:
    tensor = torch.full((8,), 1.5)
    for change in ([1, -1, 0, 0, 0, 0, 0, 0], [1, -1, -1, 1, 0, 0, 0, 0], [1, 1, 1, 1, -1, -1, -1, -1]):
        assert one(tensor + torch.tensor(change) / 4) != one(tensor)
    assert one(torch.tensor([1.0, 2.0])) != one(torch.tensor([2.0, 1.0]))


def test_layout_and_emptiness_do_not_matter() -> None:
    tensor = torch.randn(6, 5)
    assert one(tensor.T.contiguous().T) == one(tensor)
    assert one(torch.empty(0, 4)) == 0  # a rank's shard of a small parameter
    assert fingerprints([], CPU).shape == (0,)


def test_nothing_as_large_as_the_model_is_allocated() -> None:
    tensor = torch.zeros(1 << 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one(tensor)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 8 << 20 < tensor.nbytes


def test_effects_tell_gradients_of_zero_from_none_at_all() -> None:
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(4)]
    before = fingerprints(parameters, CPU)
    parameters[0].grad, parameters[1].grad, parameters[3].grad = torch.ones(4), torch.zeros(4), torch.ones(4)
    with torch.no_grad():
        parameters[0] += 1
        parameters[1] += 1
    found = [(effect.moved, effect.in_graph, effect.driven) for effect in effects_of_step(parameters, before)]
    assert found == [(True, True, True), (True, True, False), (False, False, False), (False, True, True)]
