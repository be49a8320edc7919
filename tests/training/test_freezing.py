"""Freezing by part: what stays trainable, what keeps no graph, and what is an error."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.models.parts import PARTS, part, parts_of
from lightning_vlm.training.freezing import freeze

IMAGE_AND_TEXT = {
    "input_ids": torch.tensor([[7, 4, 4, 8], [7, 8, 9, 10]]),
    "image_grid_hw": torch.tensor([[2, 4]]),
}


def trainable(model: NemotronVL) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_are_the_three_networks_and_hold_every_parameter(make_model):
    model = make_model()
    assert part(model, "vision") is model.vision_model
    assert part(model, "projector") is model.multi_modal_projector
    assert part(model, "language") is model.language_model
    counts = [sum(1 for _ in part(model, name).parameters()) for name in parts_of(model)]
    assert sum(counts) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize("frozen", [["vision"], ["projector"], ["language"], ["vision", "language"]], ids="+".join)
def test_frozen_parts_are_in_eval_mode_without_gradients_and_the_others_train(make_model, frozen):
    model = make_model().train()
    freeze(model, frozen)
    for name, module in parts_of(model).items():
        modes = {child.training for child in module.modules()}
        assert modes == {name not in frozen}
        needs = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
        assert all(needs[key] == (name not in frozen and "layer_scale" not in key) for key in needs)


def test_layer_scale_is_never_trained(make_model):
    model = make_model()
    freeze(model, [])
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    assert frozen == {f"vision_model.encoder.layer.0.layer_scale{number}.lambda1" for number in (1, 2)}


@pytest.mark.parametrize("rows", [1, 2], ids=["text_only", "with_images"])
def test_every_trainable_parameter_of_a_model_with_a_video_embedding_gets_a_gradient(rows):
    vision = {
        **NemotronVLConfig.tiny(vision_hidden_size=32).vision_config.to_dict(),
        "video_temporal_patch_size": 2,
    }
    text = NemotronVLConfig.tiny(pattern="M*", hidden_size=32).text_config
    model = NemotronVL(NemotronVLConfig(vision, text, projector_hidden_size=32, image_token_id=4)).train()
    freeze(model, [])
    ids = torch.tensor([[7, 8, 9], [7, 4, 8]])[:rows]
    images = {"pixel_values": torch.randn(4, 192), "image_grid_hw": torch.tensor([[2, 2]])} if rows == 2 else {}
    model(ids, **images, labels=ids).loss.backward()
    assert not [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]


def test_a_frozen_tower_keeps_no_autograd_graph(make_model):
    model = make_model().train()
    pixels, grid = torch.randn(8, 192), torch.tensor([[2, 4]])
    assert model.vision_model(pixels, image_grid_hw=grid).features.requires_grad
    freeze(model, ["vision"])
    assert not model.vision_model(pixels, image_grid_hw=grid).features.requires_grad
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        model.vision_model(pixels, image_grid_hw=grid)
    assert not kept


def test_a_frozen_tower_keeps_no_autograd_graph_under_gradient_checkpointing(make_model):
    model = make_model().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    freeze(model, ["vision"])
    assert not model.vision_model(torch.randn(8, 192), image_grid_hw=torch.tensor([[2, 4]])).features.requires_grad


@pytest.mark.parametrize("frozen", ["vision", "projector", "language"])
def test_a_step_moves_every_part_but_the_frozen_one(make_model, frozen):
    model = make_model().train()
    freeze(model, [frozen])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = {**IMAGE_AND_TEXT, "pixel_values": torch.randn(8, 192), "labels": IMAGE_AND_TEXT["input_ids"]}
    model(**batch).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {PARTS[name].attribute for name in parts_of(model) if name != frozen}
    assert {name.partition(".")[0] for name in moved} == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tower"], "no part 'tower'; expected one of vision, projector, audio, audio_projector, language"),
        (["language", "tower"], "no part 'tower'"),
        (["language", "vision", "projector"], "leaves nothing to train"),
    ],
    ids=["unknown", "one_unknown", "all"],
)
def test_an_error_leaves_the_model_as_it_was(make_model, names, message):
    model = make_model().train()
    before = trainable(model)
    with pytest.raises(ValueError, match=message):
        freeze(model, names)
    assert trainable(model) == before
    assert all(module.training for module in model.modules())
