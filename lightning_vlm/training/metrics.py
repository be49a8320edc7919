"""Scores of generated answers, as torchmetrics: sums and counts, equal for any number of processes.

States are replaced, never changed in place: `Trainer.validate` leaves inference tensors, which a later fit may not
change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import ModuleDict
from torchmetrics import Metric


class MeanOverTokens(Metric):
    """A token-weighted mean: sum of losses over number of tokens."""

    total: Tensor
    lost: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("lost", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int) -> None:
        """Adds a sum of ``count`` token losses."""
        value = total.detach().to(self.total)
        # What float32 rounds away is summed apart (Knuth's two-sum): Apple's GPUs have no float64.
        new = self.total + value
        part = new - self.total
        self.lost = self.lost + (self.total - (new - part)) + (value - part)
        self.total = new
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The mean; NaN before any token."""
        return (self.total / self.count) + (self.lost / self.count)


class AnswerScore(Metric):
    """Mean over answers of a score against the best of its references; subclasses define the score."""

    total: Tensor
    count: Tensor
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds answers.

        Args:
            answers: Generated texts.
            references: Accepted texts of each.
        """
        for answer, accepted in zip(answers, references, strict=True):
            self.total = self.total + max((self.score(answer, reference) for reference in accepted), default=0.0)
            self.count = self.count + 1

    def compute(self) -> Tensor:
        """The mean in 0..1; NaN before any answer."""
        return self.total / self.count

    @staticmethod
    def score(answer: str, reference: str) -> float:
        """Score of one answer against one reference, in 0..1."""
        raise NotImplementedError


class ExactMatch(AnswerScore):
    """1 if the answer equals a reference after stripping outer white space."""

    @staticmethod
    def score(answer: str, reference: str) -> float:
        """1.0 or 0.0."""
        return float(answer.strip() == reference.strip())


class ANLS(AnswerScore):
    """Average normalised Levenshtein similarity (arXiv:1905.13648), threshold 0.5, ignoring case."""

    @staticmethod
    def score(answer: str, reference: str) -> float:
        """``1 - distance / longer length`` if that is over 0.5, else 0."""
        answer, reference = answer.strip().lower(), reference.strip().lower()
        longer = max(len(answer), len(reference))
        if not longer:
            return 1.0
        normalized = edit_distance(answer, reference) / longer
        return 1.0 - normalized if normalized < 0.5 else 0.0


SCORES: dict[str, type[AnswerScore]] = {"exact_match": ExactMatch, "anls": ANLS}


def take_scores(scores: ModuleDict, split: str) -> Iterator[tuple[str, Tensor]]:
    """The scores of a split and of its groups, by the names they are logged under; each starts afresh.

    Args:
        scores: By ``<split>`` or ``<split>/<group>``, then by name.
        split: Which to take.
    """
    for key, group_scores in scores.items():
        where, _, group = key.partition("/")
        if where != split:
            continue
        assert isinstance(group_scores, ModuleDict)
        for name, score in group_scores.items():
            assert isinstance(score, AnswerScore)
            # Every rank computes every score, also one it has no answers for: computing is a collective call.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                value = score.compute()
            if not value.isnan():
                yield "/".join(filter(None, (split, "gen", name, group))), value
            score.reset()


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each costing 1."""
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        current = [i]
        for j, b in enumerate(right, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]
