"""generate() with images and left padding, against each row alone and a plain loop without a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from lightning_vlm import NemotronVL
from lightning_vlm.models.fusion import FusionError

PATTERNS = [
    "M*-",
    "MEM*",
    "*-",
]  # not Mamba alone: transformers' cache cannot tell its length without attention
# Prompts of different lengths: text only, one image, two images of different grids, an image at the start.
ROWS = [[9], [3, (2, 6), 4], [5, (4, 4), 2, (2, 2), 6], [(2, 4), 1]]
NEW_TOKENS = 8


@pytest.fixture
def talker(make_model: Callable, shake: Callable) -> Callable[[str], NemotronVL]:
    """A model that does not repeat itself, and says neither the end token nor the image token."""

    def make(pattern: str) -> NemotronVL:
        model = shake(make_model(pattern=pattern), std=0.2)
        with torch.no_grad():
            model.language_model.lm_head.weight[[3, 4]] = 0.0
            model.multi_modal_projector.linear_2.weight *= 10.0
        return model

    return make


def left_padded(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    pads = [(width - prompt["input_ids"].shape[1], 0) for prompt in prompts]
    batch = {
        name: torch.cat([torch.nn.functional.pad(prompt[name], pad) for prompt, pad in zip(prompts, pads)])
        for name in ("input_ids", "attention_mask")
    }
    for name in ("pixel_values", "image_grid_hw"):
        if parts := [prompt[name] for prompt in prompts if name in prompt]:
            batch[name] = torch.cat(parts)
    return batch


def generate(model: NemotronVL, prompt: dict[str, Tensor], **options) -> Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :]


@torch.no_grad()
def plain_loop(model: NemotronVL, prompt: dict[str, Tensor]) -> Tensor:
    prompt = {name: value for name, value in prompt.items() if name != "attention_mask"}
    for _ in range(NEW_TOKENS):
        token = model(**prompt, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], token], 1)
    return prompt["input_ids"][:, -NEW_TOKENS:]


@pytest.fixture
def prompts(make_batch: Callable) -> list[dict[str, Tensor]]:
    batches = [make_batch([row], seed=seed) for seed, row in enumerate(ROWS)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_left_padded_batch_gives_each_rows_own_answer(talker, prompts, pattern):
    model = talker(pattern)
    together = generate(model, left_padded(prompts))
    alone = torch.cat([generate(model, prompt) for prompt in prompts])
    assert torch.equal(together, alone)
    assert len({tuple(row) for row in alone.tolist()}) == len(ROWS)
    assert all(len(set(row)) > 2 for row in alone.tolist())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cache_changes_nothing_against_a_plain_loop(talker, prompts, pattern):
    model = talker(pattern)
    for prompt in prompts:
        expected = plain_loop(model, prompt)
        assert torch.equal(generate(model, prompt), expected)
        assert torch.equal(generate(model, prompt, use_cache=False), expected)


def test_text_only_batches_generate(talker, make_batch):
    model = talker("MEM*")
    prompts = [make_batch([[count]], seed=count) for count in (3, 11)]
    prompts = [{name: prompt[name] for name in ("input_ids", "attention_mask")} for prompt in prompts]
    together = generate(model, left_padded(prompts))
    assert torch.equal(together, torch.cat([plain_loop(model, prompt) for prompt in prompts]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_answer_depends_on_its_picture(talker, prompts, pattern):
    model = talker(pattern)
    for prompt in prompts[1:]:
        negative = {**prompt, "pixel_values": 255 - prompt["pixel_values"]}
        assert not torch.equal(generate(model, prompt), generate(model, negative))


def test_images_are_encoded_in_the_first_step_only(talker, prompts):
    model, runs = talker("M*-"), []
    model.vision_model.register_forward_hook(lambda *_: runs.append(1))
    generate(model, left_padded(prompts))
    assert len(runs) == 1


def test_several_answers_per_prompt_see_the_rows_own_images(talker, prompts):
    model, batch = talker("M*-"), left_padded(prompts)
    greedy = generate(model, batch)
    # Sampling among the one most likely token is greedy, so each of the answers must be.
    sampled = generate(model, batch, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))


def test_generation_stops_at_the_end_token(talker, prompts):
    model, prompt = talker("M*-"), prompts[0]
    answer = generate(model, prompt)[0].tolist()
    first = answer.index(answer[3])
    assert generate(model, prompt, eos_token_id=answer[3])[0].tolist() == answer[: first + 1]


def test_a_cut_image_is_refused(talker, prompts):
    cut = {**prompts[1]}
    cut["input_ids"], cut["attention_mask"] = cut["input_ids"][:, :5], cut["attention_mask"][:, :5]
    with pytest.raises(FusionError, match=r"row 0 has 2 .* 3 features"):
        generate(talker("M*-"), cut)


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_placeholder_is_ever_said(talker, prompts, use_cache):
    """There would be no picture behind it: without a cache the next step would look for one."""
    model = talker("M*-")
    own = model.generation_config.to_dict()
    wanted = torch.zeros(263)
    wanted[[4, 77, 78]] = torch.tensor([30.0, 20.0, 10.0])  # the image token above all
    model.language_model.lm_head.register_forward_hook(lambda module, args, output: output + wanted)
    for prompt in (*prompts, left_padded(prompts)):
        assert (generate(model, prompt, use_cache=use_cache) == 77).all()
    assert (generate(model, prompts[1], use_cache=use_cache, suppress_tokens=[77]) == 78).all()
    options = GenerationConfig(suppress_tokens=[77], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.generate(**prompts[1], generation_config=options)[0, -3:].tolist() == [78] * 3
    assert (model.generation_config.to_dict(), options.suppress_tokens) == (own, [77])
