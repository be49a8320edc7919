"""Efficient video sampling (EVS): of a video's tokens, those stay that differ most from the tubelet before them.

How many stay is known before anything is computed (`geometry.videos.retained_tokens`), so a plan, labels and packs can
count on it; which ones stay is known only here, after the projector. The text between the tubelets stays too, so the
placeholders are moved between the tubelets of their video, inside a span whose length does not change. Source: arXiv
2510.14624, as vLLM computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_vlm.models.fusion import FusionError

_FIRST_TUBELET = 255.0  # more than any dissimilarity, which ends at 2


@torch.no_grad()
def retention_mask(features: Tensor, num_retained: int) -> Tensor:
    """Chooses the tokens of one video that stay.

    Dissimilarity of a token is one minus the cosine between it and the token at the same place one tubelet earlier; the
    first tubelet's is above all others. The sort is stable, so among equals the earlier one stays. The choice itself
    has no gradient; what is kept of the features has.

    Args:
        features: ``(num_tubelets, tokens_per_tubelet, hidden_size)`` after the projector.
        num_retained: How many stay.

    Returns:
        ``(num_tubelets, tokens_per_tubelet)`` bool with ``num_retained`` true.
    """
    similarity = torch.nn.functional.cosine_similarity(features[1:], features[:-1], dim=-1)
    first = torch.full_like(features[:1, :, 0], _FIRST_TUBELET)
    dissimilarity = torch.cat([first, 1 - similarity]).flatten()
    kept = torch.argsort(dissimilarity, descending=True, stable=True)[:num_retained]
    mask = torch.zeros_like(dissimilarity, dtype=torch.bool)
    mask[kept] = True
    return mask.view(features.shape[:2])


def prune_videos(
    features: Tensor, sizes: list[tuple[int, int]], num_retained: list[int] | None
) -> tuple[Tensor, list[Tensor]]:
    """Leaves out what each video does not keep.

    Args:
        features: ``(num_tokens, hidden_size)``, videos one after another.
        sizes: (tubelets, tokens of each) of each video.
        num_retained: Tokens that each video keeps; all when ``None``.

    Returns:
        ``(num_tokens kept, hidden_size)``; and per video ``(num_tubelets,)`` int64 tokens kept of each tubelet.

    Raises:
        FusionError: If a video is to keep fewer tokens than its first tubelet has, or more than all have; or if there
            are not as many numbers as videos.
    """
    wanted = [tubelets * size for tubelets, size in sizes] if num_retained is None else num_retained
    if len(wanted) != len(sizes):
        raise FusionError(
            f"num_video_tokens has {len(wanted)} number(s) for {len(sizes)} video(s); take both from one call of the "
            "processor"
        )
    videos = features.split([tubelets * size for tubelets, size in sizes])
    kept, counts = [], []
    for video, (tubelets, size), number in zip(videos, sizes, wanted, strict=True):
        if not size <= number <= tubelets * size:
            raise FusionError(
                f"num_video_tokens is {number} for a video of {tubelets} tubelets of {size} tokens; expected at least "
                f"the {size} of its first tubelet, at most all {tubelets * size}"
            )
        if number == tubelets * size:
            kept.append(video)
            counts.append(torch.full((tubelets,), size))
            continue
        mask = retention_mask(video.view(tubelets, size, -1), number)
        kept.append(video[mask.flatten()])
        counts.append(mask.sum(-1))
    return torch.cat(kept), counts


def lay_out_videos(input_ids: Tensor, is_video: Tensor, tokens_per_tubelet: list[Tensor]) -> Tensor:
    """Where the tokens of a batch go, when the videos in it hold what their tubelets kept.

    A processor cannot know that, and puts all placeholders of a video into its first tubelet, as vLLM does.

    Args:
        input_ids: ``(B, T)``, each tubelet opened by one and the same start token, right before its placeholders.
        is_video: ``(B, T)`` bool, the placeholders of videos.
        tokens_per_tubelet: Per video, in reading order, ``(num_tubelets,)`` int64 tokens that stay.

    Returns:
        ``(B * T,)`` int64, as of `spread_placeholders`.

    Raises:
        FusionError: If the placeholders or start tokens are not those of these videos.
    """
    flat, is_placeholder = input_ids.flatten(), is_video.flatten()
    counts = [int(counts.sum()) for counts in tokens_per_tubelet]
    places = is_placeholder.nonzero().flatten()
    if len(places) != sum(counts):
        raise FusionError(
            f"the batch has {len(places)} video placeholder tokens for {sum(counts)} retained features of "
            f"{len(counts)} video(s); prepare text and videos with one processor, and cut no text inside a video"
        )
    order = torch.arange(len(flat), device=flat.device)
    for own, counts_of in zip(places.split(counts), tokens_per_tubelet):
        first = max(int(own[0]) - 1, 0)
        is_start = flat[first:] == flat[first]
        starts = is_start.nonzero().flatten()[: len(counts_of)]
        length = max(int(own[-1]) - first, int(starts[-1])) + 1
        span = slice(first, first + length)
        moved = spread_placeholders(is_placeholder[span], is_start[:length], counts_of.to(flat.device))
        order[span] = order[span][moved]
    return order


def spread_placeholders(is_placeholder: Tensor, is_start: Tensor, tokens_per_tubelet: Tensor) -> Tensor:
    """Where the tokens of a span go, when each tubelet is to hold another number of placeholders.

    A tubelet's placeholders follow its start token. All other tokens keep their order.

    Args:
        is_placeholder: ``(L,)`` bool, the placeholders of one video in its span.
        is_start: ``(L,)`` bool, the start tokens, one per tubelet.
        tokens_per_tubelet: ``(num_tubelets,)`` int64 placeholders each is to hold, together as many as there are.

    Returns:
        ``(L,)`` int64: the token at place ``i`` is to be the one that was at ``order[i]``.

    Raises:
        FusionError: If the span has another number of start tokens or placeholders.
    """
    starts, placeholders = int(is_start.sum()), int(is_placeholder.sum())
    if starts != len(tokens_per_tubelet) or placeholders != int(tokens_per_tubelet.sum()):
        raise FusionError(
            f"a video's span has {placeholders} placeholder tokens after {starts} start token(s), expected "
            f"{int(tokens_per_tubelet.sum())} after {len(tokens_per_tubelet)}; prepare text and videos with one "
            "processor, and cut no text inside a video"
        )
    # A token's key is twice the number of text tokens before or at it: placeholders of a tubelet come right after its
    # start token, before the next text token. The sort is stable, so the placeholders stay in order.
    texts_so_far = (~is_placeholder).cumsum(0)
    keys = 2 * texts_so_far
    after = texts_so_far[is_start].repeat_interleave(tokens_per_tubelet)
    keys = keys.masked_scatter(is_placeholder, 2 * after + 1)
    return torch.argsort(keys, stable=True)
