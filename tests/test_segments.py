"""Document boundaries: each representation is the others, and the mask is the plain double loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.segments import (
    cu_seqlens_from_lengths,
    cu_seqlens_from_position_ids,
    cu_seqlens_from_seq_idx,
    document_mask,
    documents_from_cu_seqlens,
    documents_from_lengths,
    documents_from_rows,
    lengths_from_cu_seqlens,
    position_ids_from_cu_seqlens,
    seq_idx_from_cu_seqlens,
)

any_lengths = st.lists(st.integers(0, 9), max_size=12)
owning_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def test_three_documents_by_hand() -> None:
    cu_seqlens = cu_seqlens_from_lengths([3, 1, 2])
    assert cu_seqlens.tolist() == [0, 3, 4, 6]
    assert lengths_from_cu_seqlens(cu_seqlens).tolist() == [3, 1, 2]
    assert seq_idx_from_cu_seqlens(cu_seqlens).tolist() == [0, 0, 0, 1, 2, 2]
    assert position_ids_from_cu_seqlens(cu_seqlens).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_row_without_tokens_is_legal(lengths: list[int]) -> None:
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    assert cu_seqlens.tolist() == [0] * (len(lengths) + 1)
    assert seq_idx_from_cu_seqlens(cu_seqlens).shape == (0,)
    assert position_ids_from_cu_seqlens(cu_seqlens).shape == (0,)
    assert document_mask(cu_seqlens).shape == (0, 0)


def test_zero_length_document_owns_no_token_and_keeps_its_number() -> None:
    cu_seqlens = cu_seqlens_from_lengths([2, 0, 1])
    assert cu_seqlens.tolist() == [0, 2, 2, 3]
    assert seq_idx_from_cu_seqlens(cu_seqlens).tolist() == [0, 0, 2]
    assert position_ids_from_cu_seqlens(cu_seqlens).tolist() == [0, 1, 0]


@settings(max_examples=100, deadline=None)
@given(any_lengths)
def test_lengths_survive_the_round_trip(lengths: list[int]) -> None:
    assert lengths_from_cu_seqlens(cu_seqlens_from_lengths(lengths)).tolist() == lengths


@settings(max_examples=100, deadline=None)
@given(owning_lengths)
def test_boundaries_survive_seq_idx_and_position_ids(lengths: list[int]) -> None:
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    assert torch.equal(cu_seqlens_from_seq_idx(seq_idx_from_cu_seqlens(cu_seqlens)), cu_seqlens)
    assert torch.equal(cu_seqlens_from_position_ids(position_ids_from_cu_seqlens(cu_seqlens)), cu_seqlens)


@settings(max_examples=100, deadline=None)
@given(any_lengths)
def test_per_token_forms_are_what_a_loop_over_documents_writes(lengths: list[int]) -> None:
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    assert seq_idx_from_cu_seqlens(cu_seqlens).tolist() == [d for d, n in enumerate(lengths) for _ in range(n)]
    assert position_ids_from_cu_seqlens(cu_seqlens).tolist() == [i for n in lengths for i in range(n)]


@settings(max_examples=100, deadline=None)
@given(lengths=any_lengths, causal=st.booleans())
def test_mask_is_a_plain_double_loop(lengths: list[int], causal: bool) -> None:
    document = [d for d, n in enumerate(lengths) for _ in range(n)]
    total = len(document)
    expected = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            expected[query, key] = document[query] == document[key] and (not causal or key <= query)
    assert torch.equal(document_mask(cu_seqlens_from_lengths(lengths), causal), expected)


def test_kernels_get_int32_and_positions_are_int64() -> None:
    cu_seqlens = cu_seqlens_from_lengths([2, 3])
    seq_idx, position_ids = seq_idx_from_cu_seqlens(cu_seqlens), position_ids_from_cu_seqlens(cu_seqlens)
    assert cu_seqlens.dtype == seq_idx.dtype == torch.int32
    assert position_ids.dtype == lengths_from_cu_seqlens(cu_seqlens).dtype == torch.int64
    assert cu_seqlens_from_seq_idx(seq_idx).dtype == torch.int32
    assert cu_seqlens_from_position_ids(position_ids).dtype == torch.int32
    assert document_mask(cu_seqlens).dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_may_be_a_tensor(dtype: torch.dtype) -> None:
    assert cu_seqlens_from_lengths(torch.tensor([2, 0, 5], dtype=dtype)).tolist() == [0, 2, 2, 7]


def test_negative_length_is_refused_with_the_lengths() -> None:
    with pytest.raises(ValueError, match=r"negative, got \[2, -1\]"):
        cu_seqlens_from_lengths([2, -1])


@settings(max_examples=100, deadline=None)
@given(any_lengths)
def test_documents_are_the_same_from_lengths_and_from_boundaries(lengths: list[int]) -> None:
    from_lengths = documents_from_lengths(lengths)
    from_boundaries = documents_from_cu_seqlens(cu_seqlens_from_lengths(lengths).long(), sum(lengths))
    for documents in (from_lengths, from_boundaries):
        assert documents.lengths == tuple(lengths)
        assert documents.max_length == max(lengths, default=0)
        assert documents.cu_seqlens.dtype == documents.seq_idx.dtype == torch.int32
        assert torch.equal(documents.cu_seqlens, cu_seqlens_from_lengths(lengths))
        assert torch.equal(documents.seq_idx, seq_idx_from_cu_seqlens(documents.cu_seqlens))


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 4), (2, 1), (3, 0)], ids=str)
def test_rows_of_a_padded_batch_are_documents_of_one_length(rows: int, columns: int) -> None:
    actual = documents_from_rows(rows, columns, torch.device("cpu"))
    expected = documents_from_lengths([columns] * rows)
    assert actual.lengths == expected.lengths
    assert actual.cu_seqlens.dtype == actual.seq_idx.dtype == torch.int32
    assert torch.equal(actual.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(actual.seq_idx, expected.seq_idx)


@pytest.mark.parametrize(
    "boundaries",
    [[], [0], [0, 4], [0, 6], [1, 5], [0, 3, 2, 5], [0, 6, 5], [-1, 5], [5, 0]],
    ids=str,
)
def test_boundaries_that_do_not_cover_the_row_are_refused_and_shown(boundaries: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"cu_seqlens is .* for a row of 5 tokens; expected boundaries that start at 0"
    ):
        documents_from_cu_seqlens(torch.tensor(boundaries, dtype=torch.int32), 5)


def test_long_boundaries_are_shown_in_short() -> None:
    with pytest.raises(ValueError, match=r"is \[0, 1, 2, 3, 4, 5, '\.\.\.', 17, 18, 19\] for a row of 20 tokens"):
        documents_from_cu_seqlens(torch.arange(20), 20)
