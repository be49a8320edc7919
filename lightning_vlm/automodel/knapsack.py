"""NeMo AutoModel's bins of samples, one by one with a heap: their exact contents are the contract. To migrate from.

Simple and quick enough (a million samples in some seconds), but it knows no budget of patches, no number of ranks and
leaves out what is too long; our own plan (`data.packing`) does all three.
"""

from __future__ import annotations

import heapq
import logging

_log = logging.getLogger(__name__)


def greedy_knapsack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Packs the longest first, each into the emptiest bin if it fits there, or else into a new one.

    Args:
        lengths: Tokens per sample.
        max_length: Most tokens of a bin.

    Returns:
        Indices per bin, in the order in which bins were opened. Samples over ``max_length`` are in none; unlike in
        NeMo AutoModel a warning tells their number.
    """
    bins: list[list[int]] = []
    fills: list[tuple[int, int]] = []  # a heap of (tokens, bin): the emptiest first, then the oldest
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > max_length:
            continue
        if fills and fills[0][0] + lengths[index] <= max_length:
            fill, number = fills[0]
            heapq.heapreplace(fills, (fill + lengths[index], number))
            bins[number].append(index)
        else:
            heapq.heappush(fills, (lengths[index], len(bins)))
            bins.append([index])
    if too_long := sum(length > max_length for length in lengths):
        _log.warning("%d of %d samples are longer than %d tokens and in no bin", too_long, len(lengths), max_length)
    return bins


def greedy_knapsack_vt_balanced(lengths: list[int], max_length: int, visual_tokens: list[int]) -> list[list[int]]:
    """The bins of `greedy_knapsack`, those with the fewest visual tokens first.

    Neighbours are alike, which helps ranks that take neighbouring packs; the packs themselves do not become more even,
    and a loader that shuffles undoes it. `packing.order_packs` evens the steps of an epoch in a random order.

    Args:
        lengths: Tokens per sample, media included.
        max_length: Most tokens of a bin.
        visual_tokens: Tokens of media per sample.
    """
    return sorted(greedy_knapsack(lengths, max_length), key=lambda members: sum(visual_tokens[i] for i in members))
