"""Media of some rows of a batch, or of a part of them: each row's own, in reading order over the rows.

transformers repeats and cuts every tensor along its first axis, which is patches or clips here, not rows.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.fusion import images_per_row, placeholders_per_row
from lightning_vlm.models.media import Features, Kind, placeholder_masks

Media = dict[str, Tensor | None]

_COUNTS: dict[Kind, str] = {"image": "num_images", "video": "num_videos", "sound": "num_clips"}
_VALUES: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos", "sound": "input_features"}


def repeat_media(
    config: NemotronVLConfig, input_ids: Tensor, token_types: Tensor | None, media: Media, times: int
) -> Media:
    """Repeats the media of each row, for beams or several answers per prompt.

    Args:
        config: Of the model.
        input_ids: ``(B, T)``, not repeated yet.
        token_types: ``(B, T)`` ``mm_token_type_ids``, not repeated yet.
        media: What `NemotronVL.forward` takes of media, by name.
        times: How often.

    Returns:
        The same, for ``(B * times, T)``.
    """
    repeated = dict(media)
    for kind, placeholders in _placeholders(config, input_ids, token_types, media).items():
        tokens, counts = _tokens(config, media, kind), media.get(_COUNTS[kind])
        owned = images_per_row(placeholders, tokens) if counts is None else counts.tolist()
        repeated |= _take(media, kind, [row for row in _rows(owned) for _ in range(times)])
    return repeated


def prompt_media(config: NemotronVLConfig, input_ids: Tensor, token_types: Tensor | None, media: Media) -> Media:
    """The media of prompts: without those of the answers behind them.

    Args:
        config: Of the model.
        input_ids: ``(B, T)`` of the prompts, what follows them cut off.
        token_types: ``(B, T)`` ``mm_token_type_ids`` of them.
        media: What `NemotronVL.forward` takes of media, by name, of the whole rows, with its number in each.

    Returns:
        The same, of as many media in each row as its placeholders hold.
    """
    kept = dict(media)
    for kind, placeholders in _placeholders(config, input_ids, token_types, media).items():
        tokens, counts = _tokens(config, media, kind), media.get(_COUNTS[kind])
        assert counts is not None, "a batch tells how many media of a kind each row has"
        rows = []
        for row, room in zip(_rows(counts.tolist()), placeholders, strict=True):
            ends = accumulate(tokens[item] for item in row)
            rows.append(row[: sum(end <= room for end in ends)])
        if sum(map(len, rows)) < len(tokens):  # or else nothing need be copied
            kept |= _take(media, kind, rows)
    return kept


def _placeholders(
    config: NemotronVLConfig, input_ids: Tensor, token_types: Tensor | None, media: Media
) -> dict[Kind, list[int]]:
    """Placeholders of each row, of the kinds that there are."""
    nothing = Features(torch.empty(0), [])  # tells that there is a kind: no features are needed to tell kinds apart
    given = {kind: nothing for kind, name in _VALUES.items() if media.get(name) is not None}
    masks = placeholder_masks(config, input_ids, token_types, given)
    return {kind: placeholders_per_row(masks[kind]) for kind in given}


def _rows(owned: list[int]) -> list[list[int]]:
    """The numbers of the media of each row."""
    return [list(range(start, end)) for start, end in pairwise(accumulate(owned, initial=0))]


def _tokens(config: NemotronVLConfig, media: Media, kind: Kind) -> list[int]:
    """Tokens of each medium."""
    if kind == "sound":
        features, mask = media["input_features"], media.get("input_features_mask")
        tower: Any = config.audio_config
        assert features is not None, "the caller has seen it"
        frames = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(-1)
        return (-(-frames // tower.subsampling_factor)).tolist()
    kept = media.get("num_video_tokens") if kind == "video" else None
    return (_sizes(media, kind) // config.merge_size**2 if kept is None else kept).tolist()


def _sizes(media: Media, kind: Kind) -> Tensor:
    """Patches of each image or video."""
    grids = media["image_grid_hw" if kind == "image" else "video_grid_thw"]
    assert grids is not None, "the caller has seen it"
    return grids.prod(-1)


def _take(media: Media, kind: Kind, rows: list[list[int]]) -> Media:
    """Media of a kind by their numbers, row by row; ``None`` without any."""
    chosen = [item for row in rows for item in row]
    order, taken = torch.tensor(chosen, dtype=torch.int64), dict[str, Tensor | None]()
    names = {
        "image": ("image_grid_hw",),
        "video": ("video_grid_thw", "num_video_tokens"),
        "sound": ("input_features", "input_features_mask"),
    }[kind]
    for name in names:
        if (value := media.get(name)) is not None:
            taken[name] = value[order.to(value.device)] if chosen else None
    if kind != "sound":
        patches: Any = media[_VALUES[kind]]
        split = patches.split(_sizes(media, kind).tolist())
        taken[_VALUES[kind]] = torch.cat([split[item] for item in chosen]) if chosen else None
    if (counts := media.get(_COUNTS[kind])) is not None:
        taken[_COUNTS[kind]] = counts.new_tensor([len(row) for row in rows])
    return taken
