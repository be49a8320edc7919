"""The contracts of the data path: what they count, what they move, and how their error reads."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm.media.load import MediaError
from lightning_vlm.models.media import KINDS
from lightning_vlm.schema import (
    IGNORE_INDEX,
    IMAGE,
    SOUND,
    TEXT,
    VIDEO,
    Conversation,
    DataError,
    ImageRef,
    Sample,
    Text,
    Turn,
    VLMBatch,
    count_label_tokens,
)


def make_batch(**changes: Any) -> VLMBatch:
    values: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8], [-100, 6, -100, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "pixel_values": torch.zeros(4, 192, dtype=torch.uint8),
        "image_grid_hw": torch.tensor([[2, 2]]),
        "num_images": torch.tensor([1, 0]),
        "prompt_lengths": torch.tensor([2, 1]),
        "prompts": ["a", "b"],
        "references": [("x",), ("y",)],
        "sources": ["f:1", "f:2"],
        "counted": torch.tensor([True, True]),
        "num_label_tokens": 3,
    }
    return VLMBatch(**{**values, **changes})


class TestDataError:
    def test_reads_as_one_sentence_of_place_problem_and_fix(self) -> None:
        error = DataError("train.jsonl:12", "the row is a list, expected an object", "write objects")
        assert str(error) == "train.jsonl:12: the row is a list, expected an object; write objects."
        assert (error.source, error.problem, error.fix) == (
            "train.jsonl:12",
            "the row is a list, expected an object",
            "write objects",
        )

    @pytest.mark.parametrize("kind", [DataError, MediaError])
    def test_travels_from_a_worker_process(self, kind: type[DataError]) -> None:
        error = pickle.loads(pickle.dumps(kind("f:1", "found, expected", "change")))
        assert type(error) is kind
        assert str(error) == "f:1: found, expected; change."

    def test_is_a_value_error(self) -> None:
        assert issubclass(MediaError, DataError)
        assert issubclass(DataError, ValueError)


class TestConversation:
    turns = (
        Turn("user", (Text("a"), ImageRef("1.png"), Text("b"), ImageRef("2.png"))),
        Turn("assistant", (Text("c"),)),
        Turn("user", (ImageRef("3.png"),)),
    )

    def test_images_come_in_reading_order(self) -> None:
        images = Conversation(self.turns, "f:1").images
        assert [image.ref for image in images] == ["1.png", "2.png", "3.png"]

    def test_text_of_a_turn_leaves_its_images_out(self) -> None:
        assert [turn.text for turn in self.turns] == ["ab", "c", ""]

    def test_cannot_be_changed_in_place(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.turns[0].role = "assistant"  # type: ignore[misc]


def test_both_halves_number_the_kinds_of_media_alike() -> None:
    assert (TEXT, IMAGE, VIDEO, SOUND) == (0, 1, 2, 3), "transformers' numbers"
    assert [KINDS[number - 1] for number in (IMAGE, VIDEO, SOUND)] == ["image", "video", "sound"]


class TestLabelTokens:
    @pytest.mark.parametrize(
        ("labels", "count"),
        [
            ([[-100, 1, 2]], 2),
            ([[3, 1, -100]], 1),  # nothing predicts the first token
            ([[-100, -100]], 0),
            ([[-100, 0]], 1),  # id 0 is a token like any other
            ([[-100, 4, 5], [-100, -100, 6]], 3),
        ],
        ids=str,
    )
    def test_are_those_that_a_next_token_loss_sums_over(self, labels: list[list[int]], count: int) -> None:
        tensor = torch.tensor(labels)
        assert count_label_tokens(tensor) == count
        logits = torch.zeros(*tensor.shape, 10)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tensor[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        assert int((loss > 0).sum()) == count

    def test_of_a_sample(self) -> None:
        ids = torch.tensor([5, 6, 7])
        sample = Sample(ids, torch.tensor([5, -100, 7]), None, None, 2, "p", (), "f:1")
        assert len(sample) == 3
        assert sample.num_label_tokens == 1


class TestBatch:
    def test_counts_rows_and_real_tokens(self) -> None:
        batch = make_batch()
        assert len(batch) == 2
        assert batch.num_tokens == 6

    def test_gives_the_model_its_inputs_and_no_labels(self) -> None:
        batch = make_batch()
        names = {"input_ids", "attention_mask", "num_images", "pixel_values", "image_grid_hw"}
        assert set(batch.model_inputs()) == names
        assert batch.model_inputs()["pixel_values"] is batch.pixel_values
        assert set(make_batch(cu_seqlens=torch.tensor([0, 4, 6])).model_inputs()) == {*names, "cu_seqlens"}
        assert set(make_batch(pixel_values=None, image_grid_hw=None).model_inputs()) == {
            "input_ids",
            "attention_mask",
            "num_images",
        }

    def test_moves_every_tensor_and_only_tensors(self) -> None:
        batch = make_batch(cu_seqlens=torch.tensor([0, 4, 6]))
        moved = batch.to("meta")
        assert moved is batch
        values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        assert len(tensors) == 9
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert batch.prompts == ["a", "b"]
        assert batch.num_label_tokens == 3

    def test_moves_without_images(self) -> None:
        batch = make_batch(pixel_values=None, image_grid_hw=None).to("meta")
        assert batch.pixel_values is None
        assert batch.input_ids.device.type == "meta"

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
    def test_pins_every_tensor(self) -> None:
        batch = make_batch().pin_memory()
        assert batch.input_ids.is_pinned()
        assert batch.pixel_values is not None
        assert batch.pixel_values.is_pinned()
