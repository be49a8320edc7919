"""Freezing by part: what stays trainable, what keeps no graph, and what is an error."""

from __future__ import annotations

import pytest
import torch
from lightning import Callback, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLModule, VLMDataModule
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"freeze": ["projector"]},
            "from_scratch names 'projector', but freeze keeps it random; take projector out of",
        ),
        (
            {"lora": {}},
            "from_scratch names 'projector', but lora.projector is frozen, which keeps it random; set lora.",
        ),
        ({"lora": {"projector": "lora"}}, "from_scratch names 'projector', but lora.projector is lora, which keeps"),
    ],
)
def test_what_is_new_must_be_trained(options, message):
    with pytest.raises(ValueError, match=message):
        NemotronVLModule("folder", from_scratch=["projector"], **options)
    NemotronVLModule("folder", from_scratch=["projector"], lora={"projector": "full"})
    NemotronVLModule("folder", from_scratch=["vision.embeddings.video_patch_projection"], freeze=["projector"])


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


def test_a_frozen_language_model_keeps_to_its_checkpointing(make_model):
    """The gradient goes through it to the projector; transformers recomputes layers in training mode only."""

    def kept(checkpointing: bool, frozen: list[str]) -> int:
        model = make_model(pattern="M*-M*-").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        freeze(model, frozen)
        sizes: list[int] = []
        batch = {**IMAGE_AND_TEXT, "pixel_values": torch.randn(8, 192), "labels": IMAGE_AND_TEXT["input_ids"]}
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: (sizes.append(kept.nbytes), kept)[1], lambda x: x):
            loss = model(**batch).loss
        loss.backward()
        assert model.multi_modal_projector.linear_1.weight.grad.any()
        return sum(sizes)

    frozen = ["vision", "language"]
    assert kept(True, frozen) < 0.6 * kept(False, frozen)


def test_in_a_frozen_language_model_nothing_but_recomputing_is_as_in_training(make_model):
    model = make_model(pattern="M*E-").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    freeze(model, ["language"])
    in_training = {type(module) for module in model.language_model.modules() if module.training}
    assert all(issubclass(kind, GradientCheckpointingLayer) for kind in in_training)
    assert len(in_training) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [["vision"], ["vision", "projector"]], ids="+".join)
def test_in_a_fit_frozen_parts_stay_in_eval_mode_and_keep_no_graph(
    make_task, processor, make_model, checkpointing, frozen
):
    """Lightning puts the model into training mode again after it has validated."""
    config = make_model(pattern="M*", vision_layers=2).config
    module = NemotronVLModule(config=config, freeze=frozen, gradient_checkpointing=checkpointing, max_new_tokens=2)
    seen = Watch(frozen)
    file = str(make_task(8))
    data = VLMDataModule(train=file, val=file, processor=processor, batch_size=4)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, val_check_interval=1, num_sanity_val_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[seen],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(seen.modes) == 4, "batches before and after validation"
    for modes in seen.modes:
        for name in parts_of(module.network):
            assert modes[name] == {name not in frozen}, name
    assert seen.features, "frozen parts were run"
    assert not any(features.requires_grad or features.grad_fn for features in seen.features)
    assert not seen.kept, "tensors that a frozen part has left for the backward pass"


class Watch(Callback):
    """Notes modes at each batch, and what frozen parts give out and keep in training forwards."""

    def __init__(self, frozen: list[str]) -> None:
        self.frozen = frozen
        self.modes: list[dict[str, set[bool]]] = []
        self.features: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []

    def on_train_start(self, trainer, pl_module):
        for name in self.frozen:
            whole = part(pl_module.network, name)
            module = getattr(whole, "encoder", whole)  # the tower's forward ends with the projector
            inside = module.forward

            def forward(*args, inside=inside, **kwargs):
                with torch.autograd.graph.saved_tensors_hooks(lambda kept: (self.kept.append(kept), kept)[1], _same):
                    output = inside(*args, **kwargs)
                if pl_module.network.training:
                    tensors = [output] if torch.is_tensor(output) else list(output.values())
                    self.features += [tensor for tensor in tensors if tensor.is_floating_point()]
                return output

            module.forward = forward

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = parts_of(pl_module.network)
        self.modes.append({name: {child.training for child in module.modules()} for name, module in parts.items()})


def _same(tensor):
    return tensor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_sound_tower_keeps_no_graph(checkpointing):
    torch.manual_seed(0)
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vocab_size=266, audio_token_id=263)
    model = NemotronVL(config).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    freeze(model, ["audio", "audio_projector"])
    clips = torch.randn(1, 16, config.audio_config.num_mel_bins)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], _same):
        features, _ = model.get_audio_features(clips, torch.ones(1, 16, dtype=torch.bool))
    assert not features.requires_grad
    assert not kept


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
