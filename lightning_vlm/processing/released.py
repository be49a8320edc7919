"""The config of a released checkpoint -> how its media are processed, as vLLM reads it from there.

Released folders say in ``config.json`` what serving needs to know, in names that changed over time: numbers stand in
``vision_config`` itself or in its ``args``, parts are called by old or new names. Folders of our own have a processor
config that says everything.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

Options = dict[str, Any]


def read_config(name: str | os.PathLike[str], **kwargs: Any) -> Options:
    """The ``config.json`` of a folder or, if the hub may be reached, a repository; empty where there is none.

    Args:
        name: Folder or repository name.
        **kwargs: Of the hub download.
    """
    path = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, **kwargs)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def released_options(config: Options) -> tuple[Options, Options | None, Options | None]:
    """Options of images, videos and sounds.

    Source: vLLM's nano_nemotron_vl. Images are ``dynamic`` where the vision config bounds their patches, else
    ``static`` tiles; frames are tubelets near a number of patches where it says so, else single square tiles. As many
    frames as the model cards serve: two per second, at most 128 single ones or 256 in tubelets.

    Args:
        config: A released ``config.json``.

    Returns:
        Arguments of `NemotronVLImageProcessor`, and of `NemotronVLProcessor` its ``video`` and ``sound``; all empty for
        a config that is no released one.
    """
    if "force_image_size" not in config or "vision_config" not in config:
        return {}, None, None
    vision = config["vision_config"]
    vision = {**vision, **(vision.get("args") or {})}
    patch, tile = config.get("patch_size", 16), config["force_image_size"]
    is_dynamic = "min_num_patches" in vision
    images: Options = {
        "mode": "dynamic" if is_dynamic else "static",
        "patch_size": patch,
        "tile_size": tile,
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "use_thumbnail": config.get("use_thumbnail", True),
    }
    if is_dynamic:
        images["min_num_patches"] = vision["min_num_patches"]
        images["max_num_patches"] = vision.get("max_num_patches", 0)
    images |= {ours: config[name] for name, ours in _NORMS.items() if config.get(name) is not None}

    frames = vision.get("video_temporal_patch_size") or 1
    side = math.ceil((vision.get("video_target_img_size") or tile) / patch)
    video: Options = {
        "temporal_patch_size": frames,
        "target_num_patches": vision.get("video_target_num_patches") or side**2,
        "keep_aspect": bool(vision.get("video_maintain_aspect_ratio", False)),
        "pruning_rate": config.get("video_pruning_rate") or 0.0,
        "num_frames": 128 if frames == 1 else 256,
        "fps": 2.0,
    }
    sound = config.get("sound_config") or config.get("audio_config")
    return images, video, None if not sound else {name: sound[name] for name in _SOUND if name in sound}


_NORMS = {"norm_mean": "image_mean", "norm_std": "image_std"}
_SOUND = ("num_mel_bins", "sampling_rate", "subsampling_factor")
