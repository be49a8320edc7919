"""Processing, geometry and model count alike: every placeholder gets a feature, in random mixes of all media."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLProcessor
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.models.media import KINDS, MediaInputs, encode_media, placeholder_masks
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, picture, sample, sound, video

PROCESSORS = {
    "tubelets": media_processor(0.0),
    "pruned tubelets": media_processor(0.6),
    "pruned single frames": media_processor(0.4, video={"temporal_patch_size": 1, "keep_aspect": False}),
    "tiles": media_processor(0.5, mode="static", tile_size=16, max_tiles=4),
}
SIDES = st.integers(1, 48)
MEDIUM = st.one_of(
    st.tuples(st.just("image"), SIDES, SIDES),
    st.tuples(st.just("video"), st.integers(1, 9), SIDES, SIDES),
    st.tuples(st.just("sound"), st.integers(1, 12_000)),
)
ROWS = st.lists(st.lists(st.one_of(st.just("text"), MEDIUM), max_size=4), min_size=1, max_size=3)


@cache
def model(tubelets: bool) -> NemotronVL:
    torch.manual_seed(0)
    media = {**ALL_MEDIA, "video": tubelets}
    return NemotronVL(
        NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1, **media)
    ).eval()


def made(processor: NemotronVLProcessor, part: Any) -> Any:
    if isinstance(part, str):
        return part
    make = {"image": picture, "video": lambda *size: video(processor, *size), "sound": sound}
    return make[part[0]](*part[1:])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
def test_features_are_as_many_as_placeholders(
    processor: NemotronVLProcessor, packed: bool, rows: list[list[Any]]
) -> None:
    network = model(processor.video_geometry.temporal_patch_size == 2)
    samples = [sample(processor, *(made(processor, part) for part in row), "?") for row in rows]
    batch = (PackedCollate() if packed else PaddedCollate(0))(samples)
    with torch.no_grad():
        found, absent = encode_media(network, MediaInputs(**batch.media_inputs()), None)
        loss = network(**batch.model_inputs(), labels=batch.labels).loss
    masks = placeholder_masks(network.config, batch.input_ids, batch.mm_token_type_ids, found)
    asked = {kind for row in rows for part in row for kind in KINDS if part[0] == kind}
    assert found.keys() == asked
    assert not absent
    for kind in KINDS:
        features = found[kind].values if kind in found else torch.empty(0)
        assert int(masks[kind].sum()) == len(features)
    assert loss.isfinite()
