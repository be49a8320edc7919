"""Media of one conversation -> how many tokens each becomes, and the text around them: from sizes alone.

`NemotronVLProcessor.encode` and `measure` share it, so what is planned is what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from lightning_vlm.geometry.images import Grid
from lightning_vlm.geometry.sounds import SoundGeometry
from lightning_vlm.geometry.videos import VideoGeometry, frame_labels, timestamps_s, uniform_frames
from lightning_vlm.media.audio import AudioInfo
from lightning_vlm.media.video import Video, VideoInfo

Medium = Image.Image | Video | Tensor
"""A decoded medium: an image, the chosen frames of a video, or the ``(num_samples,)`` samples of a sound."""

MediumSize = tuple[int, int] | VideoInfo | AudioInfo
"""What a header says: (height, width) of an image in pixels, or what a video or a sound says of itself."""


@dataclass(frozen=True, slots=True)
class VideoLayout:
    """What a video becomes.

    Attributes:
        grid: Patches of each frame.
        labels: The text before each tubelet.
        tokens_per_tubelet: Placeholders of each tubelet as the processor writes them: those of a pruned video all stand
            in the first, for which ones stay is not known yet.
    """

    grid: Grid
    labels: tuple[str, ...]
    tokens_per_tubelet: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(self.tokens_per_tubelet)

    @property
    def num_patches(self) -> int:
        """Vision patches."""
        return len(self.labels) * self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class SoundLayout:
    """What a sound becomes.

    Attributes:
        clip_lengths: Samples of each clip, silence at the end included.
        num_tokens: Tokens of all clips.
    """

    clip_lengths: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class MediaSizes:
    """The media of a conversation by kind, each in reading order.

    Attributes:
        images: (height, width) in pixels.
        videos: Their layouts.
        sounds: Their layouts.
    """

    images: tuple[tuple[int, int], ...]
    videos: tuple[VideoLayout, ...]
    sounds: tuple[SoundLayout, ...]

    @property
    def video_patches(self) -> int:
        """Vision patches of all videos."""
        return sum(video.num_patches for video in self.videos)


def lay_out_video(
    num_frames: int, height: int, width: int, times_s: Sequence[float] | None, geometry: VideoGeometry
) -> VideoLayout:
    """Lays a video out.

    Args:
        num_frames: Frames that were chosen.
        height: Of a frame, in pixels.
        width: Of a frame, in pixels.
        times_s: When each is shown, where it is known.
        geometry: The numbers.
    """
    grid, tubelets = geometry.grid(height, width), geometry.num_tubelets(num_frames)
    size, kept = geometry.tokens_per_tubelet(grid), geometry.num_tokens(num_frames, grid)
    whole = kept == size * tubelets
    counts = (size,) * tubelets if whole else (kept, *(0,) * (tubelets - 1))
    return VideoLayout(grid, tuple(frame_labels(num_frames, times_s, geometry.temporal_patch_size)), counts)


def lay_out_sound(num_samples: int, geometry: SoundGeometry) -> SoundLayout:
    """Lays a sound out.

    Args:
        num_samples: At the geometry's rate.
        geometry: The numbers.
    """
    lengths = geometry.clip_lengths(num_samples)
    return SoundLayout(tuple(lengths), sum(geometry.clip_tokens(length) for length in lengths))


def media_sizes(
    media: Sequence[Medium | MediumSize],
    video: VideoGeometry | None,
    sound: SoundGeometry | None,
    sampling_fps: Iterable[float | None] = (),
) -> MediaSizes:
    """Sorts media by kind and lays out those whose size does not depend on the text around them.

    Args:
        media: Decoded, or what their headers say, in reading order.
        video: Of videos; ``None`` only where there are none.
        sound: Of sounds; ``None`` only where there are none.
        sampling_fps: Of each video that is not decoded, see `VideoRef`; those of ``video`` where left out.
    """
    asked = iter(sampling_fps)
    images: list[tuple[int, int]] = []
    videos: list[VideoLayout] = []
    sounds: list[SoundLayout] = []
    for medium in media:
        if isinstance(medium, Image.Image):
            images.append((medium.height, medium.width))
        elif isinstance(medium, tuple):
            images.append(medium)
        elif isinstance(medium, Video | VideoInfo):
            assert video is not None, "the processor refuses videos that it has no settings for"
            videos.append(_video(medium, video.at(next(asked, None))))
        else:
            assert sound is not None, "the processor refuses sounds that it has no settings for"
            rate = sound.sampling_rate
            num_samples = medium.num_samples_at(rate) if isinstance(medium, AudioInfo) else len(medium)
            sounds.append(lay_out_sound(num_samples, sound))
    return MediaSizes(tuple(images), tuple(videos), tuple(sounds))


def checked_settings(kind: Literal["video", "sound"], given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of videos or sounds as they were given, if all are known and of the right type.

    Args:
        kind: Of which.
        given: Options of the processor; ``None`` where it has none.

    Raises:
        ValueError: If one is not: a dataclass would name its own constructor, or fail when it computes.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"the {kind} settings are {given!r}; expected options by name, e.g. {_EXAMPLES[kind]}")
    for name, value in given.items():
        if name not in _SETTINGS[kind]:
            raise ValueError(f"{kind} has no option {name!r}; expected some of {', '.join(_SETTINGS[kind])}")
        what, types = _SETTINGS[kind][name]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ValueError(f"{kind}.{name} is {value!r}; expected {what}")
    return given


_TYPES: dict[str, tuple[str, Any]] = {
    "int": ("a whole number", int),
    "bool": ("true or false", bool),
    "float": ("a number", int | float),
    "float | None": ("a number, or null", int | float | None),
}
_IMAGES_OWN = ("patch_size", "merge_size")  # a frame is cut as an image is
_SETTINGS = {
    "video": {field.name: _TYPES[str(field.type)] for field in fields(VideoGeometry) if field.name not in _IMAGES_OWN},
    "sound": {field.name: _TYPES[str(field.type)] for field in fields(SoundGeometry)} | {"num_mel_bins": _TYPES["int"]},
}
_EXAMPLES = {"video": "{num_frames: 32}", "sound": "{clip_s: 30.0}"}


def _video(video: Video | VideoInfo, geometry: VideoGeometry) -> VideoLayout:
    if isinstance(video, Video):
        indices, info = list(video.indices), video.info
        height, width = video.frames[0].height, video.frames[0].width
    else:
        indices, info = uniform_frames(video.num_frames, video.fps, geometry), video
        height, width = video.height, video.width
    times = timestamps_s(indices, info.fps) if info.fps else None
    return lay_out_video(len(indices), height, width, times, geometry)
