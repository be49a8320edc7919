"""Tubelets of a sample -> frames for people, with the grid of the model's tokens drawn between the pixels.

A video is many pictures, so unlike an image it is not shown whole: of a long one some tubelets stand for all, evenly
taken, and large frames are reduced. How many there are is said beside them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from lightning_vlm.data.preview_image import draw_grid, pixels_to_uint8, said_tokens
from lightning_vlm.geometry.images import Grid
from lightning_vlm.media.frames import patches_to_frames
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import Sample

MOST_FRAMES = 16
"""Frames of one video that are shown, those of one tubelet at least."""
LARGEST_SIDE = 400
"""Frames with a longer side, in pixels, are reduced."""

_SMALLEST_SIDE = 128  # smaller frames are enlarged to about this many pixels
# How the label of a tubelet ends, see `lightning_vlm.geometry.videos.frame_labels`: with its last frame's number.
_LAST_FRAME = re.compile(r"[Ff]rame (\d+)(?: sampled at [\d.]+ seconds)?: $")
_LONGEST_LABEL = 64  # tokens, one per character, that hold at least the last frame's part of a label


@dataclass(frozen=True, slots=True, eq=False)
class PreviewVideo:
    """One video as the model gets it.

    Attributes:
        tubelets: ``(num_shown, frames_per_tubelet, H, W, 3)`` uint8, those that are shown.
        shown: Their numbers, from 0.
        num_tubelets: How many there are.
        num_frames: Frames of the video; what fills its last tubelet up is not counted.
        patches: Rows and columns of patches in each frame.
        num_tokens: Language-model tokens, start and end markers and labels not counted.
        patch_size: Side of a patch, in pixels.
        merge_size: Patches per side that become one token.
        lossless: Whether its pictures have to be kept to the pixel.
    """

    tubelets: np.ndarray
    shown: tuple[int, ...]
    num_tubelets: int
    num_frames: int
    patches: Grid
    num_tokens: int
    patch_size: int
    merge_size: int
    lossless: ClassVar[bool] = False

    @property
    def tokens_per_tubelet(self) -> int:
        """Tokens of a tubelet before pruning."""
        return self.patches[0] * self.patches[1] // self.merge_size**2

    @property
    def is_pruned(self) -> bool:
        """Whether some of its tokens are left out."""
        return self.num_tokens < self.num_tubelets * self.tokens_per_tubelet

    @property
    def size(self) -> str:
        """Number, height and width of its frames, as the model gets them."""
        height, width = (side * self.patch_size for side in self.patches)
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames:,} frames"
        return f"{frames} of {height} x {width} pixels"

    def __str__(self) -> str:
        tubelets = "1 tubelet" if self.num_tubelets == 1 else f"{self.num_tubelets:,} tubelets"
        return f"{tubelets} of {self.patches[0]} x {self.patches[1]} patches, {self._said_tokens()}"

    def __repr__(self) -> str:
        return f"PreviewVideo({self.size}, {self})"

    @property
    def caption(self) -> str:
        """What is said of it beside its pictures."""
        return f"{self.size}, {self}"

    def parts(self) -> list[tuple[str, list[Image.Image]]]:
        """The shown frames with their grids, tubelet by tubelet, each by its name; and how many there are."""
        parts = [(self._name(tubelet), frames) for tubelet, frames in zip(self.shown, self.pictures(), strict=True)]
        if len(self.shown) < self.num_tubelets:
            frames = sum(self._last_frame(tubelet) - self._first_frame(tubelet) + 1 for tubelet in self.shown)
            parts.append((f"{frames} of {self.num_frames:,} frames are shown", []))
        return parts

    def frames_of(self, tubelet: int) -> str:
        """The numbers of a tubelet's frames as its label has them, e.g. ``frames 3-4``.

        Args:
            tubelet: Its number, from 0.
        """
        return _said_frames(self._first_frame(tubelet), self._last_frame(tubelet))

    def markers(self, number: int) -> list[str]:
        """What is shown in place of each run of its placeholders.

        Args:
            number: Of the video in its sample, from 1.
        """
        if self.is_pruned:  # all stand in the first tubelet
            return [f"<video {number}, {_said_frames(1, self.num_frames)}: {self._said_tokens()}>"]
        tokens = said_tokens(self.tokens_per_tubelet)
        return [f"<video {number}, {self.frames_of(tubelet)}: {tokens}>" for tubelet in range(self.num_tubelets)]

    def pictures(self) -> list[list[Image.Image]]:
        """The shown frames with their grids, tubelet by tubelet."""
        return [[self._picture(frame) for frame in frames] for frames in self.tubelets]

    def _picture(self, frame: np.ndarray) -> Image.Image:
        cell, longest = self.patch_size * self.merge_size, max(frame.shape)
        factor = next((n for n in range(1, cell) if cell % n == 0 and longest <= n * LARGEST_SIDE), cell)
        if factor > 1:  # by a divisor of a token's side, so that lines stand where they did
            frame = np.asarray(Image.fromarray(frame).reduce(factor))
        return draw_grid(frame, cell // factor, frame.shape[:2], max(1, _SMALLEST_SIDE // longest))

    def _name(self, tubelet: int) -> str:
        is_filled_up = self._first_frame(tubelet + 1) > self.num_frames + 1
        return self.frames_of(tubelet) + (f", frame {self.num_frames} repeated" if is_filled_up else "")

    def _first_frame(self, tubelet: int) -> int:
        return tubelet * self.tubelets.shape[1] + 1

    def _last_frame(self, tubelet: int) -> int:
        return min(self._first_frame(tubelet + 1) - 1, self.num_frames)

    def _said_tokens(self) -> str:
        whole = self.num_tubelets * self.tokens_per_tubelet
        return said_tokens(self.num_tokens) + (f" ({whole:,} before pruning)" if self.is_pruned else "")


def sample_videos(
    sample: Sample, runs: Sequence[tuple[int, int]], processor: NemotronVLProcessor
) -> list[PreviewVideo]:
    """The videos of one sample.

    Args:
        sample: The sample.
        runs: (start, length) of each unbroken run of placeholders of videos in its text.
        processor: What made it.

    Raises:
        ValueError: If text and videos are not of the same tokens.
    """
    patches, grids, counts = sample.pixel_values_videos, sample.video_grid_thw, sample.num_video_tokens
    if patches is None or grids is None or counts is None:
        if runs:
            raise ValueError(f"the text has {sum(length for _, length in runs)} video tokens, but there is no video")
        return []
    geometry = processor.video_geometry
    assert geometry is not None, "a processor without video settings makes no sample with videos"
    videos: list[PreviewVideo] = []
    remaining, ids = list(runs), sample.input_ids.tolist()
    sizes = grids.prod(dim=1).tolist()
    for own, (tubelets, rows, columns), count in zip(
        patches.split(sizes), grids.tolist(), counts.tolist(), strict=True
    ):
        size = geometry.tokens_per_tubelet((rows, columns))
        expected = [size] * tubelets if count == size * tubelets else [count]
        found, remaining = remaining[: len(expected)], remaining[len(expected) :]
        if [length for _, length in found] != expected:
            raise ValueError(
                f"the text has runs of {[length for _, length in found]} tokens for video {len(videos) + 1}, expected "
                f"{expected}"
            )
        frames = geometry.temporal_patch_size
        shown = _evenly(tubelets, max(1, MOST_FRAMES // frames))
        chosen = own.unflatten(0, (tubelets, -1))[list(shown)].flatten(0, 1)
        pixels = pixels_to_uint8(patches_to_frames(chosen, (rows, columns), frames), processor.image_processor)
        videos.append(
            PreviewVideo(
                tubelets=pixels.unflatten(0, (-1, frames)).movedim(2, -1).numpy(),
                shown=shown,
                num_tubelets=tubelets,
                num_frames=_num_frames(ids, max(found[0][0] - 1, 0), tubelets, frames, processor),
                patches=(rows, columns),
                num_tokens=count,
                patch_size=geometry.patch_size,
                merge_size=geometry.merge_size,
            )
        )
    if remaining:
        raise ValueError(f"the text has {sum(length for _, length in remaining)} more video tokens than its videos")
    return videos


def _num_frames(ids: list[int], start: int, tubelets: int, frames: int, processor: NemotronVLProcessor) -> int:
    """The video's own frames, from the label of its last tubelet: tensors do not tell what only fills it up."""
    starts = [place for place, token in enumerate(ids[start:], start) if token == processor.image_start_token_id]
    before = ids[: starts[tubelets - 1]] if len(starts) >= tubelets else []
    text = processor.tokenizer.decode(before[-_LONGEST_LABEL:], clean_up_tokenization_spaces=False)
    found = _LAST_FRAME.search(text)
    told = int(found[1]) if found else 0
    return told if (tubelets - 1) * frames < told <= tubelets * frames else tubelets * frames


def _evenly(total: int, most: int) -> tuple[int, ...]:
    return tuple(sorted({round(place) for place in np.linspace(0, total - 1, min(total, most)).tolist()}))


def _said_frames(first: int, last: int) -> str:
    return f"frame {first}" if first == last else f"frames {first}-{last}"
