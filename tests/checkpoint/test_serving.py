"""What a training changed about media stands where vLLM reads it, and nothing else does."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from lightning_vlm.checkpoint.serving import changes, serve_options, served_config
from lightning_vlm.processing.load import load_processor
from lightning_vlm.processing.released import released_options
from tests.fixtures.released_folders import write_12b, write_omni

IMAGES = ("mode", "tile_size", "use_thumbnail", "image_mean", "image_std", "min_num_patches", "max_num_patches")
VIDEO = ("target_num_patches", "keep_aspect", "pruning_rate")


@pytest.fixture(params=["12b", "omni", "omni with args"])
def base(request, tmp_path, make_theirs):
    folder = tmp_path / request.param
    if request.param == "12b":
        write_12b(folder)
    else:
        write_omni(folder, make_theirs("M*"))
    if request.param == "omni with args":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        vision = config["vision_config"]
        vision["args"] = {name: vision.pop(name) for name in ("min_num_patches", "max_num_patches")}
        path.write_text(json.dumps(config))
    return folder


def served(base, **options):
    """The config and the options of serving after a training with such options."""
    config = json.loads((base / "config.json").read_text())
    saved, settings = (json.loads(json.dumps(load_processor(str(base), given).to_dict())) for given in ({}, options))
    changed = changes(saved, settings)
    before = deepcopy(config)
    found = served_config(config, settings, changed), serve_options(settings, changed), settings
    assert config == before
    return found


def test_without_changes_nothing_changes(base):
    config, options, _ = served(base)
    assert config == json.loads((base / "config.json").read_text())
    # vLLM does not read this one in the config, where the 12B has it
    assert options == (["--video-pruning-rate 0.7"] if base.name == "12b" else [])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "dynamic", "min_num_patches": 16, "max_num_patches": 64},
        {"mode": "static", "tile_size": 32},
        {"use_thumbnail": False, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        {"video": {"target_num_patches": 64, "keep_aspect": False, "pruning_rate": 0.5}},
    ],
    ids=["dynamic", "static", "norms", "video"],
)
def test_what_vllm_reads_is_what_was_trained(base, options):
    config, _, settings = served(base, **options)
    images, video, _ = released_options(config)
    for name in IMAGES:
        if name in images:
            assert images[name] == settings["image_processor"][name], name
    assert ("min_num_patches" in images) == (settings["image_processor"]["mode"] == "dynamic")
    if "video" in options:
        for name in VIDEO[:2]:
            assert video[name] == settings["video"][name], name
    if settings["image_processor"]["mode"] == "dynamic" and options.get("mode"):
        assert config["vision_config"]["args"]["max_num_patches"] == 64, "vLLM reads the bounds of images there"


def test_what_no_config_tells_is_an_option(base):
    video = {"num_frames": 8, "pruning_rate": 0.5}
    _, options, settings = served(base, max_tiles=2, video=video)
    tiles = ["--mm-processor-kwargs '{\"max_num_tiles\": 2}'"] * (settings["image_processor"]["mode"] == "static")
    assert options == [*tiles, '--media-io-kwargs \'{"video": {"num_frames": 8}}\'', "--video-pruning-rate 0.5"]
