"""A bad example is replaced alone, by one that follows from seed, epoch and index, and is named."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_vlm.automodel.collate_fns import make_robust_collate, qwen2_5_collate_fn
from lightning_vlm.automodel.robust_collate import RobustCollate

Dict = dict[str, Any]


def rows(count: int = 20, bad: set[int] = frozenset()) -> list[Dict]:  # type: ignore[assignment]
    return [{"index": index, "value": index, "bad": index in bad} for index in range(count)]


def add(examples: list[Dict]) -> list[int]:
    if any(example["bad"] for example in examples):
        raise OSError("broken file")
    return [example["value"] for example in examples]


def test_what_works_is_untouched() -> None:
    data = rows()
    assert make_robust_collate(data, add)(data[:3]) == [0, 1, 2]


def test_only_the_bad_example_is_replaced_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Defect 2A.7: the whole batch is drawn anew, at random."""
    data = rows(bad={4})
    given = data[3:6]
    with caplog.at_level(logging.WARNING):
        batch = make_robust_collate(data, add)(given)
    assert batch[0::2] == [3, 5]
    assert batch[1] != 4
    assert f"example 4 is replaced by {batch[1]}: OSError: broken file" in caplog.text
    assert given == data[3:6] == rows(bad={4})[3:6], "the input is as it was"


def test_the_replacement_follows_from_seed_epoch_and_index() -> None:
    data = rows(1000, bad={4})

    def replaced(seed: int = 0, epoch: int = 0, neighbours: list[int] | None = None) -> int:
        collate = make_robust_collate(data, add, seed=seed)
        collate.set_epoch(epoch)
        np.random.default_rng()
        torch.manual_seed(int(torch.randint(1000, ())))
        return collate([data[index] for index in [*(neighbours or []), 4]])[-1]

    first = replaced()
    assert [replaced(neighbours=[7, 9]), replaced(neighbours=[1])] == [first] * 2, "whatever the batch and the process"
    assert len({first, replaced(seed=1), replaced(epoch=1), replaced(epoch=2)}) == 4


def test_workers_replace_alike() -> None:
    data = rows(50, bad={4, 11})

    def batches(workers: int) -> list[list[int]]:
        collate = make_robust_collate(data, add)
        return list(DataLoader(data, batch_size=5, collate_fn=collate, num_workers=workers))  # type: ignore[arg-type]

    assert batches(0) == batches(2)
    copied = pickle.loads(pickle.dumps(make_robust_collate(data, add)))
    assert copied(data[:5]) == batches(0)[0]


def test_a_bad_replacement_is_replaced_by_the_next() -> None:
    data = rows(10, bad=set(range(1, 9)))
    assert make_robust_collate(data, add)(data[4:6])[0] in (0, 9)


def test_an_example_that_cannot_be_read_is_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    class Unreadable(list[Dict]):
        def __getitem__(self, index: Any) -> Any:
            if index != 0:
                raise OSError(f"no file {index}")
            return super().__getitem__(index)

    data = Unreadable(rows(5, bad={3}))
    with caplog.at_level(logging.WARNING):
        assert make_robust_collate(data, add)([rows(5, bad={3})[3]]) == [0]


def test_examples_that_fail_only_together_are_all_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def unlike(examples: list[Dict]) -> list[int]:
        if {0, 1} <= {example["value"] for example in examples}:
            raise ValueError("0 and 1 do not go together")
        return add(examples)

    data = rows(100)
    with caplog.at_level(logging.WARNING):
        batch = make_robust_collate(data, unlike)(data[:2])
    assert len(batch) == 2
    assert caplog.text.count("only together: 0 and 1 do not go together") == 2


def test_it_gives_up_with_the_reason() -> None:
    calls = []

    def fails(examples: list[Any]) -> None:
        calls.append(len(examples))
        raise OSError("nothing works")

    with pytest.raises(RuntimeError, match=r"Collate failed after 3 retries. Last error: nothing works") as caught:
        make_robust_collate(rows(), fails, max_retries=3)(rows()[:2])
    assert isinstance(caught.value.__cause__, OSError)
    assert calls.count(2) == 3


@pytest.mark.parametrize(("data", "retries"), [([], 10), (rows(), 0)])
def test_what_cannot_work_is_refused(data: list[Any], retries: int) -> None:
    with pytest.raises(ValueError, match="expected >= 1"):
        make_robust_collate(data, add, retries)


def test_an_example_without_an_index_is_known_by_what_it_holds() -> None:
    collate = RobustCollate(range(10_000), add)

    def content(color: str = "red", text: str = "a") -> Dict:
        part = {"type": "image", "image": Image.new("RGB", (4, 4), color)}
        return {"conversation": [{"role": "user", "content": [part, text]}], "audio": np.ones(3), "x": torch.ones(2)}

    found = collate.replacement(content())
    assert collate.replacement(content()) == found, "not by its address"
    assert found != collate.replacement(content("blue"))
    assert found != collate.replacement(content(text="b"))


def test_a_damaged_picture_can_be_replaced(qwen2_5: Any, example: Callable[..., Dict]) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    damaged = Image.open(io.BytesIO(buffer.getvalue()[:800]))
    data = [example("q", f"answer {index}", Image.new("RGB", (56, 56))) for index in range(5)]
    collate = make_robust_collate(data, lambda examples: qwen2_5_collate_fn(examples, qwen2_5))
    batch = collate([data[0], example("q", "bad", damaged)])
    assert batch["n_images_per_sample"].tolist() == [1, 1]
