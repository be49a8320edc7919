"""Released folders into our model: both layouts, every odd name, and every way in which a folder may not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.checkpoint.hf_import import import_weights
from lightning_vlm.checkpoint.layout import released_tensors
from lightning_vlm.checkpoint.opening import open_pretrained, open_random
from lightning_vlm.checkpoint.source import open_processor
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.schema import DataError
from tests.fixtures.released_folders import ROWS_12B, write_12b, write_omni, write_weights

FILE = "model.safetensors"


def edit(folder: Path, change) -> None:
    """Rewrites the single file of a folder."""
    weights = change(load_file(folder / FILE))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / FILE, metadata={"format": "pt"})


def assert_equal_weights(actual: NemotronVL, expected: NemotronVL) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.to(ours[name].dtype)), name


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    write_12b(tmp_path / "nano")
    return tmp_path / "nano"


@pytest.fixture
def omni(tmp_path: Path, make_theirs) -> Path:
    write_omni(tmp_path / "omni", make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    return tmp_path / "omni"


# The table of names


@pytest.mark.parametrize("options", [{}, {"video": True, "audio_token_id": 5, "pattern": "ME*-"}], ids=["12b", "omni"])
def test_names_and_shapes_are_those_that_transformers_writes(options):
    with torch.device("meta"):
        model = NemotronVL(NemotronVLConfig.tiny(**options))
    state = model.state_dict()
    expected = revert_weight_conversion(model, dict(state))
    actual = released_tensors({name: tuple(value.shape) for name, value in state.items()})
    assert {key: shape for key, (shape, _) in actual.items()} == {k: tuple(v.shape) for k, v in expected.items()}


# Both layouts


def test_the_omni_is_what_transformers_own_class_holds(make_theirs, make_batch, as_floats, tmp_path):
    theirs = make_theirs("ME*-", sound=True, moe_intermediate_size=48)
    write_omni(tmp_path, theirs, torch.float32)
    ours, report = open_pretrained(tmp_path)
    assert_equal_weights(ours, theirs)
    batch = make_batch([[5, (2, 6), 3, (4, 4), 9], [8]])
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**as_floats(batch, ours)).logits)
    assert [name.rpartition(".")[2] for name in report.left_aside] == ["fb", "window", "norm_mean", "norm_std"]
    assert report.tensors == len(WeightFiles(tmp_path)) - 4


def test_the_12b_has_the_rows_and_prefix_tokens_of_its_tensors(nano):
    model, report = open_pretrained(nano)
    assert model.language_model.model.embeddings.weight.shape[0] == model.config.text_config.vocab_size == ROWS_12B
    assert model.vision_model.embeddings.cls_register_token.shape[0] == 16
    stored = load_file(nano / FILE)
    qkv = stored["vision_model.radio_model.model.blocks.1.attn.qkv.weight"]
    attention = model.vision_model.encoder.layer[1].attention
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(joined, qkv.float())
    assert report.num_bytes == sum(v.nbytes for k, v in stored.items() if "input_conditioner" not in k)
    assert model.generation_config.eos_token_id == [3, 2]


def test_transformers_loading_gives_the_same_model(omni):
    ours, _ = open_pretrained(omni)
    assert_equal_weights(ours, NemotronVL.from_pretrained(omni, dtype=torch.float32))
    assert torch.equal(
        ours.audio_tower.encode_positions.inv_freq,
        NemotronVL.from_pretrained(omni).audio_tower.encode_positions.inv_freq,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_default_dtype_and_the_routers_bias_in_float32(omni, dtype):
    torch.set_default_dtype(dtype)
    try:
        model, _ = open_pretrained(omni)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    files = WeightFiles(omni)
    bias = files.read("language_model.backbone.layers.1.mixer.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert not torch.equal(bias, bias.bfloat16().float())  # else rounding would not show
    assert torch.equal(model.language_model.model.layers[1].mixer.gate.e_score_correction_bias, bias)


def rename_backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".backbone.embeddings", ".backbone.embed_tokens").replace(".backbone.", ".model."): value
            for key, value in weights.items()}  # fmt: skip


def test_other_names_of_the_language_model_are_read(nano):
    expected, _ = open_pretrained(nano)
    edit(nano, rename_backbone)
    assert "language_model.model.embed_tokens.weight" in WeightFiles(nano)
    actual, _ = open_pretrained(nano)
    assert_equal_weights(actual, expected)


def test_files_with_our_own_names_are_read(omni):
    expected, _ = open_pretrained(omni)
    state = {name: value.clone() for name, value in expected.state_dict().items()}
    for file in omni.glob("*.safetensors*"):
        file.unlink()
    write_weights(omni, state, 1)
    actual, _ = open_pretrained(omni)
    assert_equal_weights(actual, expected)


def test_zero_biases_of_the_early_omni_are_left_aside_and_others_are_not(omni, tmp_path):
    expected, _ = open_pretrained(omni)
    weights = {key: WeightFiles(omni).read(key) for key in WeightFiles(omni)}
    early = {f"sound_encoder.encoder.layers.{layer}.{name}.bias": torch.zeros(64, dtype=torch.bfloat16)
             for layer in range(2) for name in ("self_attn.q_proj", "conv.depthwise_conv")}  # fmt: skip
    for file in omni.glob("*.safetensors*"):
        file.unlink()
    write_weights(omni, weights | early, 1)
    model, report = open_pretrained(omni)
    assert_equal_weights(model, expected)
    assert set(early) <= set(report.left_aside)
    early[next(iter(early))][7] = 1e-3
    write_weights(omni, weights | early, 1)
    with pytest.raises(DataError, match=r"unexpected +1 +sound_encoder.encoder.layers.\*.self_attn.q_proj.bias"):
        open_pretrained(omni)


def test_weights_may_be_read_into_a_model_that_has_some(nano):
    expected, _ = open_pretrained(nano)
    torch.manual_seed(1)
    model = NemotronVL(expected.config)
    import_weights(model, WeightFiles(nano))
    assert_equal_weights(model, expected)


# What may be new


def test_a_part_from_scratch_is_new_whatever_the_files_hold(nano):
    first, report = open_pretrained(nano, ["projector"])
    second, _ = open_pretrained(nano, ["projector"])
    before = WeightFiles(nano).read("mlp1.1.weight").float()
    assert first.multi_modal_projector.linear_1.weight.std() > 0
    assert torch.equal(first.multi_modal_projector.layer_norm.weight, torch.ones(128))
    assert not torch.equal(first.multi_modal_projector.linear_1.weight, before)
    assert not torch.equal(first.multi_modal_projector.linear_1.weight, second.multi_modal_projector.linear_1.weight)
    assert torch.equal(first.language_model.lm_head.weight, second.language_model.lm_head.weight)
    assert report.new == [f"multi_modal_projector.{n}.weight" for n in ("layer_norm", "linear_1", "linear_2")]
    assert "made from scratch: multi_modal_projector.layer_norm.weight" in str(report)


def test_a_module_of_a_part_from_scratch_may_be_missing(nano):
    config = json.loads((nano / "config.json").read_text())
    config["vision_config"]["video_temporal_patch_size"] = 2
    (nano / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"missing +1 +vision_model.radio_model.model.patch_generator.video_embedder"):
        open_pretrained(nano)
    model, report = open_pretrained(nano, ["vision.embeddings.video_patch_projection"])
    assert report.new == ["vision_model.embeddings.video_patch_projection.weight"]
    assert 0 < model.vision_model.embeddings.video_patch_projection.weight.std() < 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("connector", "the model has no part 'connector'; expected one of vision, projector"),
        ("audio", "model.from_scratch: 'audio' is named, but the model has no audio_tower; leave it out"),
        ("vision.blocks", "'vision.blocks' is named, but the model has no vision_model.blocks; leave it out"),
    ],
)
def test_what_the_model_lacks_cannot_be_from_scratch(nano, name, message):
    with pytest.raises(ValueError, match=message):
        open_pretrained(nano, [name])


# Folders that do not fit


def test_all_differences_are_told_in_one_table(nano):
    def change(weights):
        weights["mlp1.3.weight"] = weights["mlp1.3.weight"][:, :40]
        weights["language_model.backbone.layers.0.mixer.surplus"] = torch.zeros(3)
        return {key: value for key, value in weights.items() if not key.endswith("attn.qkv.bias")}

    edit(nano, change)
    with pytest.raises(DataError) as raised:
        open_pretrained(nano)
    assert str(raised.value) == (
        f"{nano}: 4 of its tensors do not fit the model of the config, expected all to:\n"
        "  what         tensors  name in the files                                      model     files\n"
        "  missing            2  vision_model.radio_model.model.blocks.*.attn.qkv.bias  (96)      -\n"
        "  other shape        1  mlp1.3.weight                                          (32, 48)  (32, 40)\n"
        "  unexpected         1  language_model.backbone.layers.*.mixer.surplus         -         (3)\n"
        "; correct the config, or name the parts that may be new in model.from_scratch, e.g. [projector]."
    )


def test_a_model_that_does_not_fit_is_left_as_it_was(nano):
    model, _ = open_pretrained(nano)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit(nano, lambda weights: {k: v + 1 for k, v in weights.items() if k != "mlp1.0.weight"})
    with pytest.raises(DataError, match=r"mlp1\.0\.weight"):
        import_weights(model, WeightFiles(nano))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_normalisation_than_the_towers_is_told(tmp_path):
    write_12b(tmp_path, norm_mean=[0.485, 0.456, 0.406])
    with pytest.warns(UserWarning, match=r"the tower's own norm_mean is \[0.4815, 0.4578, 0.4082\], but config.json"):
        open_pretrained(tmp_path)


def test_a_dtype_that_is_not_known_is_told_with_its_tensor(nano):
    content = (nano / FILE).read_bytes()
    entry = b'"mlp1.1.weight":{"dtype":"BF16"'
    assert entry in content
    (nano / FILE).write_bytes(content.replace(entry, entry.replace(b'"BF16"', b'"F4"  ')))
    with pytest.raises(DataError) as raised:
        WeightFiles(nano)
    assert str(raised.value) == (
        f"{nano / FILE}: 'mlp1.1.weight' is stored as F4, expected one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, "
        "BOOL, F8_E4M3, F8_E5M2; name the model in another precision, or convert it."
    )
    (nano / FILE).write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"is no whole safetensors file \(it has .* bytes, its header describes"):
        WeightFiles(nano)


def test_a_config_alone_gives_random_weights(nano):
    (nano / FILE).unlink()
    assert open_random(nano).config.text_config.hidden_size == 32
    with pytest.raises(DataError, match=r"holds neither model.safetensors nor model.safetensors.index.json; name a"):
        open_pretrained(nano)
    (nano / "config.json").unlink()
    with pytest.raises(DataError, match=r"has no config.json; name a folder with a config.json, or set model.config"):
        open_random(nano)


# Tokenizer and processor


def test_a_missing_template_is_not_guessed(nano):
    assert open_processor(str(nano)).image_token_id == 4
    (nano / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"nano' has no chat template \(chat_template.jinja, or chat_template in"):
        open_processor(str(nano))


def test_special_tokens_are_found_by_their_text_wherever_they_are(nano):
    tokenizer = json.loads((nano / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    image, other = vocabulary["<image>"], vocabulary["a"]
    vocabulary["<image>"], vocabulary["a"] = other, image
    for token in tokenizer["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    (nano / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert open_processor(str(nano)).image_token_id == other
