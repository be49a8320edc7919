"""NeMo AutoModel's length-grouped sampler: its order, and no batch of two groups, no wrong sample, an exact resume."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import get_context
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_vlm.automodel.samplers import LengthGroupedSampler


def rows(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"_text_tokens": length, "conversation": []} for length in lengths]


class Wrapper(Dataset):
    """What datasets that encode rows look like: ``.dataset`` holds the rows."""

    def __init__(self, dataset: Any, length: int | None = None) -> None:
        self.dataset, self.length = dataset, len(dataset) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


class Encoded(Wrapper):
    """Encodes at every access: to be measured through the rows."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("a dataset over a list is not to be encoded")


class Lengths(Dataset):
    """No list underneath."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"_text_tokens": self.lengths[index]}


setups = st.tuples(
    st.lists(st.integers(0, 40), max_size=60), st.integers(1, 9), st.integers(0, 3), st.none() | st.integers(0, 30)
)


def test_longest_first_and_the_lower_index_among_equals() -> None:
    sampler = LengthGroupedSampler(rows([3, 5, 3, 5, 4]))
    assert sampler.sorted_indices == [1, 3, 4, 0, 2]
    assert sampler.lengths == [3, 5, 3, 5, 4]


def test_lengths_are_text_and_media() -> None:
    row = {"conversation": [{"content": [{"type": "image"}, {"type": "text", "text": "x" * 30}]}]}
    sampler = LengthGroupedSampler([row])
    assert (sampler.text_lengths, sampler.media_lengths, sampler.lengths) == ([10], [500], [510])


def test_the_order_is_that_of_torch_for_seed_plus_epoch() -> None:
    """With whole chunks the order is NeMo AutoModel's, number for number."""
    sampler = LengthGroupedSampler(rows(list(range(12, 0, -1))), seed=5, batch_size=3)
    sampler.set_epoch(2)
    drawn = torch.randperm(4, generator=torch.Generator().manual_seed(7)).tolist()
    assert list(sampler) == [index for chunk in drawn for index in range(3 * chunk, 3 * chunk + 3)]


def test_no_batch_straddles_two_groups() -> None:
    """NeMo AutoModel's case: 11 samples in fours gave [2, 1, 10, 9], [8, 7, 6, 5], [4, 3]."""
    sampler = LengthGroupedSampler(rows(list(range(11))), batch_size=4)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        batches = [batch.tolist() for batch in DataLoader(range(11), batch_size=4, sampler=sampler)]
        assert sorted(batches, reverse=True) == [[10, 9, 8, 7], [6, 5, 4, 3], [2, 1, 0]]
        assert batches[-1] == [2, 1, 0]


@settings(max_examples=150, deadline=None)
@given(setup=setups, epoch=st.integers(0, 3))
def test_an_epoch_is_every_kept_sample_once_in_groups(setup: tuple, epoch: int) -> None:
    lengths, batch_size, seed, max_length = setup
    sampler = LengthGroupedSampler(rows(lengths), seed, None, max_length, batch_size)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))), "all are within max_length + 512"
    assert len(order) == len(sampler)
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    spans = sorted((max(lengths[i] for i in group), min(lengths[i] for i in group)) for group in groups)
    assert all(low[0] <= high[1] for low, high in pairwise(spans)), "groups do not overlap"
    assert list(sampler) == order, "the same epoch again"


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = LengthGroupedSampler(rows([1] * 40), seed, batch_size=2)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed, epoch in [(0, 0), (0, 1), (0, 2), (9, 0)]}) == 4


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_is_at_least_one(batch_size: int) -> None:
    sampler = LengthGroupedSampler(rows([1, 2, 3]), batch_size=batch_size)
    assert sampler.batch_size == 1
    assert sorted(sampler) == [0, 1, 2]


def test_no_samples_are_no_epoch() -> None:
    assert list(LengthGroupedSampler([])) == []


# What is measured


def test_max_length_has_a_slack_of_512_and_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = LengthGroupedSampler(rows([612, 613, 5]), max_length=100)
    assert sampler.sorted_indices == [0, 2]
    assert len(sampler) == 2
    assert "1 of 3 samples are estimated at over 100 + 512 tokens and left out" in caplog.text


def test_wrappers_are_looked_through_to_the_rows() -> None:
    data = rows([1, 2, 3])
    assert LengthGroupedSampler._get_raw_samples(Encoded(Wrapper(data))) is data
    assert LengthGroupedSampler(Encoded(data)).lengths == [1, 2, 3]


def test_a_subset_is_measured_at_its_own_indices() -> None:
    subset = Subset(Encoded(Subset(Encoded(rows([10, 20, 30, 40])), [3, 2, 1])), [2, 0])
    sampler = LengthGroupedSampler(subset)
    assert sampler.lengths == [20, 40]
    assert sampler.sorted_indices == [1, 0]


@pytest.mark.parametrize(
    "dataset",
    [
        Lengths([3, 1, 2]),
        Wrapper(Lengths([3, 1, 2])),
        Subset(Lengths([9, 3, 1, 2]), [1, 2, 3]),
        ConcatDataset([Wrapper(rows([3])), Wrapper(rows([1, 2]))]),
        Wrapper(rows([3, 1, 2, 8]), length=3),  # holds fewer than it wraps and does not say which
    ],
    ids=["map", "wrapped", "subset", "concat", "shorter"],
)
def test_other_datasets_are_read_sample_by_sample(dataset: Any) -> None:
    assert LengthGroupedSampler._get_raw_samples(dataset) is None
    assert LengthGroupedSampler(dataset).lengths == [3, 1, 2]


def test_estimates_follow_the_processor() -> None:
    class Inner:
        patch_size, merge_size = 14, 2

    class Processor:
        image_processor, video_processor = Inner(), Inner()

    row = {"mm_inputs_meta": {"images_meta": [[280, 560]]}, "conversation": [{"content": [{"type": "image"}]}]}
    sampler = LengthGroupedSampler([row], processor=Processor())
    assert sampler.lengths == [200] == [sampler._estimate_image_tokens([280, 560])]
    assert sampler._estimate_tokens(row) == (0, 200)
    assert sampler._estimate_video_tokens([100, 280, 280, 25.0, 4.0]) == 4 * 20 * 20 // 4
    plain = LengthGroupedSampler([row])
    assert plain.lengths == [500]
    with pytest.raises(ValueError, match="without a processor that has an image_processor"):
        plain._estimate_image_tokens([1, 1])


# Resume


@settings(max_examples=150, deadline=None)
@given(setup=setups, epoch=st.integers(0, 3), stop=st.integers(0, 70))
def test_resume_is_exact(setup: tuple, epoch: int, stop: int) -> None:
    lengths, batch_size, seed, max_length = setup

    def make() -> LengthGroupedSampler:
        return LengthGroupedSampler(rows(lengths), seed, None, max_length, batch_size)

    whole = make()
    orders = []
    for number in (epoch, epoch + 1):
        whole.set_epoch(number)
        orders.append(list(whole))
    first = make()
    first.set_epoch(epoch)
    drawn = [index for index, _ in zip(first, range(stop))] if stop else []
    resumed = make()
    iterator = iter(resumed)  # some trainers make the iterator before they restore the state
    resumed.load_state_dict(first.state_dict(len(drawn)))
    if len(drawn) < len(orders[0]):
        resumed.set_epoch(epoch)  # and set the epoch afterwards
        assert drawn + list(iterator) == orders[0]
        resumed.set_epoch(epoch + 1)
    assert resumed.epoch == epoch + 1
    assert list(resumed) == orders[1]


def test_the_state_counts_what_was_drawn_unless_told() -> None:
    sampler = LengthGroupedSampler(rows(list(range(9))), batch_size=2)
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(4)]
    assert sampler.state_dict()["yielded"] == 4
    assert sampler.state_dict(2)["yielded"] == 2, "a loader with workers has drawn more than was trained on"
    assert {type(value) for value in sampler.state_dict().values()} == {int, str}
    sampler.load_state_dict(sampler.state_dict())
    assert sampler.state_dict()["yielded"] == 4, "saved again before the first sample"


def test_another_epoch_forgets_the_position() -> None:
    sampler = LengthGroupedSampler(rows(list(range(9))), batch_size=2)
    whole = list(sampler)
    sampler.load_state_dict({**sampler.state_dict(), "yielded": 4})
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole, "the position counts once"
    sampler.load_state_dict({**sampler.state_dict(), "yielded": 4})
    sampler.set_epoch(1)
    assert len(list(sampler)) == 9


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 3}, {"dataset": rows([1, 2, 3, 5, 4])}], ids=str)
def test_a_position_in_another_order_is_refused(change: dict[str, Any]) -> None:
    base = {"dataset": rows([1, 2, 3, 4, 5]), "seed": 0, "batch_size": 2}
    state = LengthGroupedSampler(**base).state_dict(2)
    other = LengthGroupedSampler(**{**base, **change})
    with pytest.raises(ValueError, match="stopped after sample 2 of epoch 0 of another order"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "yielded": 5})
    assert other.epoch == 1, "between epochs any order may go on"


def _count_on_rank(rank: int, path: str, lengths: list[int], results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results.put((rank, LengthGroupedSampler(rows(lengths), max_length=100).sorted_indices))
    dist.destroy_process_group()


def test_ranks_keep_the_same_number_on_cpu(tmp_path: Path) -> None:
    context = get_context("fork")
    results = context.SimpleQueue()
    shards = [[5, 900, 7, 6], [1, 2, 3, 4, 5]]
    processes = [
        context.Process(target=_count_on_rank, args=(rank, str(tmp_path / "store"), shards[rank], results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    kept = dict(results.get() for _ in processes)
    assert kept == {0: [2, 3, 0], 1: [4, 3, 2]}, "the shortest go"
