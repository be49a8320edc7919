"""Rows repeated for beams or several answers, and rows cut at their answers: each sees its own media, of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_vlm import NemotronVL
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.media import MediaInputs
from lightning_vlm.models.row_media import prompt_media, repeat_media
from lightning_vlm.schema import Sample, VLMBatch
from lightning_vlm.training.generation import left_padded_prompts
from tests.fixtures.media_samples import ALL_MEDIA, conversation, media_processor, picture, sound, varied_samples, video

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


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_prompts_keep_their_own_media(talker: NemotronVL, rate: float) -> None:
    processor = media_processor(rate)
    film, noise, image = video(processor, 5, seed=1), sound(9000, 2), picture(seed=3)
    other, short, small = video(processor, 2, 16, 48, seed=4), sound(2000, 5), picture(40, 24, 6)
    turns = [
        (["what?"], [image, "a", film, noise, "b"]),  # all in the answer
        (["a", film, short], ["yes", other], ["more", small, noise], [other, short, "no", image]),
        ([image, other, noise], ["nothing"]),
        (["only text"], ["indeed", short]),
    ]
    batch = batch_of([processor.encode(*conversation(*said)) for said in turns])
    asked = batch_of([processor.encode(*conversation(*said[:-1]), answer=True) for said in turns])
    prompt, expected = left_padded_prompts(batch, 0), left_padded_prompts(asked, 0)
    assert all(torch.equal(value, prompt[name]) for name, value in expected.items())
    for types in (prompt["mm_token_type_ids"], None):
        if types is None:  # a batch of images alone needs none
            turns = [
                tuple([part for part in turn if isinstance(part, str | Image.Image)] for turn in said) for said in turns
            ]
            batch = batch_of([processor.encode(*conversation(*said)) for said in turns])
            asked = batch_of([processor.encode(*conversation(*said[:-1]), answer=True) for said in turns])
            assert batch.mm_token_type_ids is None
        ids = left_padded_prompts(batch, 0)["input_ids"]
        kept = prompt_media(talker.config, ids, types, {**batch.media_inputs()})
        media = asked.media_inputs()
        for name in MEDIA:
            assert (kept.get(name) is None) == (name not in media), name
            if name in media:
                assert torch.equal(kept[name], media[name]), name


def test_no_prompt_has_any_media(talker: NemotronVL) -> None:
    processor = media_processor(0.5)
    answer = [picture(), video(processor, 3), sound()]
    batch = batch_of([processor.encode(*conversation(["a"], answer)), processor.encode(*conversation(["b"], ["c"]))])
    prompt = left_padded_prompts(batch, 0)
    kept = prompt_media(talker.config, prompt["input_ids"], prompt["mm_token_type_ids"], {**batch.media_inputs()})
    assert {name: value.tolist() for name, value in kept.items() if value is not None} == {
        name: [0, 0] for name in COUNTS
    }
    assert generate(talker, prompt | {name: value for name, value in kept.items() if value is not None}).shape == (2, 5)


def test_where_all_media_are_asked_about_nothing_is_copied(talker: NemotronVL) -> None:
    batch = batch_of(varied_samples(media_processor(0.5)))
    prompt, media = left_padded_prompts(batch, 0), batch.media_inputs()
    kept = prompt_media(talker.config, prompt["input_ids"], prompt["mm_token_type_ids"], {**media})
    assert kept.keys() == media.keys()
    assert all(kept[name] is value for name, value in media.items())


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
