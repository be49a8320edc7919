"""Processors of other models are refused, and ids of placeholders are the tokenizer's."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_vlm import NemotronVLConfig
from lightning_vlm.processing.tiny import TINY_SOUND, TINY_VIDEO, tiny_processor
from lightning_vlm.schema import DataError
from lightning_vlm.training.pairing import pair

VIDEO = {**TINY_VIDEO, "temporal_patch_size": 2}


def config(**options: Any) -> NemotronVLConfig:
    return NemotronVLConfig.tiny(**{"vocab_size": 266, "audio_token_id": 263, "video": True, **options})


def test_what_belongs_together_is_left_alone() -> None:
    model = config()
    pair(model, tiny_processor(video=VIDEO, sound=TINY_SOUND))
    pair(model, tiny_processor())
    pair(model, object())
    assert (model.image_token_id, model.audio_token_id) == (4, 263)


@pytest.mark.parametrize(
    ("options", "made", "message"),
    [
        ({"patch_size": 16}, {}, "it makes 8 pixels of a patch's side, but the model takes 16; "),
        ({"video": False}, {}, "it makes 2 frames of a tubelet, but the model takes 1"),
        ({}, {"sound": {**TINY_SOUND, "num_mel_bins": 64}}, "it makes 64 mel bins of a spec"),
        ({"audio_token_id": None}, {}, "it prepares sounds, but the model hears none; set data"),
        ({"vocab_size": 264}, {}, "its tokenizer has 266 tokens, but the model"),
    ],
)
def test_what_does_not_is_told(options: dict[str, Any], made: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair(config(**options), tiny_processor(**{"video": VIDEO, "sound": TINY_SOUND, **made}))


def test_stale_ids_give_way_to_the_tokenizers() -> None:
    model = config(image_token_id=19, audio_token_id=20)
    with pytest.warns(
        UserWarning, match="image_token_id is 19 in the model's config, but 4 to the tokenizer, whose word"
    ):
        pair(model, tiny_processor(sound=TINY_SOUND))
    assert (model.image_token_id, model.audio_token_id) == (4, 263)
