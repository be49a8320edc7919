"""From a right-padded training batch to left-padded prompts and the model's own answers."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.schema import Sample
from lightning_vlm.training.generation import generate_answers, left_padded_prompts
from tests.fixtures.media_samples import ALL_MEDIA, conversation, media_processor, picture, sound, video

GRID = torch.tensor([[2, 4]])


def sample(tokens: list[int], prompt_length: int, images: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(len(tokens))
    pixels = torch.randint(0, 256, (8 * images, 192), dtype=torch.uint8, generator=generator)
    return Sample(
        input_ids=torch.tensor(tokens),
        labels=torch.tensor(tokens),
        pixel_values=pixels if images else None,
        image_grid_hw=GRID.repeat(images, 1) if images else None,
        prompt_length=prompt_length,
        prompt="",
        references=(),
        source="rows.jsonl:1",
    )


def test_answers_are_cut_and_prompts_end_together():
    batch = PaddedCollate(0)([sample([7, 8, 9, 10, 11], 3), sample([12, 13], 1), sample([14, 15, 16, 17], 4)])
    prompts = left_padded_prompts(batch, pad_token_id=5)
    assert prompts.keys() == {"input_ids", "attention_mask"}
    assert prompts["input_ids"].tolist() == [[5, 7, 8, 9], [5, 5, 5, 12], [14, 15, 16, 17]]
    assert prompts["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]


def test_token_types_move_with_their_tokens_and_padding_has_none():
    batch = PaddedCollate(0)([sample([7, 4, 9, 10], 3), sample([4, 13], 1)])
    batch.mm_token_type_ids = torch.tensor([[0, 2, 0, 0], [1, 0, 0, 0]])
    prompts = left_padded_prompts(batch, pad_token_id=4)
    assert prompts["input_ids"].tolist() == [[7, 4, 9], [4, 4, 4]]
    assert prompts["mm_token_type_ids"].tolist() == [[0, 2, 0], [0, 0, 1]]


@pytest.mark.parametrize("images", [0, 1], ids=["text_only", "with_an_image"])
def test_answers_of_a_batch_are_those_of_each_row(make_model, processor, images):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    samples = [
        sample([40, 41, 42, 50, 51, 3], 3),
        sample([60] + images * [4, 4] + [61, 62, 63, 64, 70], 6, images),
    ]
    collate = PaddedCollate(0)
    together = generate_answers(model, processor, collate(samples), max_new_tokens=6)
    alone = [generate_answers(model, processor, collate([row]), max_new_tokens=6)[0] for row in samples]
    assert together == alone
    assert together[0] != together[1]


def test_special_tokens_and_what_follows_the_end_are_not_part_of_an_answer(make_model, processor):
    model = make_model()
    with torch.no_grad():  # the model says the end token at once, whatever it was given
        model.language_model.model.norm_f.weight.zero_()
        model.language_model.lm_head.weight.zero_()
    bias = torch.zeros(263)
    bias[processor.tokenizer.eos_token_id] = 1.0
    model.language_model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    assert generate_answers(model, processor, PaddedCollate(0)([sample([7, 8, 9], 2)]), max_new_tokens=4) == [""]


def test_options_reach_generate(make_model, processor):
    model = make_model()
    batch = PaddedCollate(0)([sample([40, 41, 42, 50, 51, 3], 3)] * 8)
    greedy = generate_answers(model, processor, batch, max_new_tokens=6)
    assert len(set(greedy)) == 1
    torch.manual_seed(0)
    sampled = generate_answers(model, processor, batch, 6, options={"do_sample": True, "temperature": 5.0})
    assert len(set(sampled)) > 1


def test_options_win_over_what_is_given_beside_them(make_model, processor):
    model, batch = make_model(), PaddedCollate(0)([sample([40, 41, 42, 50, 51, 3], 3)])
    with torch.no_grad():
        model.language_model.lm_head.weight[3] = 0.0  # never the end token of the tokenizer
    lengths = []
    model.register_forward_hook(lambda *_: lengths.append(1))
    generate_answers(model, processor, batch, max_new_tokens=6, options={"max_new_tokens": 2})
    assert len(lengths) == 2
    first = model.generate(**left_padded_prompts(batch, 0), max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]
    lengths.clear()
    generate_answers(model, processor, batch, max_new_tokens=6, options={"eos_token_id": [3, int(first)]})
    assert len(lengths) == 1


def test_a_second_answer_would_be_taken_for_the_next_rows(make_model, processor):
    batch = PaddedCollate(0)([sample([40, 41, 42, 50, 51, 3], 3)] * 2)
    with pytest.raises(ValueError, match=r"generation.num_return_sequences is 2; expected 1"):
        generate_answers(make_model(), processor, batch, 2, options={"do_sample": True, "num_return_sequences": 2})


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_media_of_answers_are_not_asked_about(make_model, shake, rate):
    model, processor = shake(make_model(**ALL_MEDIA), std=0.2), media_processor(rate)
    film, noise, image = video(processor, 5, seed=1), sound(9000, 2), picture(seed=3)
    turns = [
        (["what?"], [image, "a", film, noise, "b"]),
        (["a", image], ["b", noise], ["c", film, "d"], ["e", film, noise, image]),
        (["only text"], ["indeed"]),
    ]
    collate = PaddedCollate(0)
    batch = collate([processor.encode(*conversation(*said)) for said in turns])
    asked = collate([processor.encode(*conversation(*said[:-1]), answer=True) for said in turns])
    answers = generate_answers(model, processor, batch, max_new_tokens=5)
    assert answers == generate_answers(model, processor, asked, max_new_tokens=5)
    assert len(set(answers)) > 1
