"""Fake images: where they go, that nothing given is changed, and that their tokens are hidden, packed or not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_vlm.automodel import fake_image
from lightning_vlm.automodel.collate_fns import neat_packed_vlm_collater
from lightning_vlm.automodel.fake_image import (
    _batch_has_media,
    _conversation_has_media,
    _get_vision_token_ids,
    inject_fake_image,
    inject_fake_image_into_conversation,
    mask_fake_vision_tokens_batch,
    mask_fake_vision_tokens_single,
)
from lightning_vlm.automodel.neat_samples import _build_packed_vlm_sample, _shift_sample
from lightning_vlm.processing.rendered_encoder import encode_rendered

Dict = dict[str, Any]


def test_the_first_user_message_begins_with_a_white_image() -> None:
    conversation = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hello", "name": "x"},
        {"role": "user", "content": "again"},
    ]
    given = copy.deepcopy(conversation)
    found = inject_fake_image_into_conversation(conversation)
    assert conversation == given
    part, text = found[1]["content"]
    assert part["type"] == "image"
    assert part["image"].size == (56, 56)
    assert part["image"].getcolors() == [(56 * 56, (255, 255, 255))]
    assert text == {"type": "text", "text": "hello"}
    assert found[1]["name"] == "x"
    assert [found[0], found[2]] == [given[0], given[2]]


@pytest.mark.parametrize("content", [[{"type": "text", "text": "a"}], None, []])
def test_content_may_be_parts_or_nothing(content: Any) -> None:
    found = inject_fake_image_into_conversation([{"role": "user", "content": content}])
    assert [part["type"] for part in found[0]["content"]] == ["image", *["text"] * bool(content)]


def test_without_a_user_there_is_one() -> None:
    found = inject_fake_image_into_conversation([{"role": "assistant", "content": "a"}])
    assert [message["role"] for message in found] == ["user", "assistant"]
    assert [part["type"] for part in found[0]["content"]] == ["image"]


@pytest.mark.parametrize(
    ("part", "has"),
    [
        ({"type": "image", "image": 1}, True),
        ({"type": "video", "video": 1}, True),
        ({"image": "a.png"}, True),
        ({"video": "a.mp4"}, True),
        ({"type": "audio", "audio": 1}, False),
        ({"type": "text", "text": "image"}, False),
        ("image", False),
    ],
)
def test_media_are_told_by_type_or_key(part: Any, has: bool) -> None:
    assert _conversation_has_media([{"role": "user", "content": [part]}]) is has
    assert not _conversation_has_media([{"role": "user", "content": "image"}])
    assert _batch_has_media([[], [{"role": "user", "content": [part]}]]) is has


def test_an_example_with_media_gets_no_fake(example: Callable[..., Dict]) -> None:
    real = example("q", "a", {"type": "image", "image": 1})
    assert inject_fake_image(real) == real
    assert inject_fake_image(example())["_injected_fake"] is True


def test_vision_tokens_of_real_processors(qwen2_5: Any, gemma3: Any, llava_onevision: Any) -> None:
    for processor, tokens in (
        (qwen2_5, {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"}),
        (gemma3, {"<image_soft_token>", "<start_of_image>", "<end_of_image>"}),
        (llava_onevision, {"<image>", "<video>"}),
    ):
        found = {processor.tokenizer.convert_ids_to_tokens(token) for token in _get_vision_token_ids(processor)}
        assert tokens <= found
        assert not found & {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<end_of_turn>"}
        assert _get_vision_token_ids(processor.tokenizer) == _get_vision_token_ids(processor)


def test_an_unknown_token_is_no_vision_token() -> None:
    class Tokenizer:
        unk_token_id, image_token_id, video_token_id = 5, True, 7

        def convert_tokens_to_ids(self, token: str) -> int:
            return 5

    assert _get_vision_token_ids(Tokenizer()) == {7}


def test_unknown_vision_tokens_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Nothing:
        pass

    fake_image._warned.clear()
    sample = {"input_ids": torch.tensor([1, 2]), "attention_mask": torch.tensor([1, 1])}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert mask_fake_vision_tokens_single(sample, Nothing())["attention_mask"].tolist() == [1, 1]
    assert caplog.text.count("the vision tokens of Nothing are not known") == 1


def test_only_the_given_rows_of_a_batch_are_hidden(qwen2_5: Any) -> None:
    pad = qwen2_5.image_token_id
    batch = {
        "input_ids": torch.tensor([[1, pad, 2], [1, pad, 2]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
    }
    mask = batch["attention_mask"]
    assert mask_fake_vision_tokens_batch(batch, qwen2_5, [1]) is batch
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 1]]
    assert mask.all(), "the mask that was given may be a dataset's: it is as it was"


def test_a_fake_image_stays_hidden_when_it_is_packed(qwen2_5: Any, example: Callable[..., Dict]) -> None:
    """Defect 2B.3: packing makes the mask anew, and fake tokens are attended to."""
    fake = mask_fake_vision_tokens_single(encode_rendered(inject_fake_image(example("q", "a")), qwen2_5), qwen2_5)
    real = encode_rendered(example("q", "b"), qwen2_5)
    pack = _build_packed_vlm_sample([_shift_sample(fake), _shift_sample(real)], 999, 0)
    batch = neat_packed_vlm_collater([pack], attn_implementation="flash_attention_2")
    vision = torch.isin(batch["input_ids"], torch.tensor(sorted(_get_vision_token_ids(qwen2_5))))
    assert vision.any()
    assert torch.equal(batch["attention_mask"] == 0, vision)
    assert batch["_packed_seq_ids"].min() == 1
