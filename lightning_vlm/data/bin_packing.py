"""Bin packing in two measures at once, for millions of samples: the search behind `lightning_vlm.data.packing`.

The number of packs is fixed first, close to what the totals need, and all packs are filled at once: the largest samples
go to the emptiest packs, a whole round of packs per numpy call, and pairs of packs then swap samples until nothing
overflows. So a million samples take a fraction of a second and the packs come out alike in tokens and in patches, which
is what data-parallel ranks that wait for each other need. The trade-off: where samples are large beside the budget this
is no better than best-fit decreasing, which is why small data sets are packed both ways.

All arithmetic that decides is exact or elementwise and every order is total: machines agree on the plan.
"""

from __future__ import annotations

import math

import numpy as np

ONE_BY_ONE = 20_000  # up to so many samples best-fit decreasing is tried too, which takes about 10 us each
TRIAL_SAMPLES = 16_384  # beyond, so many are packed first to see how tightly the distribution packs
SHARE = 1 << 16  # unit of shares of an even load or of a budget: integers sort the same on every machine
LUMPS = 128  # samples below an even load / LUMPS are dealt several at a time, which bounds the number of rounds
SWAP_ROUNDS, SWAP_SAMPLES = 12, 8  # rounds of swaps, and the samples that a pack offers in each
SWAP_PAIRS = 4096  # pairs of packs that numpy works on at a time: what fits the cache


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Stable argsort. Key and index in one word sort several times faster than NumPy's argsort.

    Args:
        keys: ``(N,)`` int64, none negative.
    """
    bits = len(keys).bit_length()
    if len(keys) and int(keys.max()).bit_length() + bits > 62:
        return np.argsort(keys, kind="stable")
    return np.sort((keys << bits) | np.arange(len(keys))) & ((1 << bits) - 1)


def group_by_pack(pack_of: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Members of each pack, pack after pack, and where each begins.

    Args:
        pack_of: ``(num_samples,)`` pack of each sample.
        count: Number of packs.

    Returns:
        ``(num_samples,)`` and ``(count + 1,)`` int64.
    """
    return stable_order(pack_of), np.cumsum(np.concatenate([[0], np.bincount(pack_of, minlength=count)]))


def assign_packs(sizes: np.ndarray, limits: np.ndarray, multiple: int) -> tuple[np.ndarray, int]:
    """Packs everything.

    Args:
        sizes: ``(num_measures, num_samples)`` int64: tokens, and patches if there are any; none over its limit.
        limits: ``(num_measures, 1)`` int64 budgets.
        multiple: The number of packs is rounded up to a multiple of this.

    Returns:
        ``(num_samples,)`` pack of each sample, and the number of packs.
    """
    num_samples = sizes.shape[1]
    lower = _lower_bound(sizes, limits)
    if num_samples > ONE_BY_ONE:
        # How tight packs can be is a property of the distribution, so an evenly drawn part tells, cheaply. A little
        # air on top makes the first full attempt succeed; two measures are harder to satisfy than one.
        trial = sizes[:, stable_order(_shares(sizes, limits))[:: num_samples // TRIAL_SAMPLES]]
        bound = _lower_bound(trial, limits)
        # Of few packs a single one is too coarse a measure, and packs of hundreds of samples get as tight as possible.
        tightness = _search(trial, limits, 1, bound, 8)[1] / bound if bound > 200 else 1.0
        return _search(sizes, limits, multiple, int(lower * tightness * (1.001 if len(sizes) == 1 else 1.0025)), 3)
    pack_of, count = _search(sizes, limits, multiple, lower, 8)
    if count > _rounded(lower, multiple, num_samples):
        other = _best_fit(sizes, limits)
        opened = int(other.max()) + 1
        wanted = _rounded(opened, multiple, num_samples)
        if wanted < count:
            return _split(other, opened, wanted), wanted
    return pack_of, count


def _lower_bound(sizes: np.ndarray, limits: np.ndarray) -> int:
    """No packing has fewer packs: what the totals need, and samples of over half a budget never meet."""
    return int(max((-(-sizes.sum(1) // limits[:, 0])).max(), (2 * sizes > limits).sum(1).max()))


def _rounded(count: int, multiple: int, num_samples: int) -> int:
    return min(math.ceil(count / multiple) * multiple, num_samples)


def _search(sizes: np.ndarray, limits: np.ndarray, multiple: int, low: int, attempts: int) -> tuple[np.ndarray, int]:
    """Looks for the smallest number of packs, from ``low`` on, that everything can be dealt to evenly.

    What overflows at too small a number is packed by itself, so that there is a result after the first attempt.
    """
    num_samples = sizes.shape[1]
    even: tuple[np.ndarray, int] | None = None
    rough, high, following = (np.arange(num_samples), num_samples), num_samples, low
    for _ in range(attempts):
        count = _rounded(following, multiple, num_samples)
        pack_of, spilled = _fill(sizes, limits, count)
        if not len(spilled):
            even, high = (pack_of, count), count
            following = (low + high) // 2
        else:
            rest, more = _search(sizes[:, spilled], limits, 1, _lower_bound(sizes[:, spilled], limits), 1)
            pack_of[spilled] = rest + count
            if count + more < rough[1]:
                rough = pack_of, count + more
            low = count + 1
            if even is None:
                high = min(high, int(rough[1] * 1.01) + 1)
            following = min((low + high) // 2, count + 4 * more + count // 500 + 1)
        if low >= high or (even is not None and _rounded(low, multiple, num_samples) >= even[1]):
            break
    # Evenness is worth a few packs, and costs none where the number is rounded up anyway.
    wanted = _rounded(rough[1], multiple, num_samples)
    if even is not None and even[1] <= max(wanted, int(rough[1] * 1.004)):
        return even
    return _split(*rough, wanted), wanted


def _fill(sizes: np.ndarray, limits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals everything to ``count`` packs. Returns the pack per sample, and the samples for which there was no room."""
    loads = np.zeros((len(sizes), count), dtype=np.int64)
    even = np.maximum(sizes.sum(1, keepdims=True), 1) / count
    pack_of, share = np.empty(sizes.shape[1], dtype=np.int64), _shares(sizes, even)
    # Pictures first, on both measures, with all that is large: the small texts then level the tokens exactly.
    early = np.any((sizes[1:] > 0) | (share > SHARE // 8), axis=0)
    first, rest = np.flatnonzero(early), np.flatnonzero(~early)
    if len(first):
        first = first[stable_order(int(share.max()) - share[first])]
        pack_of[first] = _deal(sizes[:, first], loads, even)
        pack_of[first] = _swap(sizes[:, first], limits, pack_of[first], loads)
    if len(rest):
        rest = rest[stable_order(int(sizes[0].max()) - sizes[0, rest])]
        pack_of[rest] = _deal(sizes[:1, rest], loads[:1], even[:1])
    for chance in range(4):
        if (loads > limits).any():
            pack_of = _swap(sizes, limits, pack_of, loads)
        spilled = _spill(sizes, limits, pack_of, loads)
        if chance == 3 or not 0 < len(spilled) <= count // 16:
            break
        # A pack of two may have nothing to swap: what it spilled gets another chance in the emptiest of the others.
        level = _shares(loads, limits)
        level[pack_of[spilled]] = SHARE
        packs = stable_order(level)[: len(spilled)]
        pack_of[spilled] = packs
        loads[:, packs] += sizes[:, spilled]
    return pack_of, spilled


def _shares(sizes: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The larger of the shares of ``whole``, in 1 / SHARE, at least 1 for what is not empty."""
    return np.ceil((sizes * (SHARE / whole)).max(0)).astype(np.int64)


def _tilt(sizes: np.ndarray, even: np.ndarray, sign: int) -> np.ndarray:
    """How much more of an even load of tokens than of patches something has, in 1 / SHARE from 0 to 8 SHARE."""
    tilt = sizes * (sign * SHARE / even)
    return np.clip(tilt[0] - tilt[1] + 4 * SHARE, 0, 8 * SHARE - 1).astype(np.int64)


def _deal(sizes: np.ndarray, loads: np.ndarray, even: np.ndarray) -> np.ndarray:
    """Gives samples, largest first, to the packs with the smallest loads ("longest processing time"), in rounds.

    ``sizes`` come sorted; ``loads`` ``(num_measures, num_packs)`` are updated; ``even`` is the load of a pack if all
    were equal. Returns the pack per sample.
    """
    num_packs, num_samples, two = loads.shape[1], sizes.shape[1], len(sizes) == 2
    # The last ones stay single: they do the levelling.
    lump = _shares(sizes, even).cumsum() // (SHARE // LUMPS)
    lump[max(num_samples - 32 * num_packs, 0) :] = -1
    heads = np.flatnonzero(np.concatenate([[True], (lump[1:] != lump[:-1]) | (lump[1:] < 0)]))
    lumps = np.add.reduceat(sizes, heads, axis=1)
    pack_of = np.empty(len(heads), dtype=np.int64)
    position = 0
    while position < len(heads):
        level = _shares(loads, even) if two else loads[0]
        packs = stable_order(level)
        head = lumps[:, position : position + num_packs]
        # One by one, a pack above this level would not have its turn yet.
        turn = level[packs[0]] + (_shares(head[:, :1], even)[0] if two else head[0, 0])
        number = min(int(np.searchsorted(level[packs], turn, "right")), head.shape[1])
        packs, items = packs[:number], np.arange(position, position + number)
        if two:
            # Among neighbours in level, the sample with most tokens for its patches goes where there are fewest.
            strip = np.arange(number) // math.isqrt(number) * (8 * SHARE)
            items = items[stable_order(strip + _tilt(head[:, :number], even, -1))]
            packs = packs[stable_order(strip + _tilt(loads[:, packs], even, 1))]
        pack_of[items] = packs
        loads[:, packs] += lumps[:, items]
        position += number
    return np.repeat(pack_of, np.diff(np.append(heads, num_samples)))


def _swap(sizes: np.ndarray, limits: np.ndarray, pack_of: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Lets packs that overflow swap a sample with an emptier one, where that evens the two and overflows neither."""
    members, starts = group_by_pack(pack_of, loads.shape[1])
    lengths = np.diff(starts)
    offered = np.arange(min(SWAP_SAMPLES, max(2, math.ceil(len(members) / loads.shape[1]))))
    # Exact below 2**24, and what overflows is found in integers afterwards.
    values, weights = sizes.astype(np.float32), (1 / limits[:, 0]).astype(np.float32) ** 2
    for turn in range(SWAP_ROUNDS):
        packs = stable_order(loads[(turn + 1) % len(sizes)])
        packs = packs[lengths[packs] > 0]
        half = len(packs) // 2
        high = packs[::-1][:half][(loads[:, packs[::-1][:half]] > limits).any(0)]
        if not len(high):
            continue
        # The fewer overflow, the more partners each may look at; no pack is in two pairs of which both could swap.
        width = max(1, min(half, SWAP_PAIRS) // len(high))
        shift = turn // len(sizes) * (len(high) * width + 1)
        low = packs[(np.arange(len(high) * width) + shift) % half].reshape(-1, width)
        for block in range(0, len(high), SWAP_PAIRS // width):
            b = low[block : block + SWAP_PAIRS // width]
            a = np.broadcast_to(high[block : block + len(b), None], b.shape)
            mine = starts[a][..., None] + (offered + turn * len(offered)) % lengths[a][..., None]
            theirs = starts[b][..., None] + (offered + turn * len(offered)) % lengths[b][..., None]
            gain: np.ndarray = np.zeros((), np.float32)
            allowed: np.ndarray = np.ones((), bool)
            for value, load, limit, weight in zip(values, loads, limits, weights):
                moved = value[members[mine]][..., :, None] - value[members[theirs]][..., None, :]
                gap = (load[a] - load[b]).astype(np.float32)[..., None, None]
                room_a = np.maximum(limit - load[a], 0).astype(np.float32)[..., None, None]
                room_b = np.maximum(limit - load[b], 0).astype(np.float32)[..., None, None]
                gain = gain + moved * (gap - moved) * weight
                allowed = allowed & (moved <= room_b) & (-moved <= room_a)
            choices = np.where(allowed, gain, 0).reshape(len(a), -1)
            best = choices.argmax(1)
            good = np.flatnonzero(choices.max(1) > 0)
            partner, i, j = np.unravel_index(best[good], (width, len(offered), len(offered)))
            mine, theirs = mine[good, partner, i], theirs[good, partner, j]
            given, taken = members[mine], members[theirs]
            members[mine], members[theirs] = taken, given
            loads[:, a[good, partner]] += sizes[:, taken] - sizes[:, given]
            loads[:, b[good, partner]] += sizes[:, given] - sizes[:, taken]
    result = np.empty_like(pack_of)
    result[members] = np.repeat(np.arange(len(lengths)), lengths)
    return result


def _spill(sizes: np.ndarray, limits: np.ndarray, pack_of: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Takes samples out until no pack overflows: the smallest one that suffices, or else the largest, and again."""
    spilled = [np.zeros(0, dtype=np.int64)]
    candidates = np.flatnonzero((loads > limits).max(0)[pack_of])
    while len(candidates):
        packs = pack_of[candidates]
        share = _shares(sizes[:, candidates], limits)
        enough = (loads[:, packs] - sizes[:, candidates] <= limits).all(0)
        order = np.lexsort((np.where(enough, share, -share), ~enough, packs))
        chosen = order[np.flatnonzero(np.diff(packs[order], prepend=-1))]
        loads[:, packs[chosen]] -= sizes[:, candidates[chosen]]
        spilled.append(candidates[chosen])
        candidates = np.delete(candidates, chosen)
        candidates = candidates[(loads > limits).max(0)[pack_of[candidates]]]
    return np.concatenate(spilled)


def _best_fit(sizes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Best-fit decreasing, one by one: a sample goes where least of the budgets is left."""
    free = np.empty_like(sizes)
    pack_of, opened = np.empty(sizes.shape[1], dtype=np.int64), 0
    for sample in np.argsort(-(sizes / limits).max(0), kind="stable"):
        fitting = np.flatnonzero((free[:, :opened] >= sizes[:, sample, None]).all(0))
        if len(fitting):
            pack = fitting[(free[:, fitting] / limits).sum(0).argmin()]
        else:
            pack, opened = opened, opened + 1
            free[:, pack] = limits[:, 0]
        free[:, pack] -= sizes[:, sample]
        pack_of[sample] = pack
    return pack_of


def _split(pack_of: np.ndarray, count: int, wanted: int) -> np.ndarray:
    """Halves the packs of most samples until there are ``wanted`` packs."""
    pack_of = pack_of.copy()
    while count < wanted:
        members, starts = group_by_pack(pack_of, count)
        lengths = np.diff(starts)
        longest = np.argsort(-lengths, kind="stable")[: wanted - count]
        for pack in longest[lengths[longest] > 1]:
            pack_of[members[starts[pack] : starts[pack + 1]][1::2]] = count
            count += 1
    return pack_of
