"""Packs for attention by document lengths (``thd``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.automodel.collate_fns import packed_sequence_thd_vlm_collater
from lightning_vlm.automodel.neat_samples import _build_packed_vlm_sample

Dict = dict[str, Any]


def pack(*lengths: int, alignment: int = 1, **more: Any) -> Dict:
    documents = [
        {"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1), "attention_mask": torch.ones(n)} | more
        for n in lengths
    ]
    return _build_packed_vlm_sample(documents, 99, 0, sequence_alignment=alignment)


def test_the_worked_example() -> None:
    batch = packed_sequence_thd_vlm_collater([pack(2, 3), pack(3)], max_length=8)
    assert batch["seq_lens"].tolist() == [[2, 3], [3, -1000]]
    assert batch["seq_lens_padded"].tolist() == [[2, 6], [8, -1000]]
    assert batch["qkv_format"] == "thd"
    assert batch["input_ids"].tolist() == [[1, 2, 1, 2, 3, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [1, 2, 3, *[-100] * 5]
    assert batch["position_ids"].shape == (2, 8)
    assert not {"attention_mask", "mm_token_type_ids", "_packed_seq_ids"} & set(batch)


def test_no_packs_are_no_batch() -> None:
    assert packed_sequence_thd_vlm_collater([]) == {}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.sampled_from([1, 2, 4])
)
def test_slots_cover_every_row(packs: list[list[int]], alignment: int) -> None:
    batch = packed_sequence_thd_vlm_collater([pack(*lengths, alignment=alignment) for lengths in packs])
    width = batch["input_ids"].shape[1]
    for lengths, real, slots in zip(packs, batch["seq_lens"].tolist(), batch["seq_lens_padded"].tolist()):
        assert [length for length in real if length != -1000] == lengths
        kept = [slot for slot in slots if slot != -1000]
        assert sum(kept) == width
        assert all(slot % alignment == 0 for slot in kept[:-1])


def without(made: Dict, *keys: str) -> Dict:
    return {key: value for key, value in made.items() if key not in keys}


def test_lengths_may_be_those_of_the_mask() -> None:
    made = without(pack(2, 3), "seq_lens", "seq_lens_padded")
    assert packed_sequence_thd_vlm_collater([made], max_length=7)["seq_lens_padded"].tolist() == [[2, 5]]
    hidden = {**made, "attention_mask": torch.zeros(5, dtype=torch.int64)}
    assert packed_sequence_thd_vlm_collater([hidden])["seq_lens"].tolist() == [[5]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seq_lens": [2]}, r"seq_lens \[2\] and seq_lens_padded \[2, 3\] are not those of a pack of 5 tokens"),
        ({"seq_lens": [3, 3]}, "not those"),
        ({"seq_lens_padded": [2, 4]}, "not those"),
        ({"seq_lens": [-1, 3]}, "not those"),
        ({"seq_lens": None}, "a pack has one of seq_lens and seq_lens_padded"),
    ],
)
def test_lengths_that_cannot_be_are_refused(change: Dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        packed_sequence_thd_vlm_collater([{**pack(2, 3), **change}])


def test_a_pack_over_the_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="a pack has 5 tokens, more than max_length 4"):
        packed_sequence_thd_vlm_collater([pack(2, 3)], max_length=4)


def test_media_and_their_counts_come_along() -> None:
    """Defect 2B.9: without counts a batch cannot be split for a pipeline."""
    made = [pack(2, pixel_values=torch.ones(4, 6), image_grid_thw=torch.tensor([[1, 2, 2]])), pack(3)]
    batch = packed_sequence_thd_vlm_collater(made)
    assert batch["n_images_per_sample"].tolist() == [1, 0]
    assert batch["pixel_values"].dtype == torch.bfloat16
    made = [{**pack(2), "position_ids": torch.zeros(3, 2, dtype=torch.int64)}, pack(3)]
    assert packed_sequence_thd_vlm_collater(made)["position_ids"].shape == (3, 2, 3)
