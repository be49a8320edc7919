"""Video length and size -> frames, tubelets, patch grid, timestamps and number of tokens.

Whole numbers and header fields only, like `lightning_vlm.geometry.images`: a plan knows how long a video is before a
frame is decoded, efficient video sampling (EVS) included, because EVS decides which tokens stay, never how many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from lightning_vlm.geometry.images import Grid


@dataclass(frozen=True, slots=True)
class VideoGeometry:
    """How videos become frames, and frames patches and tokens.

    The defaults are Nemotron-3-Nano-Omni's but for ``num_frames``, of which that model is served up to 256: 128 is the
    number of Nemotron-Nano-12B-v2-VL, which shows every frame by itself as one square tile
    (``temporal_patch_size=1, keep_aspect=False``).

    Attributes:
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per side that pixel shuffle merges into one token.
        temporal_patch_size: Frames that are embedded together, a tubelet; 1 embeds each frame as an image.
        target_num_patches: About how many patches a frame gets (1,024 of 16 pixels are 512 x 512).
        keep_aspect: Whether a frame keeps its aspect ratio; otherwise it is squeezed into a square.
        num_frames: Most frames of one video.
        fps: Most frames per second of video; all, up to ``num_frames``, when ``None``.
        pruning_rate: Share of a video's tokens that EVS leaves out, in [0, 1).

    Raises:
        ValueError: If a number is out of its range.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    target_num_patches: int = 1024
    keep_aspect: bool = True
    num_frames: int = 128
    fps: float | None = 2.0
    pruning_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of videos is {getattr(self, name)}; expected at least 1")
        if self.target_num_patches < self.merge_size**2:
            raise ValueError(
                f"target_num_patches of videos is {self.target_num_patches}; expected at least one token's "
                f"{self.merge_size**2}"
            )
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps of videos is {self.fps}; expected more than 0, or none")
        if not 0 <= self.pruning_rate < 1:
            raise ValueError(f"pruning_rate of videos is {self.pruning_rate}; expected 0 (keep all) or more, below 1")

    def at(self, fps: float | None) -> Self:
        """The same with another ``fps``: that of a video whose row asks for one.

        Args:
            fps: The other one; ``None`` where the row asks for none.
        """
        return self if fps is None else replace(self, fps=fps)

    def grid(self, height: int, width: int) -> Grid:
        """The patch grid of every frame of a video.

        Source: Megatron-LM's resizing of video frames, as in vLLM and transformers: about ``target_num_patches`` in the
        frame's own aspect ratio, both sides made multiples of ``merge_size``, both up if that fits, else both down.

        Args:
            height: Of a frame, in pixels.
            width: Of a frame, in pixels.
        """
        if height < 1 or width < 1:
            raise ValueError(f"a video of {height} x {width} pixels (height x width) has no pixels")
        merge, target = self.merge_size, self.target_num_patches
        if not self.keep_aspect:
            side = max(merge, math.isqrt(target) // merge * merge)
            return side, side
        aspect = width / height
        rows, columns = max(round(math.sqrt(target / aspect)), 1), max(round(math.sqrt(target * aspect)), 1)
        up = (math.ceil(rows / merge) * merge, math.ceil(columns / merge) * merge)
        if up[0] * up[1] <= target:
            return up
        return max(merge, rows // merge * merge), max(merge, columns // merge * merge)

    def num_tubelets(self, num_frames: int) -> int:
        """Groups of ``temporal_patch_size`` frames; the last one is filled up with the last frame."""
        return math.ceil(num_frames / self.temporal_patch_size)

    def tokens_per_tubelet(self, grid: Grid) -> int:
        """Language-model tokens of one tubelet before pruning."""
        return grid[0] * grid[1] // self.merge_size**2

    def num_tokens(self, num_frames: int, grid: Grid) -> int:
        """Language-model tokens of the pictures of a video after pruning; separators between frames not counted."""
        return retained_tokens(self.tokens_per_tubelet(grid), self.num_tubelets(num_frames), self.pruning_rate)


def retained_tokens(tokens_per_tubelet: int, num_tubelets: int, pruning_rate: float) -> int:
    """How many tokens of a video EVS keeps: all of the first tubelet at least.

    Source: Efficient Video Sampling, arXiv 2510.14624, as in vLLM; the product is rounded down.

    Args:
        tokens_per_tubelet: Tokens of one tubelet.
        num_tubelets: Tubelets of the video.
        pruning_rate: Share that is left out.
    """
    return max(tokens_per_tubelet, int(tokens_per_tubelet * num_tubelets * (1 - pruning_rate)))


def uniform_frames(total: int, source_fps: float | None, geometry: VideoGeometry) -> list[int]:
    """Chooses frames evenly from the first to the last one.

    As many as ``fps`` takes of the video's duration, at most ``num_frames``, at least one. Source: vLLM's video loader
    (the one that the model cards name), its rounding down included.

    Args:
        total: Frames of the video, at least 1.
        source_fps: Its frames per second; without them the duration is unknown and ``fps`` has no effect.
        geometry: Gives ``fps`` and ``num_frames``.

    Returns:
        Numbers of the frames, rising.
    """
    count = min(total, geometry.num_frames)
    if geometry.fps and source_fps:
        count = min(count, math.floor(total / source_fps * geometry.fps))
    count = max(count, 1)
    if count in (1, total):
        return list(range(count))
    step = (total - 1) / (count - 1)  # the arithmetic of numpy.linspace, whose last value is set, not computed
    return [int(index * step) for index in range(count - 1)] + [total - 1]


def timestamps_s(indices: Sequence[int], source_fps: float) -> list[float]:
    """When each frame is shown, in seconds, counted in whole milliseconds per frame.

    ``int(1000 / fps)`` loses up to a millisecond per frame, and is part of the contract: serving computes the same
    text from the same whole number, wherever and in whatever precision it runs. Source: vLLM's nano_nemotron_vl.

    Args:
        indices: Numbers of the frames in the video.
        source_fps: Frames per second of the video.
    """
    duration_ms = int(1000.0 / source_fps)
    return [index * duration_ms / 1000.0 for index in indices]


def frame_labels(num_frames: int, times_s: Sequence[float] | None, temporal_patch_size: int) -> list[str]:
    """The text before each tubelet of a video.

    ``Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.50 seconds: `` before the first of two-frame tubelets,
    each further one on a line of its own; without times ``Frame 1 and frame 2: ``. Source: vLLM's nano_nemotron_vl,
    whose line breaks are those of training.

    Args:
        num_frames: Frames of the video.
        times_s: When each is shown, in seconds; ``None`` where nothing tells.
        temporal_patch_size: Frames of a tubelet.

    Returns:
        One text per tubelet, its line break included.
    """
    labels = []
    for start in range(0, num_frames, temporal_patch_size):
        names = [
            f"{'frame' if place else 'Frame'} {frame + 1}"
            + ("" if times_s is None else f" sampled at {times_s[frame]:.2f} seconds")
            for place, frame in enumerate(range(start, min(start + temporal_patch_size, num_frames)))
        ]
        labels.append(("\n" if start else "") + " and ".join(names) + ": ")
    return labels
