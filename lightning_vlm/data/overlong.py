"""Samples that exceed a limit, told before training: refused, left out and counted, or made smaller.

By default nothing is cut: an answer without its end does not teach where to end. No policy cuts inside an image. What
is left out is said with names, what is cut is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_vlm.data.lengths import LengthTable
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.schema import Conversation, StoppingError

if TYPE_CHECKING:
    from lightning_vlm.data.dataset import OverlongPolicy, SampleDataset

_NAMED = 5
_FEWER_FRAMES = "show fewer frames or prune them (processor_options.video: num_frames, fps, pruning_rate)"


@dataclass(frozen=True, slots=True, eq=False)
class OverlongReport:
    """What a policy made of the overlong samples.

    Attributes:
        kept: Indices to train on, ascending.
        dropped: Indices that are left out, ascending.
        num_scaled: Samples whose images, or texts, were made smaller to fit.
        message: One sentence for the user; empty when there is nothing to say.
    """

    kept: np.ndarray
    dropped: np.ndarray
    num_scaled: int = 0
    message: str = ""


def find_overlong(table: LengthTable, limit: SampleLimit) -> np.ndarray:
    """Indices of the samples that exceed a limit, ascending, int64."""
    exceeds = table.tokens > limit.tokens
    if limit.patches is not None:
        exceeds = exceeds | (table.patches > limit.patches)
    return np.flatnonzero(exceeds)


def report_overlong(
    dataset: SampleDataset, table: LengthTable, limit: SampleLimit, policy: OverlongPolicy
) -> OverlongReport:
    """Applies a policy to the samples that exceed a limit.

    Args:
        dataset: The samples; only their places are asked for.
        table: Their lengths. For ``downscale_images`` and ``truncate_text``, measured with that policy and this limit.
        limit: The most that a sample may be.
        policy: ``error`` refuses, ``drop`` leaves out, ``downscale_images`` and ``truncate_text`` refuse what does not
            fit even so.

    Returns:
        The samples to train on, and what to tell the user.

    Raises:
        StoppingError: If the policy refuses, or would drop every sample; in one sentence, with the first few names.
        ValueError: If the policy is unknown.
    """
    if policy not in ("error", "drop", "truncate_text", "downscale_images"):
        raise ValueError(
            f"overlong={policy!r} is unknown; expected 'error', 'drop', 'truncate_text' or 'downscale_images'"
        )
    overlong, total = find_overlong(table, limit), len(table)
    everything = np.arange(total)
    num_scaled = int(table.scaled.sum()) if policy in ("downscale_images", "truncate_text") else 0
    if not len(overlong):
        what = "images of {} were made smaller" if policy == "downscale_images" else "texts of {} were cut at their end"
        scaled = f"the {what.format(_share(num_scaled, total))} to fit {limit}" if num_scaled else ""
        return OverlongReport(everything, overlong, num_scaled, scaled)
    found = f"{_share(len(overlong), total)} exceed{'s' if len(overlong) == 1 else ''} {limit}"
    names = _names(dataset, table, overlong, limit)
    if policy == "drop" and len(overlong) < total:
        kept = np.setdiff1d(everything, overlong, assume_unique=True)
        return OverlongReport(kept, overlong, 0, f"{found} and will not be trained on: {names}")
    raise_it = f"raise the limit, {f'{_FEWER_FRAMES}, ' if table.videos[overlong].any() else ''}"
    if policy == "truncate_text":
        found = f"{found} and cannot be cut without cutting an image or the whole answer"
        fix = f"{raise_it}or drop these samples"
    elif policy == "downscale_images":
        found, fix = f"{found} even with the smallest images", f"{raise_it}or drop these samples"
    elif policy == "drop":
        fix = raise_it.removesuffix(", ")
    elif table.images[overlong].any():
        fix = f"{raise_it}drop these samples (overlong: drop) or downscale_images (overlong: downscale_images)"
    else:
        fix = f"{raise_it}or drop these samples (overlong: drop)"
    raise StoppingError("data.overlong", f"{found}: {names}", fix, "too long")


def ways_to_shorten(conversation: Conversation) -> str:
    """What makes the media of one sample take fewer tokens: a list that ends with a comma, or nothing."""
    ways = {
        "make its images smaller (overlong: downscale_images, or processor_options: max_num_patches, max_tiles)": (
            conversation.images
        ),
        _FEWER_FRAMES: conversation.videos,
        "cut its sounds": conversation.sounds,
    }
    return "".join(f"{way}, " for way, media in ways.items() if media)


def _share(count: int, total: int) -> str:
    percent = 100 * count / total
    return f"{count:,} of {total:,} samples ({f'{percent:.1f}' if percent >= 0.1 else 'less than 0.1'} %)"


def _names(dataset: SampleDataset, table: LengthTable, overlong: np.ndarray, limit: SampleLimit) -> str:
    def size(index: int) -> str:
        return f"{table.tokens[index]:,} tokens, {table.patches[index]:,} patches"

    named = [f"{dataset.place(int(index))} ({size(index)})" for index in overlong[:_NAMED]]
    more = f" and {len(overlong) - _NAMED:,} more" if len(overlong) > _NAMED else ""
    # The longest in the unit that is exceeded most.
    excess = table.tokens[overlong] / limit.tokens
    if limit.patches is not None:
        excess = np.maximum(excess, table.patches[overlong] / limit.patches)
    longest = int(overlong[int(excess.argmax())])
    last = f", the longest being {dataset.place(longest)} ({size(longest)})" if len(overlong) > 1 else ""
    return f"{', '.join(named)}{more}{last}"
