"""Batches of other families: which of their samples have nothing to learn, as far as a batch tells."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm.data.examples import ExampleBatch, ExampleCollate
from lightning_vlm.schema import IGNORE_INDEX, DataError

NONE, SOME = [IGNORE_INDEX] * 3, [IGNORE_INDEX, 7, IGNORE_INDEX]


def collated(labels: Any, examples: int, counted: bool = True, trains: bool = True) -> ExampleBatch:
    """A batch as the loader makes it: numbers 10, 11, ... and one that was bad before."""
    value = torch.tensor(labels) if isinstance(labels, list) else labels
    function: Callable[[list[Any]], dict[str, Any]] = lambda _: {"labels": value, "other": 1}  # noqa: E731
    collate = ExampleCollate(function, trains)
    batch = collate([{"source": f"f:{index}"} for index in range(examples)], counted)
    batch.indices = torch.arange(10, 10 + examples)
    batch.skipped = [(99, DataError("f:99", "bad", "fix"))]
    return batch


def without_labels(batch: ExampleBatch) -> list[tuple[int, str]]:
    (_, first), *others = batch.skipped
    assert first.source == "f:99", "what the loader left out comes first"
    assert all(error.kind == "nothing to learn" for _, error in others)
    return [(index, error.source) for index, error in others]


def test_rows_without_a_label_are_named_by_number_and_place() -> None:
    assert without_labels(collated([SOME, NONE, SOME, NONE], 4)) == [(11, "f:1"), (13, "f:3")]
    assert without_labels(collated([SOME, SOME], 2)) == []


def test_only_training_counts_and_no_stand_in() -> None:
    assert without_labels(collated([NONE], 1, trains=False)) == []
    assert without_labels(collated([SOME], 1, counted=False)) == []


@pytest.mark.parametrize("labels", [[SOME], [SOME, NONE], [SOME, SOME, NONE]])
def test_rows_that_are_no_examples_tell_nothing(labels: Any) -> None:
    """Packed by a function of the user's own, or without those that it dropped: no row says whose it is."""
    assert without_labels(collated(labels, 4)) == []


@pytest.mark.parametrize("labels", [[NONE], [NONE, NONE], [NONE] * 3])
def test_but_a_batch_without_any_label_tells_of_all(labels: Any) -> None:
    assert without_labels(collated(labels, 3)) == [(10, "f:0"), (11, "f:1"), (12, "f:2")]


@pytest.mark.parametrize("labels", [None, torch.tensor([1.0, 0.0]), "text"])
def test_without_labels_of_tokens_nothing_is_said(labels: Tensor | None) -> None:
    """A user's own function may make any batch: classes, pairs of preferences, no labels at all."""
    assert without_labels(collated(labels, 2)) == []


def test_it_travels_from_workers_with_what_it_says() -> None:
    batch = pickle.loads(pickle.dumps(collated([SOME, NONE], 2)))
    assert without_labels(batch) == [(11, "f:1")]
    assert batch["other"] == 1
    assert without_labels(batch.to("cpu")) == [(11, "f:1")]
