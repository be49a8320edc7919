"""Placeholders of Kimi-K2.5, expanded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.processing.kimi_k25 import _expand_image_tokens, media_token_id

MEDIA = 9


def test_each_placeholder_is_repeated_by_its_grid() -> None:
    ids, mask = torch.tensor([1, MEDIA, 2, MEDIA], dtype=torch.int32), torch.tensor([0, 0, 1, 0])
    grids = torch.tensor([[5, 4, 6], [1, 2, 2]])
    found, seen = _expand_image_tokens(ids, mask, grids, MEDIA)
    assert found.tolist() == [1, *[MEDIA] * 6, 2, MEDIA]
    assert seen.tolist() == [0, *[1] * 6, 1, 1]
    assert found.dtype == torch.int32
    assert seen.dtype == mask.dtype
    assert _expand_image_tokens(ids, mask, grids, MEDIA, (1, 2))[0].tolist() == [1, *[MEDIA] * 12, 2, *[MEDIA] * 2]


def test_without_placeholders_the_same_tensors_come_back() -> None:
    ids, mask = torch.tensor([1, 2]), torch.tensor([1, 1])
    found = _expand_image_tokens(ids, mask, torch.tensor([[1, 2, 2]]), MEDIA)
    assert found[0] is ids
    assert found[1] is mask


@pytest.mark.parametrize("count", [0, 1, 3])
def test_placeholders_and_images_must_agree(count: int) -> None:
    ids = torch.tensor([MEDIA, MEDIA])
    with pytest.raises(ValueError, match=rf"2 image placeholder\(s\) for {count} image\(s\)"):
        _expand_image_tokens(ids, torch.ones(2), torch.ones(count, 3, dtype=torch.int64), MEDIA)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)), max_size=4))
def test_the_text_between_images_stays(grids: list[tuple[int, int, int]]) -> None:
    ids = torch.tensor([token for number in range(len(grids)) for token in (number + 100, MEDIA)] + [200])
    found, mask = _expand_image_tokens(ids, torch.ones(len(ids)), torch.tensor(grids).reshape(-1, 3), MEDIA)
    assert found[found != MEDIA].tolist() == ids[ids != MEDIA].tolist()
    assert int((found == MEDIA).sum()) == sum(h // 2 * (w // 2) for _, h, w in grids)
    assert len(found) == len(mask)


def test_the_placeholder_is_named_or_looked_up_or_the_released_one() -> None:
    class Tokenizer:
        unk_token_id = 1

        def __init__(self, found: int) -> None:
            self.found = found

        def convert_tokens_to_ids(self, token: str) -> int:
            return self.found

    class Processor:
        def __init__(self, found: int) -> None:
            self.tokenizer = Tokenizer(found)

    assert media_token_id(Processor(7)) == 7
    assert media_token_id(Processor(1)) == media_token_id(object()) == 163605
    named = Processor(7)
    named.media_placeholder_token_id = 8  # type: ignore[attr-defined]
    assert media_token_id(named) == 8
