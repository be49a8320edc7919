"""The config: what it derives, the names it accepts, and the errors for parts that do not fit together."""

from __future__ import annotations

import json

import pytest
from transformers import NemotronHConfig, RadioConfig

from lightning_vlm import NemotronVL, NemotronVLConfig


def released(**overrides):
    """A config.json in the words of the released Nemotron-3-Nano-Omni, small where size is free."""
    return {
        "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"],
        "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
        "auto_map": {"AutoConfig": "configuration.NemotronH_Nano_Omni_Reasoning_V3_Config"},
        "force_image_size": 512,
        "patch_size": 16,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "vit_hidden_size": 1280,
        "projector_hidden_size": 20480,
        "img_context_token_id": 18,
        "img_context_token": "<image>",
        "norm_mean": [0.5, 0.4, 0.3],
        "norm_std": [0.2, 0.25, 0.3],
        "vision_config": {
            "args": {"model": "vit_huge_patch16_224", "min_num_patches": 1024, "max_num_patches": 13312},
            "patch_size": 16,
            "max_resolution": 2048,
            "video_temporal_patch_size": 2,
        },
        "llm_config": {
            "model_type": "nemotron_h",
            "hidden_size": 2688,
            "vocab_size": 131072,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "n_routed_experts": 128,
        },
        **overrides,
    }


def test_released_names_are_accepted():
    config = NemotronVLConfig.from_dict(released())
    assert config.image_token_id == 18
    assert config.vision_hidden_size == config.vision_config.hidden_size == 1280
    assert config.text_config.hidden_size == 2688
    assert config.text_config.n_routed_experts == 128
    assert len(config.text_config.layers_block_type) == 52
    assert (config.norm_mean, config.norm_std) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert (config.merge_size, config.ps_version, config.projector_hidden_size) == (2, "v2", 20480)
    assert config.vision_config.video_temporal_patch_size == 2
    assert config.vision_config.num_summary_tokens == 10


def test_our_names_win_over_released_ones():
    assert NemotronVLConfig.from_dict(released(image_token_id=7)).image_token_id == 7


def test_image_token_id_zero_is_a_token():
    assert NemotronVLConfig.from_dict(released(image_token_id=0)).image_token_id == 0
    assert NemotronVLConfig.from_dict(released(img_context_token_id=0)).image_token_id == 0


@pytest.mark.parametrize("config", [NemotronVLConfig.tiny(pattern="ME*-"), NemotronVLConfig.from_dict(released())])
def test_a_saved_config_is_read_back_equal(tmp_path, config):
    config.save_pretrained(tmp_path)
    again = NemotronVLConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.text_config, NemotronHConfig)
    assert isinstance(again.vision_config, RadioConfig)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "nemotron_vl"
    assert written["text_config"]["layers_block_type"] == config.text_config.layers_block_type


def test_plain_values_rebuild_the_config():
    config = NemotronVLConfig.tiny(pattern="ME*-")
    assert NemotronVLConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert NemotronVLConfig(**json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_the_towers_own_normaliser_is_the_default():
    config = NemotronVLConfig(vision_config={"norm_mean": [0.1, 0.2, 0.3], "norm_std": [1.0, 2.0, 3.0]})
    assert (config.norm_mean, config.norm_std) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])


def test_tying_follows_the_language_model():
    assert not NemotronVLConfig.tiny().tie_word_embeddings
    assert NemotronVLConfig.tiny(tie_word_embeddings=True).tie_word_embeddings


def test_sub_configs_may_be_objects():
    vision, text = RadioConfig(hidden_size=32), NemotronHConfig(hidden_size=64)
    config = NemotronVLConfig(vision_config=vision, text_config=text)
    assert config.vision_config is vision
    assert config.text_config is text
    assert config.vision_hidden_size == 32


@pytest.mark.parametrize(("ratio", "merge"), [(1.0, 1), (0.5, 2), (0.25, 4)])
def test_merge_size_is_the_inverse_of_the_downsample_ratio(ratio, merge):
    assert NemotronVLConfig(downsample_ratio=ratio).merge_size == merge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vit_hidden_size": 1024}, "vision_hidden_size is 1024 .* vision_config.hidden_size is 1280"),
        ({"ps_version": "v3"}, "ps_version is 'v3'; expected 'v1' or 'v2'"),
        ({"img_context_token_id": 131072}, "image_token_id is 131072 .* 131072 rows"),
        ({"sound_context_token_id": 18}, "image_token_id and audio_token_id are both 18; expected a placeholder each"),
        ({"sound_config": {"projection_hidden_size": 64}}, "audio_config is given without audio_token_id; expected"),
    ],
    ids=[
        "vision_width",
        "pixel_shuffle",
        "image_token_outside_the_vocabulary",
        "one_placeholder_for_both",
        "no_placeholder_of_sounds",
    ],
)
def test_parts_that_do_not_fit_name_both_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        NemotronVLConfig.from_dict(released(**options))


def test_tiny_has_about_a_million_parameters():
    count = sum(parameter.numel() for parameter in NemotronVL(NemotronVLConfig.tiny()).parameters())
    assert 0.9e6 < count < 1.2e6
