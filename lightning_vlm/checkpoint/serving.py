"""How media were prepared in training, said where vLLM looks: the released ``config.json``, and options of its own.

vLLM reads no processor config for these models (its ``nano_nemotron_vl``, 0.33): what a training changed has to stand
in the config, or be given to ``vllm serve``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

Change = tuple[str, Any, Any]
"""The dotted name of a processor's setting, what it was in the base, and what it was in training."""

_IN_CONFIG = {
    "image_processor.tile_size": "force_image_size",
    "image_processor.use_thumbnail": "use_thumbnail",
    "image_processor.image_mean": "norm_mean",
    "image_processor.image_std": "norm_std",
}
_IN_VISION_CONFIG = {
    "video.target_num_patches": "video_target_num_patches",
    "video.keep_aspect": "video_maintain_aspect_ratio",
}
_BOUNDS = ("min_num_patches", "max_num_patches")


def changes(old: Any, new: Any, name: str = "") -> list[Change]:
    """What differs between two processors' settings.

    Args:
        old: Of the base.
        new: Of the training.
        name: Of both.
    """
    if isinstance(old, dict) or isinstance(new, dict):
        old, new = old or {}, new or {}
        names = sorted({*old, *new})
        return [change for key in names for change in changes(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [(name, old, new)]


def served_config(config: dict[str, Any], settings: dict[str, Any], changed: Sequence[Change]) -> dict[str, Any]:
    """A released config that says how media were prepared in training.

    Args:
        config: Of the base.
        settings: Of the training's processor.
        changed: In which they differ.
    """
    config = deepcopy(config)
    if "force_image_size" not in config or "vision_config" not in config:
        return config  # no released one: the processor config says everything
    vision, images = config["vision_config"], settings["image_processor"]
    args = vision.get("args") or {}
    for name, _, value in changed:
        if name in _IN_CONFIG:
            config[_IN_CONFIG[name]] = value
        elif name in _IN_VISION_CONFIG:
            place = args if _IN_VISION_CONFIG[name] in args else vision
            place[_IN_VISION_CONFIG[name]] = value
        elif name == "video.pruning_rate" and "video_pruning_rate" in config:
            config["video_pruning_rate"] = value
    if any(name.removeprefix("image_processor.") in ("mode", *_BOUNDS) for name, _, _ in changed):
        vision["args"] = args  # where vLLM reads the bounds; without them it cuts images into tiles
        for bound in _BOUNDS:
            for place in (vision, args):
                place.pop(bound, None)
            if images["mode"] == "dynamic":
                args[bound] = images[bound]
    return config


def serve_options(settings: dict[str, Any], changed: Sequence[Change]) -> list[str]:
    """Options of ``vllm serve`` for what no config tells it.

    Args:
        settings: Of the training's processor.
        changed: In which they differ from the base.
    """
    new = {name: value for name, _, value in changed}
    options = []
    if (tiles := new.get("image_processor.max_tiles")) is not None and settings["image_processor"]["mode"] == "static":
        options.append(f"--mm-processor-kwargs '{json.dumps({'max_num_tiles': tiles})}'")
    if (frames := {key: new[f"video.{key}"] for key in ("num_frames", "fps") if f"video.{key}" in new}) != {}:
        options.append(f"--media-io-kwargs '{json.dumps({'video': frames})}'")
    if rate := (settings.get("video") or {}).get("pruning_rate"):
        options.append(f"--video-pruning-rate {rate}")
    return options
