"""The model's forward and its checkpoints: what is written, and everything that must be read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from lightning_vlm import NemotronVL
from lightning_vlm.models.fusion import FusionError

MIXED = [[5, (2, 6), 3, (4, 4), 9], [8], [2, (4, 10), 6]]


def assert_equal_weights(actual: NemotronVL, expected: NemotronVL) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def load(folder: Path, **options) -> NemotronVL:
    """Loads a checkpoint and allows nothing to be missing or left over."""
    model, info = NemotronVL.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# Forward


def test_a_text_only_batch_gives_every_vision_parameter_a_zero_gradient(make_model, make_batch):
    model = make_model(pattern="ME*-").train()
    model(**make_batch([[6], [3]])).loss.backward()
    tower = [*model.vision_model.named_parameters(), *model.multi_modal_projector.named_parameters()]
    for name, parameter in tower:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert all(parameter.grad is not None for parameter in model.language_model.parameters())


def test_a_text_only_batch_stays_finite_where_the_blank_image_is_huge(make_model, make_batch):
    model = make_model().train()
    blank = torch.zeros(4, 192, dtype=torch.uint8), torch.tensor([[2, 2]])
    with torch.no_grad():
        head = model.multi_modal_projector.linear_2.weight.fill_(1.0)
        head *= 2e37 / model.get_image_features(*blank)[0].max()
        features, _ = model.get_image_features(*blank)
    assert features.isfinite().all()
    assert features.sum().isinf()
    assert model(**make_batch([[6]])).loss.isfinite()


def test_a_text_only_batch_does_not_reach_the_tower_in_eval_mode(make_model, make_batch):
    model = make_model()
    model(**make_batch([[6]])).loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())


def test_pixels_are_normalised_in_float32_by_a_model_in_bfloat16(make_model):
    model = make_model().to(torch.bfloat16)
    pixels = torch.randint(0, 256, (6, 192), dtype=torch.uint8)
    mean = torch.tensor(model.config.norm_mean).repeat_interleave(64)
    std = torch.tensor(model.config.norm_std).repeat_interleave(64)
    assert torch.equal(model.vision_model.input_conditioner(pixels), (pixels / 255 - mean) / std)


def test_normalised_floats_pass_through(make_model):
    pixels = torch.randn(6, 192)
    assert torch.equal(make_model().vision_model.input_conditioner(pixels), pixels)


def test_skipping_logits_changes_neither_loss_nor_gradients(make_model, make_batch, shake):
    batch, results = make_batch(MIXED), []
    for skip in (False, True):
        model = shake(make_model(pattern="ME*-")).train()
        outputs = model(**batch, skip_logits=skip)
        outputs.loss.backward()
        assert (outputs.logits is None) == skip
        results.append((outputs.loss, [parameter.grad for parameter in model.parameters()]))
    # Worst relative difference measured over ten seeds: 8.5e-8 in the loss, 0.0 in a gradient.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for full, chunked in zip(results[0][1], results[1][1]):
        assert (full - chunked).norm() <= 1e-6 * full.norm()


@pytest.mark.parametrize("skip", [False, True], ids=["logits", "skip_logits"])
def test_the_loss_is_the_sum_over_label_tokens_divided_as_told(make_model, make_batch, skip):
    model, batch = make_model(), make_batch(MIXED)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    log_probabilities = logits(model, batch).log_softmax(-1)
    labelled = shifted >= 0
    total = -log_probabilities[labelled].gather(1, shifted[labelled][:, None]).sum()

    mean = model(**batch, skip_logits=skip).loss
    summed = model(**batch, skip_logits=skip, num_items_in_batch=1).loss
    seventh = model(**batch, skip_logits=skip, num_items_in_batch=torch.tensor(7.0)).loss
    # Worst relative difference measured over ten seeds: 1.8e-7; torch's default of 1.3e-6 holds.
    torch.testing.assert_close(summed, total)
    torch.testing.assert_close(mean, total / labelled.sum())
    torch.testing.assert_close(seventh, total / 7)


@pytest.mark.parametrize("skip", [False, True], ids=["logits", "skip_logits"])
def test_a_batch_without_labels_has_loss_zero_and_reaches_every_parameter(make_model, make_batch, skip):
    model, batch = make_model(pattern="ME*-").train(), make_batch(MIXED)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, skip_logits=skip).loss
    loss.backward()
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_logits_are_float32_and_only_as_many_as_asked_for(make_model, make_batch):
    model, batch = make_model().to(torch.bfloat16), make_batch(MIXED)
    batch.pop("labels")
    full = logits(model, batch)
    assert full.dtype == torch.float32
    assert full.shape == (*batch["input_ids"].shape, 263)
    with torch.no_grad():
        assert torch.equal(model(**batch, logits_to_keep=2).logits, full[:, -2:])
        assert torch.equal(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]])


@pytest.mark.parametrize("kept", [2, torch.tensor([0, 3]), torch.tensor(0)], ids=str)
def test_a_loss_of_some_positions_is_refused(make_model, make_batch, kept):
    with pytest.raises(ValueError, match=r"labels are given and logits_to_keep is .*; expected 0"):
        make_model()(**make_batch(MIXED), logits_to_keep=kept)


def test_a_cache_is_returned_where_asked_for_but_not_while_training(make_model, make_batch):
    model, batch = make_model(), make_batch([[6]])
    assert model(**batch, use_cache=True).past_key_values is not None
    assert model(**batch, use_cache=False).past_key_values is None
    assert model.train()(**batch, use_cache=True).past_key_values is None


def test_gradient_checkpointing_changes_no_gradient(make_model, make_batch):
    batch, results = make_batch(MIXED), []
    for checkpointing in (False, True):
        model = make_model(pattern="ME*-").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


def test_images_of_one_batch_do_not_see_each_other(make_model, make_batch, shake):
    model, batch = shake(make_model()), make_batch(MIXED)
    pixels, grids = batch["pixel_values"], batch["image_grid_hw"]
    with torch.no_grad():
        together, tokens = model.get_image_features(pixels, grids)
        alone = [
            model.get_image_features(image, grid[None])[0]
            for image, grid in zip(pixels.split(grids.prod(-1).tolist()), grids)
        ]
    assert tokens == [3, 4, 10]
    alone = torch.cat(alone)
    # Worst relative difference measured over twenty seeds: 2.8e-7.
    assert (together - alone).norm() <= 2e-6 * alone.norm()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_pixel_shuffle_version_of_the_config_is_used(make_model, version):
    model, pixels, grid = make_model(), torch.randn(16, 192), torch.tensor([[4, 4]])
    model.config.ps_version = version
    features = model.vision_model(pixels, image_grid_hw=grid).features
    blocks = features.view(2, 2, 2, 2, 32).transpose(1, 2)  # (Y, X, dy, dx, C)
    if version == "v1":
        blocks = blocks.transpose(0, 1)
    expected = model.multi_modal_projector(blocks.reshape(4, 128))
    assert torch.equal(model.get_image_features(pixels, grid)[0], expected)


# Wrong input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"pixel_values": b["pixel_values"][:-1]}, "67 patches but image_grid_hw describes 68"),
        (lambda b: {"image_grid_hw": b["image_grid_hw"][:-1]}, "68 patches but image_grid_hw describes 28"),
        (
            lambda b: {"image_grid_hw": torch.tensor([[3, 4], [4, 4], [4, 10]])},
            r"grid \(3, 4\) is not a multiple of 2",
        ),
        (lambda b: {"image_grid_hw": None}, "image_grid_hw"),
        (lambda b: {"pixel_values": None, "image_grid_hw": None}, "row 0 has 7 image .* no image was given"),
        (lambda b: {"input_ids": b["input_ids"].clamp(min=7)}, "the batch has 0 .* 17 features"),
        (lambda b: {"input_ids": None, "inputs_embeds": torch.zeros(3, 24, 32)}, "image features need input_ids"),
    ],
    ids=[
        "patch_missing",
        "grid_missing",
        "odd_grid",
        "no_grids",
        "images_missing",
        "placeholders_missing",
        "embeddings_with_images",
    ],
)
def test_images_that_do_not_fit_the_text_are_refused(make_model, make_batch, change, message):
    batch = make_batch(MIXED)
    with pytest.raises(FusionError, match=message):
        make_model()(**{**batch, **change(batch)})


def test_a_missing_image_names_its_row(make_model, make_batch):
    batch = make_batch([[9], [3, (2, 2), 2]])
    with pytest.raises(FusionError, match="row 1 has 1 ") as raised:
        make_model()(input_ids=batch["input_ids"])
    assert raised.value.row == 1


def test_a_config_without_an_image_token_means_text_only(make_model, make_batch):
    model, batch = make_model(), make_batch([[6], [3]])
    expected = logits(model, batch)
    model.config.image_token_id = None
    assert torch.equal(logits(model, batch), expected)
    with pytest.raises(FusionError, match="0 placeholders and 3 features"):
        model(**make_batch([[2, (2, 6)]]))


# Checkpoints


def test_the_released_key_names_are_written(make_model, tmp_path):
    make_model(pattern="ME*-").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    blocks, backbone = "vision_model.radio_model.model.blocks.0", "language_model.backbone"
    expected = {
        "vision_model.radio_model.model.patch_generator.embedder.weight": (32, 192),
        "vision_model.radio_model.model.patch_generator.pos_embed": (1, 1024, 32),
        "vision_model.radio_model.model.patch_generator.cls_token.token": (10, 32),
        f"{blocks}.norm1.weight": (32,),
        f"{blocks}.norm2.bias": (32,),
        f"{blocks}.attn.qkv.weight": (96, 32),
        f"{blocks}.attn.qkv.bias": (96,),
        f"{blocks}.attn.proj.weight": (32, 32),
        f"{blocks}.mlp.fc1.weight": (64, 32),
        f"{blocks}.mlp.fc2.bias": (32,),
        "mlp1.0.weight": (128,),
        "mlp1.1.weight": (64, 128),
        "mlp1.3.weight": (32, 64),
        f"{backbone}.embeddings.weight": (263, 32),
        f"{backbone}.norm_f.weight": (32,),
        f"{backbone}.layers.0.norm.weight": (32,),
        f"{backbone}.layers.0.mixer.A_log": (8,),
        f"{backbone}.layers.0.mixer.D": (8,),
        f"{backbone}.layers.0.mixer.dt_bias": (8,),
        f"{backbone}.layers.0.mixer.conv1d.weight": (192, 1, 4),
        f"{backbone}.layers.0.mixer.in_proj.weight": (264, 32),
        f"{backbone}.layers.1.mixer.gate.weight": (4, 32),
        f"{backbone}.layers.1.mixer.gate.e_score_correction_bias": (4,),
        f"{backbone}.layers.1.mixer.experts.0.up_proj.weight": (32, 32),
        f"{backbone}.layers.1.mixer.experts.3.down_proj.weight": (32, 32),
        f"{backbone}.layers.1.mixer.shared_experts.up_proj.weight": (32, 32),
        f"{backbone}.layers.2.mixer.k_proj.weight": (16, 32),
        f"{backbone}.layers.3.mixer.down_proj.weight": (32, 64),
        "language_model.lm_head.weight": (263, 32),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    ours = (
        "multi_modal_projector",
        "language_model.model.",
        "vision_model.encoder",
        "vision_model.embeddings",
        "pixel_norm",
    )
    assert not [name for name in shapes if name.startswith(ours)]


@pytest.mark.parametrize("pattern", ["M*-", "ME*-"])
def test_a_saved_model_is_read_back_bit_by_bit(make_model, make_batch, shake, tmp_path, pattern):
    model = shake(make_model(pattern=pattern))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_equal_weights(again, model)
    batch = make_batch(MIXED)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_sharded_checkpoint_is_read_back_bit_by_bit(make_model, shake, tmp_path):
    model = shake(make_model(pattern="ME*-"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_weights(load(tmp_path), model)


@pytest.mark.parametrize("pattern", ["M*-", "ME*-"])
def test_a_checkpoint_of_transformers_own_class_is_read(make_theirs, make_batch, as_floats, tmp_path, pattern):
    theirs = make_theirs(pattern)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nemotron_h_omni"
    ours = load(tmp_path)
    assert_equal_weights(ours, theirs)
    batch = make_batch(MIXED)
    assert torch.equal(logits(ours, batch), logits(theirs, as_floats(batch, ours)))


def as_released(folder: Path, config: PretrainedConfig) -> None:
    """Turns a folder of `save_pretrained` into what is released: other config names, no layer scale."""
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: weight for name, weight in weights.items() if "layer_scale" not in name and "summary_idxs" not in name
    }
    weights["vision_model.radio_model.input_conditioner.norm_mean"] = torch.rand(3, 1, 1)
    weights["vision_model.radio_model.input_conditioner.norm_std"] = torch.rand(3, 1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text["hybrid_override_pattern"] = config.text_config.hybrid_override_pattern
    del text["layers_block_type"]
    vision = config.vision_config.to_diff_dict()
    released = {
        "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"],
        "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
        "auto_map": {"AutoModel": "modeling.NemotronH_Nano_Omni_Reasoning_V3"},
        "llm_config": text,
        "vision_config": {name: value for name, value in vision.items() if name != "model_type"},
        "vit_hidden_size": config.vision_hidden_size,
        "img_context_token_id": config.image_token_id,
        "projector_hidden_size": config.projector_hidden_size,
        "norm_mean": [0.5, 0.4, 0.3],
        "norm_std": [0.2, 0.25, 0.3],
    }
    (folder / "config.json").write_text(json.dumps(released))


def test_a_folder_as_released_is_read(make_theirs, make_batch, as_floats, tmp_path):
    theirs = make_theirs("ME*-")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1.0)
    theirs.save_pretrained(tmp_path)
    as_released(tmp_path, theirs.config)

    ours = load(tmp_path)

    assert_equal_weights(ours, theirs)
    assert (ours.config.norm_mean, ours.config.norm_std) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    batch = make_batch(MIXED)
    assert torch.equal(logits(ours, batch), logits(theirs, as_floats(batch, ours)))


def test_loading_in_bfloat16_keeps_the_routers_bias_and_the_pixel_normaliser_exact(make_model, tmp_path):
    model = make_model(pattern="ME*-")
    bias = torch.tensor([0.1, 0.2, -0.3, 1e-3])
    model.language_model.model.layers[1].mixer.gate.e_score_correction_bias.copy_(bias)
    model.save_pretrained(tmp_path)

    half = load(tmp_path, dtype=torch.bfloat16)

    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.language_model.model.layers[1].mixer.gate.e_score_correction_bias, bias)
    pixels = torch.arange(192, dtype=torch.uint8)[None]
    assert torch.equal(half.vision_model.input_conditioner(pixels), model.vision_model.input_conditioner(pixels))


def test_the_pixel_normaliser_is_the_configs_after_loading(make_model, tmp_path):
    model = make_model()
    model.config.norm_mean, model.config.norm_std = [0.5, 0.25, 0.0], [0.5, 1.0, 2.0]
    model.save_pretrained(tmp_path)
    pixels = torch.full((1, 192), 255, dtype=torch.uint8)
    assert load(tmp_path).vision_model.input_conditioner(pixels)[0, ::64].tolist() == [1.0, 0.75, 0.5]


def test_a_projector_missing_from_the_checkpoint_is_reported_and_initialised(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if not name.startswith("mlp1")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    model, info = NemotronVL.from_pretrained(tmp_path, output_loading_info=True)

    names = {"layer_norm", "linear_1", "linear_2"}
    assert info["missing_keys"] == {f"multi_modal_projector.{name}.weight" for name in names}
    projector = model.multi_modal_projector
    assert torch.equal(projector.layer_norm.weight, torch.ones(128))
    expected = model.config.text_config.initializer_range
    assert 0.75 * expected < projector.linear_1.weight.std() < 1.25 * expected
    assert 0.75 * expected < projector.linear_2.weight.std() < 1.25 * expected


def test_media_that_the_model_has_no_part_for_are_refused_by_name(make_model):
    model, ids = make_model(), torch.tensor([[7, 4, 8]])
    with pytest.raises(FusionError, match="input_features were given to a model without audio_config; leave sounds"):
        model(input_ids=ids, input_features=torch.zeros(1, 16, 32))
    tubelets = {"pixel_values_videos": torch.zeros(4, 2 * 192, dtype=torch.uint8)}
    with pytest.raises(FusionError, match="pixel_values_videos needs video_grid_thw beside it"):
        model(input_ids=ids, **tubelets)
    with pytest.raises(ValueError, match=r"patches have 384 values; expected 192 \(an image's\): use the processor"):
        model(input_ids=ids, **tubelets, video_grid_thw=torch.tensor([[1, 2, 2]]))


def test_what_released_files_leave_out_is_not_saved(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    assert not [
        key for key in load_file(tmp_path / "plain" / "model.safetensors") if "layer_scale" in key or "idxs" in key
    ]
    assert_equal_weights(load(tmp_path / "plain"), model)
    with torch.no_grad():
        model.vision_model.encoder.layer[0].layer_scale1.lambda1[3] = 0.5
    model.save_pretrained(tmp_path / "scaled")
    saved = [key for key in load_file(tmp_path / "scaled" / "model.safetensors") if "layer_scale" in key]
    assert saved == ["vision_model.radio_model.model.blocks.0.layer_scale1.lambda1"]
    assert_equal_weights(load(tmp_path / "scaled"), model)
