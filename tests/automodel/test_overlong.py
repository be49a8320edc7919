"""Leaving out by estimate, as NeMo AutoModel does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_vlm.automodel.collate_fns import _drop_overlong_samples, _estimate_media_tokens, _extract_image_config

Dict = dict[str, Any]


@pytest.fixture
def conversations(example: Callable[..., Dict]) -> list[Any]:
    rows = [example("q", "a"), example("q", "a" * 50), example("q", "a", Image.new("RGB", (112, 112)))]
    return [row["conversation"] for row in rows]


def length(conversation: Any, processor: Any) -> int:
    text = processor.apply_chat_template(conversation, tokenize=False)
    return len(processor.tokenizer.encode(text)) + _estimate_media_tokens(conversation, processor)


def test_no_limit_keeps_the_same_list(conversations: list[Any], qwen2_5: Any) -> None:
    kept, indices = _drop_overlong_samples(conversations, qwen2_5, None)
    assert kept is conversations
    assert indices == [0, 1, 2]


def test_what_is_longer_is_left_out_and_said(conversations: list[Any], qwen2_5: Any, caplog: Any) -> None:
    limit = length(conversations[2], qwen2_5)
    with caplog.at_level(logging.WARNING):
        kept, indices = _drop_overlong_samples(conversations, qwen2_5, limit)
    assert indices == [0, 2], "what has exactly as many tokens stays"
    assert kept == [conversations[0], conversations[2]]
    assert "1 of 3 samples" in caplog.text
    assert _drop_overlong_samples(conversations, qwen2_5, limit - 1)[1] == [0]


def test_images_count_as_they_are_resized(
    conversations: list[Any], qwen2_5: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    assert _extract_image_config(qwen2_5)["factor"] == 28
    assert _estimate_media_tokens(conversations[2], qwen2_5) == 16 - 1
    assert _estimate_media_tokens(conversations[2], object()) == 0
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56)).save("a.png")
    parts = [{"type": "image", "image": name} for name in ("a.png", "nowhere.png")] + [{"type": "video", "video": "x"}]
    assert _estimate_media_tokens([{"role": "user", "content": parts}], qwen2_5) == 4 - 1


def test_what_cannot_be_estimated_stays(conversations: list[Any]) -> None:
    assert _drop_overlong_samples(conversations, object(), 1)[1] == [0, 1, 2]


@pytest.mark.parametrize("rows", [[0, 1], []])
def test_nothing_left_is_an_error(rows: list[int], conversations: list[Any], qwen2_5: Any) -> None:
    with pytest.raises(ValueError, match="have more than max_length 1 tokens"):
        _drop_overlong_samples([conversations[row] for row in rows], qwen2_5, 1)
