"""Batches of the collate functions in transformers' own models, very small: what is padded or mixed changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from lightning_vlm.automodel.collate_fns import default_collate_fn, qwen2_5_collate_fn
from lightning_vlm.automodel.fake_image import inject_fake_image

Dict = dict[str, Any]
TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
NOT_FOR_THE_MODEL = ("labels", "n_images_per_sample", "num_patches")


@pytest.fixture(scope="module")
def qwen_model(qwen2_5: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = qwen2_5.tokenizer
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=qwen2_5.image_token_id,
        video_token_id=qwen2_5.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def llava_model(llava_onevision: Any) -> Any:
    torch.manual_seed(0)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=vision,
        image_token_id=llava_onevision.image_token_id,
        video_token_id=llava_onevision.video_token_id,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config).eval()


@torch.no_grad()
def losses(model: Any, batch: Dict) -> list[float]:
    """Mean loss of each row; labels are shifted already."""
    inputs = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    inputs = {key: value.float() if key == "pixel_values" else value for key, value in inputs.items()}
    logits: Tensor = model(**inputs).logits
    rows = zip(logits, batch["labels"])
    return [float(torch.nn.functional.cross_entropy(row, labels)) for row, labels in rows]


@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(
    name: str, example: Callable[..., Dict], request: pytest.FixtureRequest
) -> None:
    fixtures = {"qwen": ("qwen2_5", qwen2_5_collate_fn), "llava": ("llava_onevision", default_collate_fn)}
    processor, function = request.getfixturevalue(fixtures[name][0]), fixtures[name][1]
    model = request.getfixturevalue(f"{name}_model")
    pictures = [Image.effect_noise((size, 56), 90) for size in (56, 84, 28)]
    examples = [
        example("what is it?", "a cat", pictures[0]),
        example("no image", "a longer answer"),
        example("two", "b", pictures[1], pictures[2]),
    ]
    together = losses(model, function(examples, processor))
    alone = [losses(model, function([item], processor))[0] for item in examples]
    assert together == pytest.approx(alone, abs=2e-5)
    assert len(set(together)) == 3


def test_a_fake_image_changes_no_answer(qwen2_5: Any, qwen_model: Any, example: Callable[..., Dict]) -> None:
    """It is not attended to: another picture in its place gives the same numbers."""
    fake, other = inject_fake_image(example("q", "answer")), inject_fake_image(example("q", "answer"))
    other["conversation"][0]["content"][0]["image"] = Image.effect_noise((56, 56), 90)
    batches = [qwen2_5_collate_fn([item], qwen2_5) for item in (fake, other)]
    assert not torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert losses(qwen_model, batches[0]) == losses(qwen_model, batches[1])
    real = [qwen2_5_collate_fn([{"conversation": item["conversation"]}], qwen2_5) for item in (fake, other)]
    assert losses(qwen_model, real[0]) != losses(qwen_model, real[1])
