"""Beams and several answers per prompt: every copy of a row sees the row's own media, whatever kinds they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm import NemotronVL
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.media import MediaInputs
from lightning_vlm.models.repeated_media import repeat_media
from lightning_vlm.schema import Sample, VLMBatch
from lightning_vlm.training.generation import left_padded_prompts
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, varied_samples

MEDIA = tuple(MediaInputs.__slots__)
COUNTS = ("num_images", "num_videos", "num_clips")


@pytest.fixture
def talker(make_model: Callable[..., NemotronVL], shake: Callable[..., Any]) -> NemotronVL:
    model = shake(make_model(pattern="M*-", **ALL_MEDIA), std=0.2)
    with torch.no_grad():
        model.language_model.lm_head.weight[[3, 4, 263]] = 0.0
        model.multi_modal_projector.linear_2.weight *= 10.0
        model.embed_audio.linear_2.weight *= 10.0
    return model


def batch_of(items: list[Sample]) -> VLMBatch:
    return PaddedCollate(0)(items)


def prompt_of(items: list[Sample], counted: bool = True) -> dict[str, Tensor]:
    batch = batch_of(items)
    media = {name: value for name, value in batch.media_inputs().items() if counted or name not in COUNTS}
    return left_padded_prompts(batch, 0) | media


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not counted"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("times", [1, 3])
def test_is_the_batch_of_repeated_samples(
    talker: NemotronVL, times: int, mode: str, rate: float, counted: bool
) -> None:
    options = {"mode": "static", "tile_size": 16, "max_tiles": 3} if mode == "static" else {}
    items = varied_samples(media_processor(rate, **options))
    expected = prompt_of([item for item in items for _ in range(times)], counted)
    prompt = prompt_of(items, counted)
    media = {name: prompt.get(name) for name in MEDIA}
    repeated = repeat_media(talker.config, prompt["input_ids"], prompt["mm_token_type_ids"], media, times)
    for name in MEDIA:
        assert (repeated.get(name) is None) == (expected.get(name) is None), name
        if repeated.get(name) is not None:
            assert torch.equal(repeated[name], expected[name]), name


def test_each_kind_alone_needs_no_types(talker: NemotronVL) -> None:
    items = varied_samples(media_processor(0.5))
    for item in items[2:]:
        prompt, expected = prompt_of([items[1], item, item], False), prompt_of([items[1]] * 2 + [item] * 4, False)
        media = {name: prompt.get(name) for name in MEDIA}
        repeated = repeat_media(talker.config, prompt["input_ids"], None, media, 2)
        given = {name: value for name, value in repeated.items() if value is not None}
        assert given
        assert all(torch.equal(value, expected[name]) for name, value in given.items())


def test_media_of_other_rows_are_refused(talker: NemotronVL) -> None:
    items = varied_samples(media_processor())
    prompt = prompt_of([items[2], items[1]], False)
    media = {name: prompt.get(name) for name in MEDIA}
    ids = prompt["input_ids"].clone()
    ids[0, int((ids[0] == 4).nonzero()[0])] = 100
    with pytest.raises(FusionError, match="row 0 has"):
        repeat_media(talker.config, ids, prompt["mm_token_type_ids"], media, 2)


def generate(model: NemotronVL, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :]
    return torch.nn.functional.pad(found, (0, 5 - found.shape[1]))


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not counted"])
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_several_answers_per_prompt_see_the_rows_own_media(talker: NemotronVL, rate: float, counted: bool) -> None:
    prompt = prompt_of(varied_samples(media_processor(rate)), counted)
    greedy = generate(talker, prompt)
    # Sampling among the one most likely token is greedy, so each of the answers must be.
    sampled = generate(talker, prompt, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_beams_of_a_batch_are_those_of_each_row(talker: NemotronVL, rate: float) -> None:
    items = varied_samples(media_processor(rate))
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = generate(talker, prompt_of(items), **options)
    alone = [generate(talker, prompt_of([item]), **options) for item in items]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(generate(talker, prompt_of(items), use_cache=False, **options), together)
    assert not torch.equal(together[::2], generate(talker, prompt_of(items)))  # beams do find something else
