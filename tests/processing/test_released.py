"""What a released config.json says of media, for both models and in every name it was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.geometry.videos import VideoGeometry
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
from lightning_vlm.processing.released import released_options
from lightning_vlm.processing.tiny import tiny_tokenizer

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# spec/nemotron-vl.md A2-A4: what the two configs hold of media.
NANO_12B: dict[str, Any] = {
    "model_type": "NemotronH_Nano_VL_V2",
    "force_image_size": 512,
    "patch_size": 16,
    "downsample_ratio": 0.5,
    "use_thumbnail": True,
    "video_pruning_rate": 0.7,
    "norm_mean": [0.485, 0.456, 0.406],
    "norm_std": [0.229, 0.224, 0.225],
    "vision_config": {"args": {"model": "vit_huge_patch16_224", "cpe_max_size": 2048}, "patch_size": 16},
    "llm_config": {},
}
OMNI: dict[str, Any] = {
    "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
    "force_image_size": 512,
    "patch_size": 16,
    "downsample_ratio": 0.5,
    "use_thumbnail": True,
    "norm_mean": CLIP_MEAN,
    "norm_std": CLIP_STD,
    "vision_config": {
        "args": {"model": "vit_huge_patch16_224", "min_num_patches": 1024, "max_num_patches": 13312},
        "video_temporal_patch_size": 2,
        "video_target_num_patches": 1024,
        "video_maintain_aspect_ratio": True,
        "separate_video_embedder": True,
    },
    "llm_config": {},
    "sound_config": {"model_type": "parakeet", "num_mel_bins": 128, "sampling_rate": 16000, "subsampling_factor": 8},
}


def write_released(folder: Path, config: dict[str, Any], sound: bool) -> None:
    """A folder with a tokenizer and files that are not ours."""
    tiny_tokenizer(sound).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "NemotronNanoVLV2ImageProcessor", "max_num_tiles": 12, "image_size": 512})
    )
    (folder / "config.json").write_text(json.dumps(config))


def test_the_12b_has_tiles_and_single_frames_of_256_tokens(tmp_path: Path) -> None:
    write_released(tmp_path, NANO_12B, sound=False)
    processor = NemotronVLProcessor.from_pretrained(tmp_path)
    geometry, video = processor.geometry, processor.video_geometry
    assert (geometry.mode, geometry.tile_size, geometry.max_tiles, geometry.use_thumbnail) == ("static", 512, 12, True)
    assert geometry.max_image_tokens == 3328
    assert list(processor.image_processor.image_mean) == NANO_12B["norm_mean"]
    assert video == VideoGeometry(temporal_patch_size=1, keep_aspect=False, num_frames=128, fps=2.0, pruning_rate=0.7)
    assert video.tokens_per_tubelet(video.grid(720, 1280)) == 256
    assert processor.sound is None


@pytest.mark.parametrize("place", ["args", "vision_config"])
def test_the_omni_has_dynamic_images_tubelets_and_sounds(tmp_path: Path, place: str) -> None:
    config = json.loads(json.dumps(OMNI))
    if place == "vision_config":  # where SGLang and the OpenAI-compatible exports look for them
        config["vision_config"] |= config["vision_config"].pop("args")
    write_released(tmp_path, config, sound=True)
    processor = NemotronVLProcessor.from_pretrained(tmp_path)
    geometry, video, sound = processor.geometry, processor.video_geometry, processor.sound_geometry
    assert (geometry.mode, geometry.min_num_patches, geometry.max_num_patches) == ("dynamic", 1024, 13312)
    assert geometry.num_image_tokens(1080, 1920) == 2040
    assert video == VideoGeometry(temporal_patch_size=2, num_frames=256, fps=2.0)
    assert video.grid(720, 1280) == (24, 42)
    assert sound is not None
    assert sound.num_tokens(30 * 16000) == 375
    assert processor.num_mel_bins == 128


def test_options_of_the_user_come_first(tmp_path: Path) -> None:
    write_released(tmp_path, OMNI, sound=True)
    processor = NemotronVLProcessor.from_pretrained(
        tmp_path, max_num_patches=4096, video={"pruning_rate": 0.5}, sound={"clip_s": None}
    )
    assert processor.geometry.max_num_patches == 4096
    assert processor.video_geometry == VideoGeometry(num_frames=256, pruning_rate=0.5)
    assert processor.sound_geometry is not None
    assert processor.sound_geometry.clip_s is None


def test_what_was_saved_by_us_is_not_asked_of_the_config(tmp_path: Path) -> None:
    write_released(tmp_path, OMNI, sound=True)
    processor = NemotronVLProcessor(NemotronVLImageProcessor(mode="static"), tiny_tokenizer())
    processor.save_pretrained(tmp_path)
    again = NemotronVLProcessor.from_pretrained(tmp_path)
    assert (again.geometry.mode, again.video, again.sound) == ("static", None, None)


def test_a_size_of_frames_in_pixels_is_as_many_patches() -> None:
    config = json.loads(json.dumps(NANO_12B))
    config["vision_config"]["video_target_img_size"] = 500
    _, video, _ = released_options(config)
    assert video is not None
    assert video["target_num_patches"] == 32 * 32


def test_other_configs_say_nothing() -> None:
    assert released_options({}) == ({}, None, None)
    assert released_options({"model_type": "nemotron_vl", "vision_config": {}}) == ({}, None, None)
