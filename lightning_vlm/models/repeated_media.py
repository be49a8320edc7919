"""Beams, or several answers per prompt: each row's media as often as the row, in reading order over the rows.

transformers repeats every tensor along its first axis, which is patches or clips here, not rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.fusion import images_per_row, placeholders_per_row
from lightning_vlm.models.media import Features, Kind, placeholder_masks

Media = dict[str, Tensor | None]


def repeat_media(
    config: NemotronVLConfig, input_ids: Tensor, token_types: Tensor | None, media: Media, times: int
) -> Media:
    """Repeats the media of each row.

    Args:
        config: Of the model.
        input_ids: ``(B, T)``, not repeated yet.
        token_types: ``(B, T)`` ``mm_token_type_ids``, not repeated yet.
        media: What `NemotronVL.forward` takes of media, by name.
        times: How often.

    Returns:
        The same, for ``(B * times, T)``.
    """
    given: dict[Kind, Features] = {}  # what there is, for telling placeholders apart: no features are needed for that
    nothing = Features(torch.empty(0), [])
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos"), ("sound", "input_features")):
        if media.get(name) is not None:
            given[kind] = nothing  # type: ignore[index]
    masks = placeholder_masks(config, input_ids, token_types, given)
    repeated = dict(media)
    for kind in given:
        tokens, sizes, names, counts = _items(config, media, kind)
        per_row = media.get(counts)
        owned = images_per_row(placeholders_per_row(masks[kind]), tokens) if per_row is None else per_row.tolist()
        rows = torch.arange(len(tokens)).split(owned)
        order = torch.cat([row.repeat(times) for row in rows])
        for name in names:
            if (value := media.get(name)) is not None:
                repeated[name] = value[order.to(value.device)]
        if sizes is not None:
            packed: Any = "pixel_values" if kind == "image" else "pixel_values_videos"
            patches: Any = media[packed]
            split = patches.split(sizes)
            repeated[packed] = torch.cat([split[item] for item in order])
        if per_row is not None:
            repeated[counts] = per_row.repeat_interleave(times)
    return repeated


def _items(
    config: NemotronVLConfig, media: Media, kind: Kind
) -> tuple[list[int], list[int] | None, tuple[str, ...], str]:
    """Tokens and patches of each medium, the tensors with one entry per medium, and the name of the rows' counts."""
    if kind == "sound":
        features, mask = media["input_features"], media.get("input_features_mask")
        tower: Any = config.audio_config
        assert features is not None, "the caller has seen it"
        frames = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(-1)
        tokens = -(-frames // tower.subsampling_factor)
        return tokens.tolist(), None, ("input_features", "input_features_mask"), "num_clips"
    grids = media["image_grid_hw" if kind == "image" else "video_grid_thw"]
    assert grids is not None, "the caller has seen it"
    sizes, kept = grids.prod(-1), media.get("num_video_tokens")
    tokens = sizes // config.merge_size**2 if kind == "image" or kept is None else kept
    names = ("image_grid_hw",) if kind == "image" else ("video_grid_thw", "num_video_tokens")
    return tokens.tolist(), sizes.tolist(), names, "num_images" if kind == "image" else "num_videos"
