"""NeMo AutoModel's neat packing: its exact bins, packs and batches, and nothing of what it loses on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader

from lightning_vlm.automodel import neat_packing_vlm
from lightning_vlm.automodel.collate_fns import neat_packed_vlm_collater
from lightning_vlm.automodel.neat_packing_vlm import (
    MEDIA_KEYS,
    NeatPackConfig,
    PackedDatasetWrapper,
    _aligned_length,
    _build_packed_vlm_sample,
    _compute_mrope_position_ids,
    _shift_sample,
    greedy_knapsack,
    greedy_knapsack_vt_balanced,
    neat_pack_dataset_vlm,
)
from lightning_vlm.segments import cu_seqlens_from_lengths, document_mask

Dict = dict[str, Any]


def document(length: int, start: int = 10, **more: Any) -> Dict:
    """A sample or a document: tokens and labels that tell where they come from."""
    ids = torch.arange(start, start + length)
    return {"input_ids": ids, "labels": ids + 1000, "attention_mask": torch.ones_like(ids), **more}


def image(rows: int = 2, columns: int = 2, value: float = 0.0) -> Dict:
    return {
        "pixel_values": torch.full((rows * columns, 6), value),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def samples_of(lengths: list[int]) -> list[Dict]:
    """Samples that have these lengths after the shift, all tokens different."""
    return [document(length + 1, 1000 * (index + 1)) for index, length in enumerate(lengths)]


def seen_in(packs: Any) -> list[int]:
    """Indices of `samples_of` in packs."""
    return sorted(
        int(number) // 1000 - 1 for pack in packs for number in pack["input_ids"] if number and not number % 1000
    )


def shifted_pack(*lengths: int, **options: Any) -> Dict:
    documents = [document(length, 10 * (index + 1)) for index, length in enumerate(lengths)]
    return _build_packed_vlm_sample(documents, 99, 0, **options)


# Bins


@pytest.mark.parametrize(
    ("lengths", "capacity", "bins"),
    [
        ([6, 5, 4, 3], 10, [[0, 3], [1, 2]]),
        ([7, 6, 3, 2, 2], 10, [[0, 3], [1, 2], [4]]),
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([], 10, []),
        ([0, 0, 3], 3, [[2, 0, 1]]),
        ([2, 3, 2, 3], 3, [[1], [3], [0], [2]]),
    ],
    ids=str,
)
def test_bins_by_hand(lengths: list[int], capacity: int, bins: list[list[int]]) -> None:
    assert greedy_knapsack(lengths, capacity) == bins


def test_what_fits_no_bin_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert greedy_knapsack([11, 5], 10) == [[1]]
    assert "1 of 2 samples are longer than 10 tokens and in no bin" in caplog.text


def worst_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook without a heap."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        loads = [sum(lengths[i] for i in members) for members in bins]
        if lengths[index] > capacity:
            continue
        if loads and min(loads) + lengths[index] <= capacity:
            bins[loads.index(min(loads))].append(index)
        else:
            bins.append([index])
    return bins


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 30), st.data())
def test_bins_are_the_textbooks_and_sorted_by_vision(lengths: list[int], capacity: int, data: st.DataObject) -> None:
    bins = greedy_knapsack(lengths, capacity)
    assert bins == worst_fit(lengths, capacity)
    assert sorted(i for members in bins for i in members) == [i for i, n in enumerate(lengths) if n <= capacity]
    visual = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    totals = [(sum(visual[i] for i in members), number) for number, members in enumerate(bins)]
    expected = [bins[number] for _, number in sorted(totals)]
    assert greedy_knapsack_vt_balanced(lengths, capacity, visual) == expected


# One sample


@pytest.mark.parametrize(
    ("length", "alignment", "expected"), [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8), (7, 1, 7)], ids=str
)
def test_lengths_are_aligned(length: int, alignment: int, expected: int) -> None:
    assert _aligned_length(length, alignment) == expected


@pytest.mark.parametrize("alignment", [0, -1])
def test_alignment_is_checked(alignment: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        _aligned_length(3, alignment)
    with pytest.raises(ValueError, match="expected at least 1"):
        _build_packed_vlm_sample([], 9, 0, sequence_alignment=alignment)
    with pytest.raises(ValueError, match="expected at least 1"):
        PackedDatasetWrapper([], [], 9, sequence_alignment=alignment)
    with pytest.raises(ValueError, match="expected at least 1"):
        neat_pack_dataset_vlm([], 9, sequence_alignment=alignment)


def test_the_shift_pairs_a_token_with_the_next_label() -> None:
    sample = document(4, mm_token_type_ids=[[0, 1, 1, 0]], position_ids=torch.arange(12).reshape(3, 4), extra=1)
    shifted = _shift_sample({**sample, **image(), "second_per_grid_ts": None})
    assert shifted["input_ids"].tolist() == [10, 11, 12]
    assert shifted["labels"].tolist() == [1011, 1012, 1013]
    assert shifted["attention_mask"].tolist() == [1, 1, 1]
    assert shifted["mm_token_type_ids"].tolist() == [0, 1, 1]
    assert set(shifted) == {
        "input_ids", "labels", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw",
    }  # fmt: skip
    assert _shift_sample(sample, has_mrope=True)["position_ids"].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert "position_ids" not in _shift_sample({**sample, "position_ids": None}, has_mrope=True)


@pytest.mark.parametrize("name", ["input_ids", "labels", "attention_mask"])
def test_the_shift_needs_three_rows(name: str) -> None:
    sample = document(3)
    del sample[name]
    with pytest.raises(KeyError, match=name):
        _shift_sample(sample)


def test_media_are_handed_on_as_they_are() -> None:
    sample = document(3, **{key: torch.zeros(1) for key in MEDIA_KEYS})
    assert all(_shift_sample(sample)[key] is sample[key] for key in MEDIA_KEYS)
    assert len(MEDIA_KEYS) == 6


class Rope:
    """A model as far as mRoPE asks it."""

    config = SimpleNamespace(image_token_id=7, video_token_id=8)

    def get_rope_index(
        self, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Any = None, attention_mask: Any = None
    ) -> tuple[Tensor, None]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return torch.stack([input_ids, mm_token_type_ids, mask]), None


def test_mrope_gets_what_it_names_with_a_batch_axis() -> None:
    sample = {**document(0), "input_ids": torch.tensor([5, 7, 8, 7]), "attention_mask": torch.tensor([1, 1, 1, 0])}
    positions = _compute_mrope_position_ids(sample, Rope().get_rope_index)
    assert positions is not None
    assert positions.tolist() == [[5, 7, 8, 7], [0, 1, 2, 1], [1, 1, 1, 0]]
    own = _compute_mrope_position_ids({**sample, "mm_token_type_ids": [3, 3, 3, 3]}, Rope().get_rope_index)
    assert own is not None
    assert own[1].tolist() == [3, 3, 3, 3]


def test_mrope_takes_rows_with_a_batch_axis_and_flat_positions() -> None:
    def flat(input_ids: Tensor, **rest: Any) -> tuple[Tensor, int]:
        assert not rest
        return input_ids.expand(3, -1), 0

    positions = _compute_mrope_position_ids({"input_ids": torch.tensor([[4, 5]]), "video_grid_thw": 1}, flat)
    assert positions is not None
    assert positions.tolist() == [[4, 5]] * 3


@pytest.mark.parametrize("function", [lambda tokens: tokens, 3, lambda input_ids: (None, None), lambda input_ids: None])
def test_mrope_may_not_apply(function: Any) -> None:
    assert _compute_mrope_position_ids(document(2), function) is None


# One pack


def test_a_pack_by_hand() -> None:
    first = document(3, 10, mm_token_type_ids=torch.tensor([0, 1, 1]), **image())
    second = document(2, 20, pixel_values_videos=torch.ones(8, 6), video_grid_thw=torch.tensor([[2, 2, 2]]))
    pack = _build_packed_vlm_sample([first, document(0), second], 99, 7, sequence_alignment=4)
    assert pack["input_ids"].tolist() == [10, 11, 12, 7, 20, 21, 7, 7]
    assert pack["labels"].tolist() == [1010, 1011, 1012, -100, 1020, 1021, -100, -100]
    assert pack["attention_mask"].tolist() == [1, 1, 1, 1, 3, 3, 3, 3], "an empty document has a number too"
    assert pack["mm_token_type_ids"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert pack["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (pack["seq_lens"], pack["seq_lens_padded"]) == ([3, 0, 2], [4, 0, 4])
    assert (pack["n_images"], pack["n_videos"]) == (1, 1)
    assert torch.equal(pack["pixel_values"], first["pixel_values"])
    assert torch.equal(pack["video_grid_thw"], second["video_grid_thw"])
    assert pack["second_per_grid_ts"] is pack["image_position_ids"] is None
    rows = ("input_ids", "labels", "attention_mask", "mm_token_type_ids", "position_ids")
    assert {pack[name].dtype for name in rows} == {torch.int64}


def test_a_pack_of_nothing() -> None:
    pack = _build_packed_vlm_sample([], 99, 7)
    assert pack["input_ids"].shape == pack["position_ids"].shape == (0,)
    assert pack["seq_lens"] == []
    empty = _build_packed_vlm_sample([document(0)], 99, 7, has_mrope=True)
    assert empty["position_ids"].shape == (3, 0)
    assert empty["seq_lens"] == [0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=6), st.integers(1, 5))
def test_documents_are_found_again_in_their_pack(lengths: list[int], alignment: int) -> None:
    documents = [document(length, 100 * index) for index, length in enumerate(lengths)]
    pack = _build_packed_vlm_sample(documents, 99, -1, sequence_alignment=alignment)
    start = 0
    for item, length, padded in zip(documents, lengths, pack["seq_lens_padded"]):
        assert torch.equal(pack["input_ids"][start : start + length], item["input_ids"])
        assert torch.equal(pack["labels"][start : start + length], item["labels"])
        assert pack["position_ids"][start : start + padded].tolist() == list(range(padded))
        start += padded
    assert start == len(pack["input_ids"]) == len(pack["labels"])
    assert all(padded % alignment == 0 for padded in pack["seq_lens_padded"])


def test_hidden_tokens_of_a_fake_image_stay_hidden() -> None:
    """NeMo AutoModel makes [1, 1, 1, 1] of it, and text attends to the fake image."""
    fake = document(4, attention_mask=torch.tensor([1, 0, 0, 1]))
    pack = _build_packed_vlm_sample([fake, document(2)], 99, 0)
    assert pack["attention_mask"].tolist() == [1, 0, 0, 1, 2, 2]
    assert pack["position_ids"].tolist() == [0, 1, 2, 3, 0, 1], "the document goes on behind them"


def test_documents_without_mrope_positions_get_those_of_text() -> None:
    block = torch.tensor([[0, 1], [0, 2], [0, 3]])
    pack = _build_packed_vlm_sample([document(3), document(2, position_ids=block)], 99, 0, has_mrope=True)
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 2], [0, 1, 2, 0, 3]]


def test_positions_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has media but no position_ids"):
        _build_packed_vlm_sample([document(2), document(3, **image())], 99, 0, has_mrope=True)
    with pytest.raises(ValueError, match="document 0 has 2 positions for 3 tokens"):
        _build_packed_vlm_sample([document(3, position_ids=torch.zeros(3, 2))], 99, 0, has_mrope=True)
    with pytest.raises(NotImplementedError, match="mRoPE"):
        _build_packed_vlm_sample([document(2)], 99, 0, has_mrope=True, sequence_alignment=2)


def test_images_are_a_tensor_or_a_list_and_may_be_both() -> None:
    def packed(*pixels: Any) -> Any:
        return _build_packed_vlm_sample([document(2, pixel_values=p) for p in pixels], 99, 0)["pixel_values"]

    small, large = torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 8, 8)
    assert packed(small, small).shape == (4, 3, 4, 4)
    assert [tuple(p.shape) for p in packed([small[0]], (large[0],))] == [(3, 4, 4), (3, 8, 8)]
    assert [tuple(p.shape) for p in packed(small, [large[0]])] == [(3, 4, 4), (3, 4, 4), (3, 8, 8)]
    assert [tuple(p.shape) for p in packed(small, large)] == [(3, 4, 4), (3, 4, 4), (3, 8, 8)]
    with pytest.raises(TypeError, match=r"pixel_values of the samples do not go together: \[\(4, 6\), 'list'\]"):
        packed(torch.zeros(4, 6), [small[0]])


def test_media_of_other_models_survive() -> None:
    """NeMo AutoModel's packing drops them, so Nemotron Omni trains on text alone."""

    def omni(images: int, frames: int) -> Dict:
        return {
            "pixel_values": torch.zeros(images, 3, 4, 4),
            "image_flags": torch.ones(images, 1, dtype=torch.long),
            "imgs_sizes": torch.full((images, 2), 4),
            "sound_features": torch.ones(1, frames, 5),
            "sound_attention_mask": torch.ones(1, frames, dtype=torch.long),
        }

    samples = [
        _shift_sample(document(5, **omni(2, 3))),
        _shift_sample(document(4)),
        _shift_sample(document(3, **omni(1, 6))),
    ]
    pack = _build_packed_vlm_sample(samples, 99, 0)
    assert pack["n_images"] == 3
    assert pack["image_flags"].shape == (3, 1)
    assert pack["imgs_sizes"].shape == (3, 2)
    assert pack["sound_features"].shape == (2, 6, 5)
    assert pack["sound_attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert pack["sound_features"].sum((1, 2)).tolist() == [15, 30]
    batch = neat_packed_vlm_collater([pack, shifted_pack(2)])
    assert batch["image_flags"].shape == (3, 1)
    assert batch["n_images_per_sample"].tolist() == [3, 0]


# Batches


def test_no_packs_are_no_batch() -> None:
    assert neat_packed_vlm_collater([]) == {}


@pytest.mark.parametrize("max_length", [None, 8])
def test_rows_are_padded(max_length: int | None) -> None:
    packs = [shifted_pack(2, 3), shifted_pack(4)]
    batch = neat_packed_vlm_collater(packs, 9, max_length, "flash_attention_2")
    width = max_length or 5
    for row, pack in enumerate(packs):
        length = len(pack["input_ids"])
        for name, value in [("input_ids", 9), ("labels", -100), ("attention_mask", 0), ("position_ids", 0)]:
            assert batch[name].shape == (2, width)
            assert torch.equal(batch[name][row, :length], pack[name])
            assert (batch[name][row, length:] == value).all()
    assert batch["mm_token_type_ids"].shape == (2, width)
    assert not {"pixel_values", "n_images_per_sample", "n_videos_per_sample"} & set(batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "te", None])
@pytest.mark.parametrize("lengths", [(2, 3), (4,), (1, 0, 2)], ids=str)
def test_the_dense_mask_is_that_of_the_documents(lengths: tuple[int, ...], attention: Any) -> None:
    batch = neat_packed_vlm_collater([shifted_pack(*lengths), shifted_pack(6)], attn_implementation=attention)
    mask, total = batch["attention_mask"], sum(lengths)
    assert mask.shape == (2, 1, 6, 6)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[0, 0, :total, :total], document_mask(cu_seqlens_from_lengths(lengths)))
    assert not mask[0, 0, total:].any()
    assert not mask[0, 0, :, total:].any()


@pytest.mark.parametrize(
    ("attention", "dense"),
    [("flash_attention_2", True), ("flash_attention_3", True), ("flash_attention_4", True), ("sdpa", False)],
)
def test_the_compact_mask_holds_document_numbers(attention: str, dense: bool) -> None:
    batch = neat_packed_vlm_collater([shifted_pack(2, 3), shifted_pack(1)], 0, 6, attention, dense)
    assert batch["attention_mask"].tolist() == [[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.equal(batch["attention_mask"], batch["_packed_seq_ids"])


def test_packs_of_one_document_keep_their_numbers() -> None:
    """NeMo AutoModel leaves them out, and Nemotron-H then multiplies by a mask of four axes."""
    batch = neat_packed_vlm_collater([shifted_pack(3), shifted_pack(2)])
    assert batch["_packed_seq_ids"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("lengths_known", [True, False], ids=["ours", "from elsewhere"])
def test_hidden_tokens_are_not_attended_to_and_do_not_split_their_document(lengths_known: bool) -> None:
    pack = _build_packed_vlm_sample([document(4, attention_mask=torch.tensor([1, 0, 0, 1])), document(1)], 99, 0)
    if not lengths_known:
        del pack["seq_lens_padded"]
    batch = neat_packed_vlm_collater([pack], max_length=6)
    assert batch["_packed_seq_ids"].tolist() == [[1, 1, 1, 1, 2, 0]]
    seen = {(query, key) for query, key in batch["attention_mask"][0, 0].nonzero().tolist()}
    assert seen == {(0, 0), (3, 0), (3, 3), (4, 4)}


def test_documents_may_begin_and_end_hidden() -> None:
    masks = ([1, 0], [0, 1], [1, 0])
    documents = [document(2, attention_mask=torch.tensor(mask)) for mask in masks]
    batch = neat_packed_vlm_collater([_build_packed_vlm_sample(documents, 99, 0)], max_length=7)
    assert batch["_packed_seq_ids"].tolist() == [[1, 1, 2, 2, 3, 3, 0]]
    assert batch["attention_mask"][0, 0].nonzero().tolist() == [[0, 0], [3, 3], [4, 4]]


def test_padding_that_a_pack_brings_along_is_padding() -> None:
    pack = {name: torch.nn.functional.pad(shifted_pack(2, 1)[name], (0, 2)) for name in ("input_ids", "position_ids")}
    pack |= {"labels": pack["input_ids"], "attention_mask": torch.tensor([1, 1, 2, 0, 0]), "seq_lens_padded": [2, 1]}
    assert neat_packed_vlm_collater([pack])["_packed_seq_ids"].tolist() == [[1, 1, 2, 0, 0]]
    del pack["seq_lens_padded"]
    assert neat_packed_vlm_collater([pack])["_packed_seq_ids"].tolist() == [[1, 1, 2, 0, 0]]
    pack |= {"attention_mask": torch.zeros(5, dtype=torch.long)}
    assert not neat_packed_vlm_collater([pack])["attention_mask"].any()


def test_a_pack_over_max_length_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="a pack has 5 tokens, more than max_length 4"):
        neat_packed_vlm_collater([shifted_pack(5)], max_length=4)


def test_positions_of_three_axes_take_text_packs_along() -> None:
    rope = shifted_pack(2, has_mrope=True)
    batch = neat_packed_vlm_collater([shifted_pack(1, 2), rope])
    assert batch["position_ids"].shape == (3, 2, 3)
    assert batch["position_ids"][:, 0].tolist() == [[0, 0, 1]] * 3
    assert neat_packed_vlm_collater([shifted_pack(1)])["position_ids"].shape == (1, 1)


def test_media_are_joined_in_bfloat16_and_counted() -> None:
    packs = [
        _build_packed_vlm_sample([document(2, **image(value=1)), document(2, **image(2, 4, value=2))], 99, 0),
        shifted_pack(3),
        _build_packed_vlm_sample([document(2, second_per_grid_ts=[0.5], video_grid_thw=torch.ones(1, 3))], 99, 0),
    ]
    batch = neat_packed_vlm_collater(packs)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["pixel_values"][:, 0].tolist() == [1] * 4 + [2] * 8
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    assert batch["n_images_per_sample"].tolist() == [2, 0, 0]
    assert batch["n_videos_per_sample"].tolist() == [0, 0, 1]
    assert batch["second_per_grid_ts"].tolist() == [0.5]
    lists = [_build_packed_vlm_sample([document(2, pixel_values=[torch.ones(3, s, s)])], 99, 0) for s in (4, 8)]
    images = neat_packed_vlm_collater(lists)["pixel_values"]
    assert [(tuple(item.shape), item.dtype) for item in images] == [
        ((3, 4, 4), torch.bfloat16),
        ((3, 8, 8), torch.bfloat16),
    ]


# Packs that are made when they are asked for


def test_packs_are_those_of_their_bins() -> None:
    packed = PackedDatasetWrapper(samples_of([2, 3, 4, 1]), [[2, 0], [1, 3]], 9)
    assert len(packed) == 2
    assert packed[0]["input_ids"].tolist() == [3000, 3001, 3002, 3003, 1000, 1001]
    assert packed[0]["labels"].tolist() == [4001, 4002, 4003, 4004, 2001, 2002]
    assert packed[-1]["seq_lens"] == [3, 1]
    assert [pack["seq_lens"] for pack in packed] == [[4, 2], [3, 1]], "the IndexError of the bins ends a loop"
    assert packed.measured.tolist() == [2, 3, 4, 1]


def test_a_sample_is_not_written_to() -> None:
    samples = samples_of([3])
    keys = set(samples[0])

    def rope(input_ids: Tensor) -> tuple[Tensor, int]:
        return input_ids.expand(3, 1, -1), 0

    pack = PackedDatasetWrapper(samples, [[0]], 9, get_rope_index=rope)[0]
    assert pack["position_ids"].tolist() == [[1000, 1001, 1002]] * 3
    assert set(samples[0]) == keys


def test_what_overflows_is_counted_and_packed_again(caplog: pytest.LogCaptureFixture) -> None:
    packed = PackedDatasetWrapper(samples_of([4, 5, 3, 2, 6]), [[0, 1, 2], [3], [4]], 8)
    with caplog.at_level(logging.WARNING):
        packs = list(packed)
    assert packs[0]["seq_lens"] == [4, 3], "a later document may still fit"
    assert packed.overflowed == [1]
    assert "no room in their packs for 1 sample(s) so far, the last being 1 of pack 0" in caplog.text
    new = packed.requeue()
    assert new == range(3, 4)
    assert packed.bins == [[0, 2], [3], [4], [1]]
    assert seen_in(packs + [packed[number] for number in new]) == [0, 1, 2, 3, 4]
    assert seen_in(packed) == [0, 1, 2, 3, 4]
    assert packed.overflowed == [], "the next epoch has room for all"
    assert packed.requeue() == range(4, 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=25), st.sampled_from([1, 4]))
def test_nothing_is_lost_in_an_epoch_with_requeue(guesses: list[tuple[int, int]], alignment: int) -> None:
    """Whatever the estimates: every sample that fits a pack comes, and no pack is over its size."""
    lengths = [length for length, _ in guesses]
    packed = PackedDatasetWrapper(
        samples_of(lengths), greedy_knapsack([guess for _, guess in guesses], 12), 12, sequence_alignment=alignment
    )
    fits = [index for index, length in enumerate(lengths) if length <= 12]
    if not fits:
        return
    packed.max_retries = len(packed)
    packs = list(packed)
    assert packed.too_long == [index for index in range(len(lengths)) if index not in fits]
    trained = seen_in(packs)
    assert sorted(set(trained) | set(packed.overflowed)) == fits
    packs += [packed[number] for number in packed.requeue()]
    assert sorted(set(seen_in(packs))) == fits
    assert seen_in(packed) == fits, "once each, from the second epoch on"
    assert not packed.overflowed
    assert all(0 < sum(pack["seq_lens_padded"]) <= 12 for pack in [*packs, *packed])


def test_what_fits_no_pack_is_named_and_its_bin_gives_the_next(caplog: pytest.LogCaptureFixture) -> None:
    packed = PackedDatasetWrapper(samples_of([9, 3, 20]), [[0], [2], [1]], 8)
    with caplog.at_level(logging.WARNING):
        packs = list(packed)
    assert [pack["seq_lens"] for pack in packs] == [[3]] * 3, "never a pack of padding alone"
    assert packed.too_long == [0, 2]
    assert "sample 0 has 9 tokens, more than pack_size 8" in caplog.text
    assert "pack 0 is empty: the pack 2 bins after it is given instead" in caplog.text
    assert packed.requeue() == range(1, 1)
    assert packed.bins == [[1]]


@pytest.mark.parametrize("lengths", [[9, 20], [0, 0]], ids=["too long", "empty"])
def test_a_dataset_of_which_nothing_fits_is_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"pack 0 is empty.*no sample fits pack_size 8"):
        PackedDatasetWrapper(samples_of(lengths), [[0], [1]], 8)[0]


def test_the_aligned_length_is_what_counts() -> None:
    packed = PackedDatasetWrapper(samples_of([5, 1]), [[0, 1]], 8, sequence_alignment=8)
    assert packed[0]["seq_lens_padded"] == [8]
    assert packed.overflowed == [1]
    packed = PackedDatasetWrapper(samples_of([7, 1]), [[0, 1]], 7, sequence_alignment=2)
    assert packed[0]["seq_lens"] == [1]
    assert packed.too_long == [0]


def test_workers_report_to_the_main_process() -> None:
    packed = PackedDatasetWrapper(samples_of([4, 5, 20, 3]), [[0, 1], [2, 3]], 8)
    loader = DataLoader(packed, batch_size=1, collate_fn=neat_packed_vlm_collater, num_workers=1)
    assert [batch["input_ids"].shape for batch in loader] == [(1, 4), (1, 3)]
    assert packed.overflowed == [1]
    assert packed.too_long == [2]
    assert packed.measured.tolist() == [4, 5, 20, 3]


def test_a_sample_that_ends_in_a_media_token_keeps_it() -> None:
    """The plain shift would drop the token, and the image would have a feature too many."""
    sample = document(4, mm_token_type_ids=torch.tensor([[0, 0, 1, 1]]), **image())
    pack = PackedDatasetWrapper([sample], [[0]], 9, padding_idx=5)[0]
    assert pack["input_ids"].tolist() == [10, 11, 12, 13]
    assert pack["labels"].tolist() == [1011, 1012, 1013, -100]
    assert pack["mm_token_type_ids"].tolist() == [0, 0, 1, 1]
    rope = PackedDatasetWrapper([sample], [[0]], 9, get_rope_index=Rope().get_rope_index)[0]
    assert rope["position_ids"].shape == (3, 4)


class Flaky:
    """Fails a number of times, then reads."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.reads = error, times, 0

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Dict:
        self.reads += 1
        if self.reads <= self.times:
            raise self.error
        return document(3)


def test_reading_is_tried_again_only_where_that_may_help() -> None:
    inner = Flaky(OSError("stale handle"), 2)
    assert PackedDatasetWrapper(inner, [[0]], 9, max_retries=3)[0]["seq_lens"] == [2]
    assert inner.reads == 3
    with pytest.raises(RuntimeError, match="sample 0 of pack 0 cannot be read") as caught:
        PackedDatasetWrapper(Flaky(OSError("gone"), 9), [[0]], 9, max_retries=3)[0]
    assert str(caught.value.__cause__) == "gone"
    inner = Flaky(ValueError("bad row"), 9)
    with pytest.raises(ValueError, match="bad row"):
        PackedDatasetWrapper(inner, [[0]], 9)[0]
    assert inner.reads == 1


def test_an_index_error_below_does_not_end_the_loop_over_packs() -> None:
    with pytest.raises(RuntimeError, match="sample 0 of pack 0 cannot be read: too far"):
        list(PackedDatasetWrapper(Flaky(IndexError("too far"), 9), [[0]], 9))


@pytest.mark.parametrize("index", [-1, 2])
def test_bins_are_checked_against_the_dataset(index: int) -> None:
    with pytest.raises(ValueError, match=f"bins hold index {index}, but the dataset has 2 samples"):
        PackedDatasetWrapper(samples_of([1, 1]), [[0], [index]], 9)


def test_mrope_excludes_alignment_and_is_a_function() -> None:
    with pytest.raises(NotImplementedError, match="mRoPE"):
        PackedDatasetWrapper([], [], 9, get_rope_index=Rope().get_rope_index, sequence_alignment=2)
    with pytest.raises(TypeError, match="get_rope_index is 4; expected a function"):
        PackedDatasetWrapper([], [], 9, 0, 4)  # type: ignore[arg-type]


# A collate function that survives a bad pack


def summing(bad: set[int], calls: list[int] | None = None) -> Callable[[list[Dict]], list[int]]:
    def collate(packs: list[Dict]) -> list[int]:
        if calls is not None:
            calls.append(len(packs))
        if wrong := bad & set(seen_in(packs)):
            raise ValueError(f"cannot use {min(wrong)}")
        return seen_in(packs)

    return collate


def test_a_robust_collate_changes_nothing_that_works() -> None:
    packed = PackedDatasetWrapper(samples_of([2] * 4), [[0], [1], [2], [3]], 8)
    calls: list[int] = []
    assert packed.robust_collate(summing(set(), calls))([packed[0], packed[2]]) == [0, 2]
    assert calls == [2]


def test_only_the_bad_pack_is_replaced_by_a_pack_and_always_the_same(caplog: pytest.LogCaptureFixture) -> None:
    packed = PackedDatasetWrapper(samples_of([2] * 9), [[index] for index in range(9)], 8)
    batch = [packed[0], packed[4], packed[2]]
    with caplog.at_level(logging.WARNING):
        results = [packed.robust_collate(summing({4}))(batch) for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert {0, 2} <= set(results[0])
    assert len(results[0]) == 3
    assert "1 of 3 packs are replaced, collating failed: cannot use 4" in caplog.text
    assert seen_in(batch) == [0, 2, 4], "the caller's list is left alone"
    instead = {packed.robust_collate(summing({bad}))([packed[bad]])[0] for bad in range(9)}
    assert len(instead) > 2, "not the same pack for all"


def test_a_robust_collate_gives_up_with_the_reason() -> None:
    packed = PackedDatasetWrapper(samples_of([2] * 3), [[0], [1], [2]], 8, max_retries=4)
    with pytest.raises(RuntimeError, match=r"Collate failed after 4 retries. Last error: cannot use") as caught:
        packed.robust_collate(summing({0, 1, 2}))([packed[0]])
    assert isinstance(caught.value.__cause__, ValueError)

    def together(packs: list[Dict]) -> None:
        if len(packs) > 1:
            raise KeyError("mixed")

    with pytest.raises(RuntimeError, match=r"Collate failed after 1 retries\. Last error: 'mixed'"):
        packed.robust_collate(together)([packed[0], packed[1]])


# The plan


def raw(lengths: list[int], media: list[int] | None = None) -> list[Dict]:
    """Rows that are estimated at these lengths after the shift."""
    counts = media or [0] * len(lengths)
    return [{"_text_tokens": n + 1 - m, "_media_tokens": m} for n, m in zip(lengths, counts)]


def test_a_plan_from_estimates() -> None:
    lengths = [6, 5, 4, 3]
    packed = neat_pack_dataset_vlm(samples_of(lengths), 10, 7, ds_raw=raw(lengths))
    assert packed.bins == [[0, 3], [1, 2]]
    assert (packed.pack_size, packed.padding_idx, packed.sequence_alignment) == (10, 7, 1)
    assert packed.left_out == {"estimated_too_long": [], "beyond_max_packs": []}
    assert seen_in(packed) == [0, 1, 2, 3]


def test_packs_with_media_are_sorted_unless_told_otherwise() -> None:
    lengths, media = [6, 6, 6], [4, 0, 2]

    def bins(**options: Any) -> list[list[int]]:
        return neat_pack_dataset_vlm(samples_of(lengths), 6, ds_raw=raw(lengths, media), **options).bins

    assert bins() == [[1], [2], [0]]
    assert bins(balance_media_tokens=False) == [[0], [1], [2]]
    assert bins(max_packs=2) == [[1], [2]], "those with the fewest visual tokens"


def test_too_long_by_estimate(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [4, 30, 4, 11]
    kept = neat_pack_dataset_vlm(samples_of(lengths), 10, ds_raw=raw(lengths))
    assert kept.bins == [[1], [3], [0, 2]], "each has a pack of its own: the estimate may be too high"
    with caplog.at_level(logging.WARNING):
        dropped = neat_pack_dataset_vlm(samples_of(lengths), 10, ds_raw=raw(lengths), drop_long_samples=True)
    assert dropped.bins == [[0, 2]]
    assert dropped.left_out["estimated_too_long"] == [1, 3]
    assert "2 of 4 samples are in no pack (estimated_too_long)" in caplog.text


def test_max_packs_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        packed = neat_pack_dataset_vlm(samples_of([8, 7, 6]), 8, ds_raw=raw([8, 7, 6]), max_packs=1)
    assert packed.bins == [[0]]
    assert packed.left_out["beyond_max_packs"] == [1, 2]
    assert "2 of 3 samples are in no pack (beyond_max_packs)" in caplog.text
    assert neat_pack_dataset_vlm(samples_of([8]), 8, ds_raw=raw([8]), max_packs=0).bins == []


def test_a_ratio_leaves_room_for_errors() -> None:
    packed = neat_pack_dataset_vlm(samples_of([5, 5]), 10, ds_raw=raw([5, 5]), packing_ratio=0.95)
    assert packed.bins == [[0], [1]]
    assert packed.pack_size == 10
    full = neat_pack_dataset_vlm(samples_of([10]), 10, ds_raw=raw([10]), packing_ratio=0.5, drop_long_samples=True)
    assert full.bins == [[0]], "over the ratio is not over the pack"


def test_estimates_are_aligned() -> None:
    lengths = [5, 3]
    assert neat_pack_dataset_vlm(samples_of(lengths), 8, ds_raw=raw(lengths)).bins == [[0, 1]]
    packed = neat_pack_dataset_vlm(samples_of(lengths), 8, ds_raw=raw(lengths), sequence_alignment=4)
    assert packed.bins == [[0], [1]]
    assert packed[0]["seq_lens_padded"] == [8]


def test_without_rows_two_samples_share_a_pack() -> None:
    assert neat_pack_dataset_vlm(samples_of([1] * 5), 10).bins == [[0, 1], [2, 3], [4]]
    aligned = neat_pack_dataset_vlm(samples_of([1] * 2), 10, sequence_alignment=8)
    assert aligned.bins == [[0], [1]]


@pytest.mark.parametrize("rows", [None, []])
def test_no_data_are_no_packs(rows: Any) -> None:
    assert len(neat_pack_dataset_vlm([], 10, ds_raw=rows)) == 0


def test_empty_rows_are_planned() -> None:
    packed = neat_pack_dataset_vlm(samples_of([1, 2]), 8, ds_raw=[{}, {"conversation": []}])
    assert packed.bins == [[0, 1]]


def test_a_plan_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pack_size 10 and packing_ratio 0\.05 leave no room"):
        neat_pack_dataset_vlm([], 10, packing_ratio=0.05)
    with pytest.raises(ValueError, match="ds_raw has 1 rows for 2 samples"):
        neat_pack_dataset_vlm(samples_of([1, 1]), 10, ds_raw=raw([1]))
    with pytest.raises(NotImplementedError, match="mRoPE"):
        neat_pack_dataset_vlm([], 10, get_rope_index=Rope().get_rope_index, sequence_alignment=2)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    ratio=st.sampled_from([1.0, 0.9, 0.5]),
    drop=st.booleans(),
    max_packs=st.none() | st.integers(0, 4),
)
def test_every_sample_is_in_a_pack_or_left_out_by_name(
    lengths: list[int], ratio: float, drop: bool, max_packs: int | None
) -> None:
    packed = neat_pack_dataset_vlm(
        samples_of(lengths), 20, ds_raw=raw(lengths), packing_ratio=ratio, drop_long_samples=drop, max_packs=max_packs
    )
    planned = [index for members in packed.bins for index in members]
    left_out = [index for indices in packed.left_out.values() for index in indices]
    assert sorted(planned + left_out) == list(range(len(lengths)))


# The options


def test_options_have_nemos_defaults() -> None:
    config = NeatPackConfig()
    assert (config.pack_size, config.packing_ratio, config.packing_format) == (2048, 1.0, "neat")
    assert not config.drop_long_samples
    assert config.balance_media_tokens
    assert config.max_packs is config.collate_max_length is config.attn_implementation is None


def test_options_reach_the_plan() -> None:
    lengths, media = [6, 6, 6, 30], [4, 0, 2, 0]
    config = NeatPackConfig(pack_size=7, drop_long_samples=True, max_packs=2, packing_ratio=0.9)
    data = {"dataset": samples_of(lengths), "padding_idx": 3, "ds_raw": raw(lengths, media)}
    packed = config.build(**data)
    assert packed.bins == [[1], [2]]
    assert packed.left_out == {"estimated_too_long": [3], "beyond_max_packs": [0]}
    assert (packed.pack_size, packed.padding_idx) == (7, 3)
    assert NeatPackConfig(pack_size=7, balance_media_tokens=False).build(**data).bins[:2] == [[3], [0]]
    assert config.build(**data, get_rope_index=Rope().get_rope_index).has_mrope


@pytest.mark.parametrize(
    ("packing_format", "cp_size", "alignment"), [("neat", 4, 1), ("thd", 1, 1), ("thd", 2, 4)], ids=str
)
def test_documents_are_aligned_for_context_parallelism(packing_format: Any, cp_size: int, alignment: int) -> None:
    config = NeatPackConfig(packing_format=packing_format, collate_max_length=8)
    assert config.build(dataset=[], padding_idx=0, cp_size=cp_size).sequence_alignment == alignment


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="packing_format is 'bshd'"):
        NeatPackConfig(packing_format="bshd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cp_size is 0"):
        NeatPackConfig().build(dataset=[], padding_idx=0, cp_size=0)
    thd = NeatPackConfig(packing_format="thd", collate_max_length=6)
    with pytest.raises(NotImplementedError, match="mRoPE"):
        thd.build(dataset=[], padding_idx=0, cp_size=2, get_rope_index=Rope().get_rope_index)
    with pytest.raises(ValueError, match="collate_max_length is 6; expected a multiple of 4"):
        thd.build(dataset=[], padding_idx=0, cp_size=2)


def test_all_names_of_nemos_module_are_here() -> None:
    assert all(hasattr(neat_packing_vlm, name) for name in neat_packing_vlm.__all__)


def _requeue_on_rank(rank: int, path: str, shard: bool, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    lengths = [5, 5, 5, 5]
    bins = [[0, 1], [2, 3]] if not shard or rank == 0 else [[1, 0], [2, 3]]
    packed = PackedDatasetWrapper(samples_of(lengths), bins, 8)
    packed[rank]  # each rank makes its share of the packs
    packed.requeue()
    results.put((rank, packed.bins))
    dist.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True], ids=["one plan", "a plan each"])
def test_ranks_of_one_plan_requeue_alike(shard: bool, tmp_path: Path) -> None:
    context = get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_requeue_on_rank, args=(rank, str(tmp_path / "store"), shard, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    bins = dict(results.get() for _ in processes)
    if shard:
        assert bins == {0: [[0], [2, 3], [1]], 1: [[1, 0], [2], [3]]}
    else:
        assert bins == {0: [[0], [2], [1], [3]], 1: [[0], [2], [1], [3]]}
