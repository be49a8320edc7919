"""What leaves a worker arrives as it was, bit by bit."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm.data.batching import FixedBatches
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.data.examples import ExampleBatch, ExampleCollate
from lightning_vlm.data.loader import ResumableLoader
from lightning_vlm.data.samplers import EpochPlan
from lightning_vlm.data.transport import LARGE_BYTES, Parcel
from lightning_vlm.schema import DataError, Sample, VLMBatch


def sent(content: Any) -> tuple[Any, int]:
    """What arrives, and how many bytes the message had."""
    message = bytes(ForkingPickler.dumps(Parcel(content)))
    return pickle.loads(message), len(message)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
        assert torch.equal(*raw)  # also of NaN
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    elif isinstance(expected, DataError):
        assert found.args == expected.args
    else:
        assert found == expected


TENSORS = {
    "int64": torch.arange(12).reshape(3, 4),
    "transposed": torch.arange(12).reshape(3, 4).T,
    "every second": torch.arange(12)[::2],
    "bool": torch.tensor([True, False]),
    "bfloat16": torch.randn(5).bfloat16(),
    "NaN": torch.tensor([float("nan"), -0.0]),
    "scalar": torch.tensor(3, dtype=torch.int32),
    "empty": torch.empty(0, 7, dtype=torch.uint8),
    "complex": torch.tensor([1 + 2j]).conj().resolve_conj(),
    "large": torch.randint(0, 256, (LARGE_BYTES,), dtype=torch.uint8),
    "one byte less": torch.randint(0, 256, (LARGE_BYTES - 1,), dtype=torch.uint8),
    "learned": torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_as_they_were(name: str) -> None:
    expected = TENSORS[name]
    found, size = sent({"deep": [(expected,)]})
    tensor = found["deep"][0][0]
    assert_same(tensor, expected)
    assert tensor.requires_grad == expected.requires_grad
    assert tensor.is_shared() == (name in ("large", "complex", "learned")), "only small plain ones travel as bytes"
    assert size < expected.nbytes + 1024
    with torch.no_grad():
        tensor.zero_()  # it can be written to, as the model's own code may


def test_a_tensor_that_occurs_twice_arrives_once() -> None:
    for tensor in (torch.arange(3), torch.zeros(LARGE_BYTES)):
        found, _ = sent([tensor, tensor])
        assert found[0] is found[1]


def test_views_of_a_large_tensor_take_no_more_than_their_own_size() -> None:
    _, size = sent(torch.zeros(LARGE_BYTES)[:10])
    assert size < 1024


def test_what_cannot_be_sent_is_an_error_where_it_is_made() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):  # in torch's own queue it would be a hang
        Parcel(lambda: None)


class Samples:
    """Sample ``i`` has ``i + 2`` tokens and, if it is odd, an image; every seventh is bad."""

    def __getitem__(self, index: int) -> Sample:
        if index % 7 == 6:
            raise DataError(f"rows.jsonl:{index}", "the image is broken", "replace it")
        ids = torch.full((index + 2,), index)
        grid = torch.tensor([[2, 2 * index]]) if index % 2 else None
        pixels = torch.full((4 * index, 768), index, dtype=torch.uint8) if index % 2 else None
        return Sample(ids, ids.clone(), pixels, grid, 1, "prompt", ("a", "b"), f"rows.jsonl:{index}")


def as_dict(samples: list[Sample]) -> dict[str, Any]:
    ids = torch.cat([sample.input_ids for sample in samples])
    return {"input_ids": ids, "labels": ids, "videos": [{"frames": (ids.float(), ids[:0])}], "names": ["a"]}


@pytest.mark.parametrize("collate", [PaddedCollate(0), PackedCollate(), ExampleCollate(as_dict)])
def test_batches_of_workers_equal_those_of_this_process(collate: Any) -> None:
    here, there = (
        list(ResumableLoader(Samples(), EpochPlan(FixedBatches(40, 8)), collate, num_workers=workers, strict=False))
        for workers in (0, 2)
    )
    assert sum(len(batch.skipped) for batch in here) == 5
    for found, expected in zip(there, here, strict=True):
        if isinstance(expected, ExampleBatch):
            assert_same(found, expected)
            assert_same(vars(found), vars(expected))
        else:
            assert isinstance(expected, VLMBatch)
            for name in VLMBatch.__slots__:  # type: ignore[attr-defined]
                assert_same(getattr(found, name), getattr(expected, name))
