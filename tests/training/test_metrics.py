"""Scores by hand, edit distance against its definition, and the same value from any number of processes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.training.metrics import ANLS, SCORES, ExactMatch, MeanOverTokens, edit_distance

words = st.text("abc", max_size=6)


def by_definition(left: str, right: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        substitution = distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, substitution)

    return distance(len(left), len(right))


@given(words, words)
@settings(deadline=None, max_examples=200)
def test_edit_distance_equals_its_recursive_definition(left, right):
    assert edit_distance(left, right) == by_definition(left, right)


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("Zürich", "Zurich", 1)],
)
def test_edit_distance_by_hand(left, right, distance):
    assert edit_distance(left, right) == edit_distance(right, left) == distance


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("12", "12", 1.0),
        (" 12\n", "12", 1.0),
        ("12", "13", 0.0),
        ("Yes", "yes", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_exact_match_by_hand(answer, reference, score):
    assert ExactMatch.score(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("invoice", "invoice", 1.0),
        ("INVOICE ", " invoice", 1.0),  # case and outer white space do not count
        ("invoce", "invoice", 1 - 1 / 7),  # normalised by the longer of the two
        ("abcd", "abxd", 0.75),
        ("abcde", "abcxy", 0.6),
        ("abcd", "abxy", 0.0),  # a normalised distance of exactly the threshold 0.5 scores nothing
        ("ab", "xy", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
    ],
)
def test_anls_by_hand(answer, reference, score):
    assert ANLS.score(answer, reference) == pytest.approx(score, abs=1e-12)


@given(words, words)
@settings(deadline=None, max_examples=100)
def test_anls_is_symmetric_and_never_between_zero_and_a_half(left, right):
    score = ANLS.score(left, right)
    assert score == ANLS.score(right, left)
    assert score == 0.0 or 0.5 < score <= 1.0
    assert (score == 1.0) == (left == right)


def test_the_best_reference_counts_and_the_mean_is_over_answers():
    match, similarity = ExactMatch(), ANLS()
    answers = ["four", "paris", "x"]
    references = [["4", "four"], ["pari", "london"], []]  # no reference at all: nothing can be right
    for metric in (match, similarity):
        metric.update(answers, references)
    assert match.compute().item() == pytest.approx(1 / 3)
    assert similarity.compute().item() == pytest.approx((1 + 0.8 + 0) / 3)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_updates_add_up_and_reset_starts_again():
    metric = ExactMatch()
    metric.update(["a"], [["a"]])
    metric.update(["a", "b"], [["b"], ["c"]])
    assert metric.compute().item() == pytest.approx(1 / 3)
    metric.reset()
    assert metric.compute().isnan()
    metric.update(["a"], [["a"]])
    assert metric.compute().item() == 1.0


def test_answers_without_their_references_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ExactMatch().update(["a", "b"], [["a"]])


def test_scores_by_name():
    assert (SCORES["exact_match"], SCORES["anls"]) == (ExactMatch, ANLS)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_mean_loss_weighs_tokens_not_batches():
    metric = MeanOverTokens()
    assert metric.compute().isnan()
    metric.update(torch.tensor(2.0, requires_grad=True), 1)
    metric.update(torch.tensor(4.0), 3)
    assert metric.compute().item() == 1.5
    assert not metric.total.requires_grad


def test_the_mean_loss_does_not_lose_small_terms():
    metric = MeanOverTokens()
    metric.update(torch.tensor(2.0**24), 2**24)
    for _ in range(64):
        metric.update(torch.tensor(0.5), 0)
    # Added to a float32 total of 2**24, each half alone would vanish.
    assert metric.total.item() + metric.lost.item() == 2**24 + 32
    assert metric.total.dtype == metric.lost.dtype == torch.float32, "Apple's GPUs have no float64"
    assert metric.compute() == torch.tensor(1 + 32 / 2**24)


ANSWERS = ["four", "paris", "x", "yes", "invoce"]
REFERENCES = [["4", "four"], ["pari"], ["y"], ["yes"], ["invoice"]]


def test_two_processes_with_uneven_shares_give_the_value_of_one(two_ranks):
    reports = two_ranks(f"""
from lightning_vlm.training.metrics import SCORES, MeanOverTokens
answers, references = {ANSWERS!r}, {REFERENCES!r}
for split in (4, 5):  # rank 0 has four of five answers, then all of them
    share = slice(None, split) if rank == 0 else slice(split, None)
    metrics = [score() for score in SCORES.values()]
    for metric in metrics:
        for answer, accepted in zip(answers[share], references[share]):
            metric.update([answer], [accepted])
    mean = MeanOverTokens()
    for answer in answers[share]:
        mean.update(torch.tensor(float(len(answer)) ** 2), len(answer))
    report([metric.compute().item() for metric in [*metrics, mean]])
""")
    expected = []
    for score in SCORES.values():
        metric = score()
        metric.update(ANSWERS, REFERENCES)
        expected.append(metric.compute().item())
    expected.append(sum(len(answer) ** 2 for answer in ANSWERS) / sum(len(answer) for answer in ANSWERS))
    assert len(reports) == 4
    for values in reports:
        assert values == pytest.approx(expected)
