"""The three contracts of the data path: Conversation -> Sample -> VLMBatch.

Each stage hands exactly one of these to the next, so a stage can be read, tested or replaced alone. The
trade-off is a little copying between plain dataclasses in exchange for shapes that are checked where they are
made. The error that every room of the data path raises, `DataError`, lives here too: it names the place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not trained on (the value that PyTorch's and transformers' losses ignore)."""

TEXT, IMAGE, VIDEO, SOUND = range(4)
"""What a token stands for, as ``mm_token_type_ids`` say it."""

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """Wrong input, told in one sentence: the place, what was found, what was expected, what to change.

    Args:
        source: Where the input came from, e.g. ``train.jsonl:12``.
        problem: What was found and what was expected.
        fix: What the user can change.
        kind: What is wrong, in two or three words that do not depend on the row: what reports count by.
    """

    def __init__(self, source: str, problem: str, fix: str, kind: str = "row not acceptable") -> None:
        super().__init__(source, problem, fix, kind)
        self.source, self.problem, self.fix, self.kind = source, problem, fix, kind

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}; {self.fix}."


class StoppingError(DataError):
    """Wrong input that is no single bad sample, but a setting or a change under way: it stops what it happens in."""


def file_of(source: str) -> str:
    """The file of a place: ``file:line`` without the line."""
    return source.rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text inside a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes inside a larger file, read when they are needed: a member of a tar shard.

    Attributes:
        path: The larger file; its reader chose it, no row did.
        offset: First byte.
        size: Number of bytes.
        name: The member's name, for errors.
    """

    path: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image inside a turn.

    Attributes:
        ref: Its name, looked up by the media policy (path under the media root, ``data:`` URI, allowed URL); or the
            image itself: encoded bytes, a `FileSlice`, a PIL image, an array of pixels.
    """

    ref: Any


@dataclass(frozen=True, slots=True)
class VideoRef:
    """A video inside a turn.

    Attributes:
        ref: As of `ImageRef`, of a video file; or a tuple of images, its frames.
        fps: Frames per second of such frames, where the row tells; a file tells by itself.
        sampling_fps: Frames per second to take of a file, where the row asks for other ones than the processor's.
    """

    ref: Any
    fps: float | None = None
    sampling_fps: float | None = None


@dataclass(frozen=True, slots=True)
class AudioRef:
    """A sound inside a turn.

    Attributes:
        ref: As of `ImageRef`, of a sound file; or a pair (samples, sampling rate in Hz).
    """

    ref: Any


MediaRef = ImageRef | VideoRef | AudioRef
Part = Text | MediaRef


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: who speaks, and its text and media in reading order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's text without its media."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a row of data means, whatever format it was written in. Nothing is decoded or tokenised yet.

    Attributes:
        turns: The messages in order.
        source: ``file:line`` of the row; every error names it.
        references: Accepted answers for scoring the last assistant turn; that turn's own text when the row
            names none.
        notes: What its reader changed to make sense of the row, e.g. that it placed an image.
    """

    turns: tuple[Turn, ...]
    source: str
    references: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """All images, videos and sounds in reading order."""
        return tuple(part for turn in self.turns for part in turn.parts if not isinstance(part, Text))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in reading order."""
        return tuple(part for part in self.media if isinstance(part, ImageRef))

    @property
    def videos(self) -> tuple[VideoRef, ...]:
        """All videos in reading order."""
        return tuple(part for part in self.media if isinstance(part, VideoRef))

    @property
    def sounds(self) -> tuple[AudioRef, ...]:
        """All sounds in reading order."""
        return tuple(part for part in self.media if isinstance(part, AudioRef))


MEDIA_FIELDS = (
    "pixel_values",
    "image_grid_hw",
    "pixel_values_videos",
    "video_grid_thw",
    "num_video_tokens",
    "input_features",
    "input_features_mask",
)
"""Media of a `Sample` and of a `VLMBatch`, as `NemotronVL.forward` takes them."""


@dataclass(slots=True)
class Sample:
    """One conversation as tensors. Nothing is shifted or padded; what there is none of is ``None``.

    Attributes:
        input_ids: ``(L,)`` int64.
        labels: ``(L,)`` int64, equal to ``input_ids`` where trained on and -100 elsewhere.
        pixel_values: ``(num_patches, 3 * patch_size**2)`` of images, uint8 pixels or normalised floats.
        image_grid_hw: ``(num_images, 2)`` int64 patch grid (height, width) per image (per tile in static
            mode).
        prompt_length: Number of leading tokens that a model is given before it answers the last assistant
            turn.
        prompt: That prompt as text, with one ``<image>`` per image: for people to read.
        references: Accepted answers.
        source: ``file:line`` of the row.
        mm_token_type_ids: ``(L,)`` int64 of `TEXT`, `IMAGE`, `VIDEO` and `SOUND`; left out where all media are images.
        pixel_values_videos: ``(num_patches, frames_per_tubelet * 3 * patch_size**2)`` of videos, likewise.
        video_grid_thw: ``(num_videos, 3)`` int64 tubelets, rows and columns of patches of each video.
        num_video_tokens: ``(num_videos,)`` int64 tokens that each video keeps.
        input_features: ``(num_clips, num_frames, num_mel_bins)`` spectrograms of sounds, clip after clip.
        input_features_mask: ``(num_clips, num_frames)`` bool, true for frames that count.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    image_grid_hw: Tensor | None
    prompt_length: int
    prompt: str
    references: tuple[str, ...]
    source: str
    mm_token_type_ids: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    num_video_tokens: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_patches(self) -> int:
        """Vision patches of its images and videos."""
        return sum(len(patches) for patches in (self.pixel_values, self.pixel_values_videos) if patches is not None)

    @property
    def num_label_tokens(self) -> int:
        """How many tokens the loss of this sample is summed over (the first token has no prediction)."""
        return count_label_tokens(self.labels[None])


def count_label_tokens(labels: Tensor) -> int:
    """Counts the tokens that a next-token loss trains on.

    Args:
        labels: ``(B, T)``, aligned with the input (not shifted).

    Returns:
        The number of labels other than -100, without column 0, which nothing predicts.
    """
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def join_media(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The media of several samples, one after another, by the names of `MEDIA_FIELDS`.

    Args:
        samples: The samples.

    Returns:
        What there is; clips of sound are padded to the longest with zeros.
    """
    joined = {}
    for name in MEDIA_FIELDS:
        found = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if found:
            joined[name] = torch.cat(_to_longest(found) if name.startswith("input_features") else found)
    return joined


def token_types(samples: Sequence[Sample]) -> list[Tensor] | None:
    """Token types of each sample, where any has some: one without them has none but images, which need no telling.

    Args:
        samples: The samples.
    """
    found = [sample.mm_token_type_ids for sample in samples]
    if all(types is None for types in found):
        return None
    return [torch.zeros_like(sample.input_ids) if types is None else types for sample, types in zip(samples, found)]


def _to_longest(clips: list[Tensor]) -> list[Tensor]:
    frames = max(clip.shape[1] for clip in clips)
    after = (0, 0) * (clips[0].ndim - 2)
    return [torch.nn.functional.pad(clip, (*after, 0, frames - clip.shape[1])) for clip in clips]


@dataclass(slots=True, repr=False)
class VLMBatch:
    """What a training or evaluation step receives.

    With ``cu_seqlens`` the batch is one packed row ``(1, T)`` of ``B`` documents; without, ``B`` right-padded rows
    ``(B, T)``. What is said per sample is said per document or per row.

    Attributes:
        input_ids: ``(B, T)`` or ``(1, T)`` int64.
        labels: The same shape, -100 where not trained on; aligned with ``input_ids``, not shifted.
        attention_mask: ``(B, T)`` int64, 1 for tokens and 0 for padding; ``None`` for a packed row, which has none.
        pixel_values: All images of the batch, one after another, see `Sample`; ``None`` without any, like all media.
        image_grid_hw: ``(num_images, 2)`` int64.
        num_images: ``(B,)`` int64 rows of ``image_grid_hw`` that belong to each sample.
        prompt_lengths: ``(B,)`` int64, see `Sample.prompt_length`.
        prompts: ``B`` prompts as text.
        references: ``B`` tuples of accepted answers.
        sources: ``B`` places, for error messages and prediction tables.
        counted: ``(B,)`` bool; False for a stand-in row that only keeps ranks in step and must not be
            counted.
        num_label_tokens: Label tokens in this micro-batch.
        step_label_tokens: Label tokens in all micro-batches of this rank's optimizer step; the loader fills
            it in.
        cu_seqlens: ``(B + 1,)`` int32 document boundaries of a packed row, or ``None``.
        indices: ``(B,)`` int64 numbers of the samples in their dataset; the loader fills them in.
        skipped: Planned samples that are not in the batch because they are bad: the number of each, and what is wrong.
        mm_token_type_ids: The shape of ``input_ids``; ``None`` where all media are images.
        pixel_values_videos: All videos of the batch.
        video_grid_thw: ``(num_videos, 3)`` int64.
        num_video_tokens: ``(num_videos,)`` int64.
        num_videos: ``(B,)`` int64 videos of each sample.
        input_features: All clips of the batch, those of all samples padded to the longest.
        input_features_mask: ``(num_clips, num_frames)`` bool.
        num_clips: ``(B,)`` int64 clips of each sample.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    pixel_values: Tensor | None
    image_grid_hw: Tensor | None
    num_images: Tensor
    prompt_lengths: Tensor
    prompts: list[str]
    references: list[tuple[str, ...]]
    sources: list[str]
    counted: Tensor
    num_label_tokens: int
    step_label_tokens: int = 0
    cu_seqlens: Tensor | None = None
    indices: Tensor | None = None
    skipped: list[tuple[int, DataError]] = field(default_factory=list)
    mm_token_type_ids: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    num_video_tokens: Tensor | None = None
    num_videos: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    num_clips: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        rows, columns = self.input_ids.shape
        shape = (
            f"{rows} x {columns} tokens" if self.cu_seqlens is None else f"{columns} tokens of {len(self)} documents"
        )
        images = 0 if self.image_grid_hw is None else len(self.image_grid_hw)
        videos = "" if self.video_grid_thw is None else f", {len(self.video_grid_thw)} videos"
        sounds = "" if self.input_features is None else f", {len(self.input_features)} clips of sound"
        return f"VLMBatch({shape}, {images} images{videos}{sounds}, {self.num_label_tokens} label tokens)"

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def model_inputs(self) -> dict[str, Tensor]:
        """The tensors that `NemotronVL.forward` takes, without labels."""
        names = ("input_ids", "attention_mask", "cu_seqlens", "mm_token_type_ids")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given | self.media_inputs()

    def without_media(self) -> Self:
        """The same batch for those that look at no medium: only how many there are is left."""
        return replace(self, **dict.fromkeys(MEDIA_FIELDS))  # type: ignore[arg-type]

    def media_inputs(self) -> dict[str, Tensor]:
        """The media among them."""
        names = (*MEDIA_FIELDS, "num_images", "num_videos", "num_clips")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Moves every tensor, in place, and returns the batch (Lightning calls it on a custom batch)."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Pins every tensor, in place, and returns the batch (the call that a DataLoader makes)."""
        return self._apply(lambda tensor: tensor.pin_memory())

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                setattr(self, item.name, function(value))
        return self
