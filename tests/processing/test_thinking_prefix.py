"""Gemma 4's empty thinking channel: where it goes, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.processing.thinking_prefix import gemma4_inject_thinking_prefix, thinking_prefix_mask
from lightning_vlm.processing.tiny import tiny_tokenizer

Dict = dict[str, Any]


class Gemma:
    """Words as tokens: ``<|turn>model\\n`` is [1, 2], the prefix [3, 4, 5]."""

    pad_token_id, unk_token_id = 0, 99

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|turn>": 1, "<|channel>": 3, "<channel|>": 5}.get(token, 99)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return {"<|turn>model\n": [1, 2], "<|channel>thought\n<channel|>": [3, 4, 5]}[text]


def batch(*rows: list[int], **more: Any) -> Dict:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **more}


def test_the_prefix_is_put_behind_every_opening_of_a_model_turn() -> None:
    given = batch([7, 1, 2, 8, 9, 1, 2, 8], [7, 8], mm_token_type_ids=torch.ones(2, 8, dtype=torch.int64))
    found = gemma4_inject_thinking_prefix(given, Gemma())
    assert found is given
    assert found["input_ids"].tolist() == [[7, 1, 2, 3, 4, 5, 8, 9, 1, 2, 3, 4, 5, 8], [7, 8] + [0] * 12]
    assert found["attention_mask"].tolist() == [[1] * 14, [1, 1] + [0] * 12]
    assert found["mm_token_type_ids"].tolist()[0] == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]


def test_every_tensor_of_that_shape_goes_along_and_no_other() -> None:
    labels, pixels = torch.tensor([[-100, -100, 8]]), torch.zeros(2, 3)
    found = gemma4_inject_thinking_prefix(batch([1, 2, 8], labels=labels, pixel_values=pixels), Gemma())
    assert found["labels"].tolist() == [[-100] * 5 + [8]]
    assert found["pixel_values"] is pixels


def test_padding_is_not_carried_along() -> None:
    found = gemma4_inject_thinking_prefix(batch([7] * 9, [1, 2, 8]), Gemma())
    assert found["input_ids"].tolist() == [[7] * 9, [1, 2, 3, 4, 5, 8, 0, 0, 0]]


def test_a_turn_that_has_it_is_left_alone() -> None:
    once = gemma4_inject_thinking_prefix(batch([1, 2, 8]), Gemma())["input_ids"].tolist()
    assert gemma4_inject_thinking_prefix(batch(*once), Gemma())["input_ids"].tolist() == once


def test_another_tokenizer_changes_nothing() -> None:
    tokenizer = tiny_tokenizer()
    given = {"input_ids": torch.tensor([tokenizer.encode("<|turn>model\nhi")])}
    before = given["input_ids"]
    assert gemma4_inject_thinking_prefix(given, tokenizer)["input_ids"] is before
    assert not thinking_prefix_mask(before, tokenizer).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([1, 2, 7, 8]), min_size=1, max_size=12), min_size=1, max_size=3))
def test_without_the_prefix_rows_are_what_they_were(rows: list[list[int]]) -> None:
    found = gemma4_inject_thinking_prefix(batch(*rows), Gemma())
    mask = thinking_prefix_mask(found["input_ids"], Gemma())
    for row, ids, seen, is_prefix in zip(rows, found["input_ids"], found["attention_mask"], mask):
        assert ids[(seen == 1) & ~is_prefix].tolist() == row
        assert int(is_prefix.sum()) == 3 * sum(row[i : i + 2] == [1, 2] for i in range(len(row)))


@pytest.mark.parametrize("as_processor", [True, False])
def test_a_processor_or_its_tokenizer(as_processor: bool) -> None:
    class Processor:
        tokenizer = Gemma()

    found = gemma4_inject_thinking_prefix(batch([1, 2]), Processor() if as_processor else Gemma())
    assert found["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
