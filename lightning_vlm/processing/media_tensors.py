"""Decoded media of one conversation -> the tensors that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor
from transformers import ParakeetFeatureExtractor

from lightning_vlm.geometry.images import ImageLayout
from lightning_vlm.geometry.sounds import SoundGeometry
from lightning_vlm.geometry.videos import VideoGeometry
from lightning_vlm.media.frames import frames_to_patches
from lightning_vlm.media.video import Video
from lightning_vlm.ops.pixels import normalize_patches
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
from lightning_vlm.processing.media_layout import Medium, SoundLayout, VideoLayout

Tensors = dict[str, Tensor]


def image_tensors(
    images: Sequence[Image.Image], layout: ImageLayout, processor: NemotronVLImageProcessor
) -> dict[str, Tensor | None]:
    """``pixel_values`` and ``image_grid_hw`` of images; both ``None`` without any.

    Args:
        images: RGB images.
        layout: Their grids.
        processor: Cuts them.
    """
    if not images:
        return {"pixel_values": None, "image_grid_hw": None}
    patches, _ = processor.patchify(list(images), layout)
    return {
        "pixel_values": patches,
        "image_grid_hw": torch.tensor([grid for tiles in layout.grids for grid in tiles]),
    }


def video_tensors(
    videos: Sequence[Video],
    layouts: Sequence[VideoLayout],
    geometry: VideoGeometry | None,
    processor: NemotronVLImageProcessor,
) -> Tensors:
    """``pixel_values_videos``, ``video_grid_thw`` and ``num_video_tokens`` of videos; nothing without any.

    Args:
        videos: Their chosen frames.
        layouts: What they become.
        geometry: The numbers.
        processor: Whether and how pixels are normalised.
    """
    if not videos:
        return {}
    assert geometry is not None, "the processor refuses videos that it has no settings for"
    frames, as_float = geometry.temporal_patch_size, bool(processor.do_normalize)
    patches = torch.cat(
        [
            frames_to_patches(video.frames, layout.grid, geometry.patch_size, frames, as_float)
            for video, layout in zip(videos, layouts, strict=True)
        ]
    )
    if as_float:
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        patches = normalize_patches(patches, mean, std, frames)
    return {
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([(len(layout.labels), *layout.grid) for layout in layouts]),
        "num_video_tokens": torch.tensor([layout.num_tokens for layout in layouts]),
    }


def sound_tensors(
    sounds: Sequence[Tensor], layouts: Sequence[SoundLayout], geometry: SoundGeometry | None, num_mel_bins: int
) -> Tensors:
    """``input_features`` and ``input_features_mask`` of the clips of sounds; nothing without any.

    Args:
        sounds: ``(num_samples,)`` each.
        layouts: Their clips.
        geometry: The numbers.
        num_mel_bins: Height of the spectrogram.
    """
    if not sounds:
        return {}
    assert geometry is not None, "the processor refuses sounds that it has no settings for"
    clips = []
    for sound, layout in zip(sounds, layouts, strict=True):
        silence = sum(layout.clip_lengths) - len(sound)
        clips += torch.nn.functional.pad(sound.float(), (0, silence)).split(list(layout.clip_lengths))
    extract = _extractor(num_mel_bins, geometry.sampling_rate, geometry.hop_length)
    # numpy: the extractor takes a list of tensors for a batch of its own
    found = extract([clip.numpy() for clip in clips], sampling_rate=geometry.sampling_rate, return_tensors="pt")
    return {"input_features": found["input_features"], "input_features_mask": found["attention_mask"].bool()}


def by_kind(media: Sequence[Medium]) -> tuple[list[Image.Image], list[Video], list[Tensor]]:
    """Images, videos and sounds, each in reading order.

    Args:
        media: In reading order.
    """
    return (
        [medium for medium in media if isinstance(medium, Image.Image)],
        [medium for medium in media if isinstance(medium, Video)],
        [medium for medium in media if isinstance(medium, Tensor)],
    )


@lru_cache(maxsize=4)  # its filter bank takes longer to make than a short sound to encode
def _extractor(num_mel_bins: int, sampling_rate: int, hop_length: int) -> ParakeetFeatureExtractor:
    return ParakeetFeatureExtractor(feature_size=num_mel_bins, sampling_rate=sampling_rate, hop_length=hop_length)
