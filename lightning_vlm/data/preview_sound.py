"""Clips of a sample's sounds -> pictures of their spectrograms, as the model gets them: made without a plot library.

Time runs to the right, pitch upwards, brightness is the normalised logarithm of energy. Lines stand between the frames
of two tokens where a token is wide enough; a long clip is averaged over neighbouring frames instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from PIL import Image

from lightning_vlm.data.preview_image import TOKEN_LINE, said_tokens
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import Sample

MOST_CLIPS = 8
"""Clips of one sound that are shown."""

_HEIGHT, _WIDTH, _LARGEST_WIDTH = 96, 480, 960  # of a picture, in pixels, about
_NARROWEST_TOKEN = 8  # pixels; lines between narrower ones would cover the picture
_COLOURS = [(4, 5, 20), (70, 20, 110), (180, 50, 90), (240, 130, 40), (252, 250, 190)]  # from quiet to loud
_LINE = 255  # the colour after them in a picture's palette


@dataclass(frozen=True, slots=True, eq=False)
class PreviewClip:
    """A part of a sound that is encoded by itself.

    Attributes:
        features: ``(num_frames, num_mel_bins)``; masked frames left out.
        num_tokens: Its tokens.
        duration_s: Its length in seconds, silence at the end included.
        frames_per_token: Spectrogram frames that become one token.
    """

    features: np.ndarray
    num_tokens: int
    duration_s: float
    frames_per_token: int

    def __str__(self) -> str:
        return f"{self.duration_s:.2f} s, {said_tokens(self.num_tokens)}"

    def picture(self) -> Image.Image:
        """Its spectrogram, with lines between tokens."""
        return draw_spectrogram(self.features, self.frames_per_token)


@dataclass(frozen=True, slots=True, eq=False)
class PreviewSound:
    """One sound as the model gets it.

    Attributes:
        clips: Its clips in order.
        lossless: Whether its pictures have to be kept to the pixel.
    """

    clips: tuple[PreviewClip, ...]
    lossless: ClassVar[bool] = True  # few colours: smaller than as JPEG

    @property
    def num_tokens(self) -> int:
        """Language-model tokens, start and end markers not counted."""
        return sum(clip.num_tokens for clip in self.clips)

    def __str__(self) -> str:
        duration_s = sum(clip.duration_s for clip in self.clips)
        clips = "" if len(self.clips) == 1 else f" in {len(self.clips):,} clips"
        return f"{duration_s:.2f} s{clips}, {said_tokens(self.num_tokens)}"

    def __repr__(self) -> str:
        return f"PreviewSound({self})"

    @property
    def caption(self) -> str:
        """What is said of it beside its pictures."""
        return str(self)

    def parts(self) -> list[tuple[str, list[Image.Image]]]:
        """The spectrograms of its first clips, each by its name where there are several; and how many there are."""
        several = len(self.clips) > 1
        parts = [
            (f"clip {number}: {clip}" if several else "", [clip.picture()])
            for number, clip in enumerate(self.clips[:MOST_CLIPS], start=1)
        ]
        if len(self.clips) > MOST_CLIPS:
            parts.append((f"the first {MOST_CLIPS} of {len(self.clips):,} clips are shown", []))
        return parts


def sample_sounds(sample: Sample, tokens: Sequence[int], processor: NemotronVLProcessor) -> list[PreviewSound]:
    """The sounds of one sample.

    Args:
        sample: The sample.
        tokens: Per sound, its tokens in the text: they say which clips belong together.
        processor: What made it.

    Raises:
        ValueError: If text and clips are not of the same tokens.
    """
    clips: list[PreviewClip] = []
    if sample.input_features is not None and sample.input_features_mask is not None:
        geometry = processor.sound_geometry
        assert geometry is not None, "a processor without sound settings makes no sample with sounds"
        for features, counts in zip(sample.input_features, sample.input_features_mask, strict=True):
            length = int(counts.sum()) * geometry.hop_length
            own = features[counts].float().numpy()
            duration_s = length / geometry.sampling_rate
            clips.append(PreviewClip(own, geometry.clip_tokens(length), duration_s, geometry.subsampling_factor))
    ends = np.cumsum([0, *(clip.num_tokens for clip in clips)]).tolist()
    borders = np.cumsum([0, *tokens]).tolist()
    if ends[-1] != borders[-1] or not set(borders) <= set(ends):
        raise ValueError(
            f"the text has sounds of {list(tokens)} tokens for clips of {[clip.num_tokens for clip in clips]}"
        )
    places = [ends.index(border) for border in borders]
    return [PreviewSound(tuple(clips[start:end])) for start, end in pairwise(places)]


def draw_spectrogram(features: np.ndarray, frames_per_token: int | None = None) -> Image.Image:
    """Draws a spectrogram.

    Args:
        features: ``(num_frames, num_mel_bins)``, of one frame at least.
        frames_per_token: Frames between two lines; no lines when ``None``.

    Returns:
        A picture with a palette.
    """
    num_frames, bins = features.shape
    joined = max(1, -(-num_frames // _LARGEST_WIDTH))
    padded = np.pad(features, ((0, -num_frames % joined), (0, 0)), mode="edge")
    frames = padded.reshape(-1, joined, bins).mean(axis=1)
    low, high = np.percentile(frames, (1, 99.8))  # a single loud or silent frame does not set the scale
    levels = ((frames - low) / max(high - low, 1e-6)).clip(0, 1) * (_LINE - 1)
    scale = -(-_WIDTH // len(frames))
    columns = np.arange(len(frames)).repeat(scale)
    pixels = levels.round().astype(np.uint8)[columns].T[::-1].repeat(max(1, _HEIGHT // bins), axis=0)
    if frames_per_token and joined == 1 and frames_per_token * scale >= _NARROWEST_TOKEN:
        pixels = np.insert(pixels, range(frames_per_token * scale, pixels.shape[1], frames_per_token * scale), _LINE, 1)
    picture = Image.fromarray(pixels)
    picture.putpalette(_palette())
    return picture


def _palette() -> bytes:
    stops = np.linspace(0, _LINE - 1, len(_COLOURS))
    shades = [np.interp(np.arange(_LINE), stops, channel) for channel in zip(*_COLOURS)]
    return np.stack(shades, -1).round().astype(np.uint8).tobytes() + bytes(TOKEN_LINE)
