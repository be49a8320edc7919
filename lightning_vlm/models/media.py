"""Media of a batch -> features, and features -> their places in the text. One pass per kind, in a fixed order.

Images and videos share a placeholder token; ``mm_token_type_ids``, transformers' name for it, tells them apart. What a
batch has none of may still have to be run, for the sake of other ranks: see `lightning_vlm.models.absent_media`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_vlm.models.absent_media import absent_features, weight_zero
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.evs import lay_out_videos, prune_videos
from lightning_vlm.models.fusion import FusionError, fuse, placeholders_per_row, refuse_placeholders
from lightning_vlm.schema import VIDEO
from lightning_vlm.segments import Documents

Kind = Literal["image", "video", "sound"]
KINDS: tuple[Kind, ...] = ("image", "video", "sound")
"""In the order in which they are encoded; their ``mm_token_type_ids`` are `lightning_vlm.schema`'s."""


@dataclass(slots=True)
class MediaInputs:
    """What `NemotronVL.forward` is given of media; see there.

    Attributes:
        pixel_values: Patches of images.
        image_grid_hw: Grids of images.
        num_images: Images of each row.
        pixel_values_videos: Patches of tubelets.
        video_grid_thw: Grids of videos.
        num_video_tokens: Tokens that each video keeps.
        num_videos: Videos of each row.
        input_features: Spectrograms of clips.
        input_features_mask: Their frames that count.
        num_clips: Clips of each row.
    """

    pixel_values: Tensor | None = None
    image_grid_hw: Tensor | None = None
    num_images: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    num_video_tokens: Tensor | None = None
    num_videos: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    num_clips: Tensor | None = None

    def has(self, kind: Kind) -> bool:
        """Whether there is any medium of a kind."""
        values = {"image": self.pixel_values, "video": self.pixel_values_videos, "sound": self.input_features}
        return values[kind] is not None

    def per_row(self, kind: Kind) -> list[int] | None:
        """How many media of a kind each row has, where it is known."""
        counts = {"image": self.num_images, "video": self.num_videos, "sound": self.num_clips}[kind]
        return None if counts is None else counts.tolist()


@dataclass(slots=True)
class Features:
    """Media of one kind as language-model tokens.

    Attributes:
        values: ``(num_tokens, hidden_size)``, one medium after another.
        counts: Tokens of each medium.
        tokens_per_tubelet: Of each video, where some of its tokens were left out.
    """

    values: Tensor
    counts: list[int]
    tokens_per_tubelet: list[Tensor] | None = None


def embed_with_media(
    model: Any,
    media: MediaInputs,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    token_types: Tensor | None,
    documents: Documents | None,
    cache: Cache | None,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of a batch with its media in their places.

    Args:
        model: The `NemotronVL`.
        media: The batch's media.
        input_ids: ``(B, T)``; may be left out with ``inputs_embeds``.
        inputs_embeds: ``(B, T, D)`` instead of those of ``input_ids``.
        labels: ``(B, T)``, in step with ``input_ids``.
        token_types: ``(B, T)``, see `KINDS`.
        documents: Boundaries, if the batch is one packed row.
        cache: Of a generation in progress.

    Returns:
        ``(B, T, D)`` and the labels, in step with it: tokens of pruned videos may have moved.

    Raises:
        FusionError: If media and placeholders do not match.
    """
    found, absent = encode_media(model, media, cache)
    masks: dict[Kind, Tensor] | None = None
    if input_ids is not None:
        masks = placeholder_masks(model.config, input_ids, token_types, found)
        if (order := media_order(input_ids, masks, found)) is not None:
            shape = input_ids.shape
            input_ids = input_ids.flatten()[order].view(shape)
            labels = None if labels is None else labels.flatten()[order].view(shape)
            if inputs_embeds is not None:
                inputs_embeds = inputs_embeds.flatten(0, 1)[order].view_as(inputs_embeds)
            masks = {kind: mask.flatten()[order].view(shape) for kind, mask in masks.items()}
    elif found:
        raise FusionError(
            f"{' and '.join(found)} features need input_ids (the places of their placeholders) beside them"
        )
    if inputs_embeds is None:
        inputs_embeds = model.get_input_embeddings()(input_ids)
    if masks is not None and (found or inputs_embeds.shape[1] > 1):  # a generated token is no placeholder
        inputs_embeds = fuse_media(inputs_embeds, masks, found, media, documents)
    for features in absent:
        inputs_embeds = weight_zero(inputs_embeds, features)
    return inputs_embeds, labels


def encode_media(model: Any, media: MediaInputs, cache: Cache | None) -> tuple[dict[Kind, Features], list[Tensor]]:
    """Runs tower and projector once per kind, in the same order on every rank.

    Args:
        model: The `NemotronVL`.
        media: The batch's media.
        cache: Of a generation in progress.

    Returns:
        Features of the kinds that the batch has, and those of absent ones, for `absent_media.weight_zero`.

    Raises:
        FusionError: If media are not described, or the model has no part for them.
    """
    found: dict[Kind, Features] = {}
    absent: list[Tensor] = []
    frames_are_images = model.vision_model.embeddings.video_patch_projection is None and media.has("video")
    if frames_are_images and media.has("image"):
        found = _encode_together(model, media)
    for kind in KINDS:
        if kind in found or (kind == "image" and frames_are_images):
            continue
        if media.has(kind):
            found[kind] = _encode(model, media, kind)
        elif (features := absent_features(model, kind, cache)) is not None:
            absent.append(features)
    return found, absent


def placeholder_masks(
    config: NemotronVLConfig, input_ids: Tensor, token_types: Tensor | None, found: dict[Kind, Features]
) -> dict[Kind, Tensor]:
    """Where the placeholders of each kind are.

    Args:
        config: Of the model.
        input_ids: ``(B, T)``.
        token_types: ``(B, T)``, see `KINDS`; needed where images and videos meet in one batch.
        found: The batch's media.

    Returns:
        ``(B, T)`` bool of each kind.

    Raises:
        FusionError: If images and videos cannot be told apart.
    """

    def places(token: int | None) -> Tensor:
        return torch.zeros_like(input_ids, dtype=torch.bool) if token is None else torch.eq(input_ids, token)

    pictures, sounds = places(config.image_token_id), places(config.audio_token_id)
    if token_types is None and {"image", "video"} <= found.keys():
        raise FusionError("a batch with images and videos needs mm_token_type_ids, which tell their placeholders apart")
    if token_types is None:
        is_video = pictures if "video" in found else torch.zeros_like(pictures)
    else:
        is_video = pictures & (token_types == VIDEO)
    return {"image": pictures & ~is_video, "video": is_video, "sound": sounds}


def media_order(input_ids: Tensor, masks: dict[Kind, Tensor], found: dict[Kind, Features]) -> Tensor | None:
    """Where the tokens go once it is known which tubelet kept how many; ``None`` where all stay in place.

    Args:
        input_ids: ``(B, T)``.
        masks: Placeholders of each kind.
        found: The batch's media.
    """
    video = found.get("video")
    if video is None or video.tokens_per_tubelet is None:
        return None
    return lay_out_videos(input_ids, masks["video"], video.tokens_per_tubelet)


def fuse_media(
    inputs_embeds: Tensor,
    masks: dict[Kind, Tensor],
    found: dict[Kind, Features],
    media: MediaInputs,
    documents: Documents | None,
) -> Tensor:
    """Writes the features of all kinds over the embeddings of their placeholders.

    Args:
        inputs_embeds: ``(B, T, D)``.
        masks: Placeholders of each kind.
        found: The batch's media.
        media: Gives how many each row has.
        documents: Boundaries, if the batch is one packed row.

    Raises:
        FusionError: See `fuse`; also for placeholders of a kind that the batch has none of.
    """
    what = "row" if documents is None else "document"
    for kind in KINDS:
        if (features := found.get(kind)) is not None:
            known = media.per_row(kind)
            inputs_embeds = fuse(inputs_embeds, features.values, masks[kind], features.counts, known, documents, kind)
        elif masks[kind].any():
            refuse_placeholders(placeholders_per_row(masks[kind], documents), what, kind)
    return inputs_embeds


def _encode(model: Any, media: MediaInputs, kind: Kind) -> Features:
    if kind == "sound":
        return Features(*model.get_audio_features(media.input_features, media.input_features_mask))
    if kind == "image":
        grids = _described("pixel_values", "image_grid_hw", media.image_grid_hw)
        return Features(*model.get_image_features(media.pixel_values, grids))
    grids = _described("pixel_values_videos", "video_grid_thw", media.video_grid_thw)
    values, kept = model.get_video_features(media.pixel_values_videos, grids, media.num_video_tokens)
    return _videos(values, kept, grids, model)


def _encode_together(model: Any, media: MediaInputs) -> dict[Kind, Features]:
    """Images and videos whose frames are images to the tower, in one pass: ranks with both and with one keep step."""
    pictures: Any = (media.pixel_values, media.pixel_values_videos)
    image_grids = _described("pixel_values", "image_grid_hw", media.image_grid_hw)
    videos = _described("pixel_values_videos", "video_grid_thw", media.video_grid_thw)
    frame_grids = videos[:, 1:].repeat_interleave(videos[:, 0], dim=0)
    features, counts = model.get_image_features(torch.cat(pictures), torch.cat([image_grids, frame_grids]))
    counts = counts[: len(image_grids)]
    wanted = None if media.num_video_tokens is None else media.num_video_tokens.tolist()
    sizes = [(frames, rows * columns // model.config.merge_size**2) for frames, rows, columns in videos.tolist()]
    values, kept = prune_videos(features[sum(counts) :], sizes, wanted)
    video = _videos(values, kept, videos, model)
    return {"image": Features(features[: sum(counts)], counts), "video": video}


def _videos(values: Tensor, kept: list[Tensor], grids: Tensor, model: Any) -> Features:
    counts = [int(own.sum()) for own in kept]
    whole = (grids.prod(-1) // model.config.merge_size**2).tolist()
    return Features(values, counts, None if counts == whole else kept)


def _described(name: str, beside: str, grids: Tensor | None) -> Tensor:
    if grids is None:
        raise FusionError(f"{name} needs {beside} beside it; take both from one call of the processor")
    return grids
