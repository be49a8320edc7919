"""From a right-padded training batch to left-padded prompts and the model's own answers."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.schema import Sample
from lightning_vlm.training.generation import generate_answers, left_padded_prompts

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
