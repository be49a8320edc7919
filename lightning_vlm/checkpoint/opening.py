"""A model by the name of its folder: the config as its tensors have it, the network without weights, then the weights.

Released configs leave out what decides shapes: the rows of a vocabulary that was padded, the registers of the tower.
There the tensors have the word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from lightning_vlm.checkpoint.hf_import import Import, ImportPlan, plan_import
from lightning_vlm.checkpoint.layout import canonical_key
from lightning_vlm.checkpoint.weight_files import StoredTensor, WeightFiles
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.schema import DataError

# Code is never run here, but an export hands it on: what serves it may look for what its config's auto_map names.
_DOWNLOADED = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model", "*.py", "README.md"]
_EMBEDDINGS = "language_model.backbone.embeddings.weight"
_PREFIX_TOKENS = "vision_model.radio_model.model.patch_generator.cls_token.token"
_SUMMARY = "vision_model.radio_model.summary_idxs"


def local_folder(name: str, option: str = "model.model_id") -> Path:
    """The folder of a model: itself, or the download of a repository.

    Args:
        name: As `lightning_vlm.checkpoint.source.pretrained_source` lets it through.
        option: What the user set it by, for the error.

    Raises:
        DataError: If it cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            option,
            f"{name!r} cannot be fetched ({reason})",
            "name a folder, or a repository that can be reached",
        ) from error


def make_config(source: str, content: dict[str, Any]) -> NemotronVLConfig:
    """A config of its content.

    Args:
        source: Where the content stands, for the error.
        content: Of a ``config.json``, released or ours.

    Raises:
        DataError: If it describes no model.
    """
    try:
        return NemotronVLConfig.from_dict(content)
    except (StrictDataclassError, TypeError, ValueError) as error:
        problem = f"it describes no model: {' '.join(str(error).split())}"
        raise DataError(source, problem, "correct it, or fetch it anew") from error


def planned_model(folder: Path, files: WeightFiles | None = None) -> NemotronVL:
    """The network of a folder on the meta device, in PyTorch's default dtype: to be sharded, then filled.

    Args:
        folder: Of a released model, or one of ours.
        files: Its weights, where there are any: they decide what the config leaves open.

    Raises:
        DataError: If it has no config.
    """
    found: Mapping[str, StoredTensor] = {} if files is None else files
    config = make_config(str(folder / CONFIG_NAME), _as_stored(_read_config(folder), found))
    if _PREFIX_TOKENS in found:
        config.vision_config.num_registers = found[_PREFIX_TOKENS].shape[0] - config.vision_config.num_cls_tokens
    if files is not None and _SUMMARY in files:  # one index for each teacher, wherever they are kept
        config.vision_config.summary_idxs = files.read(_SUMMARY).tolist()
    with torch.device("meta"):
        model = NemotronVL(config)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def plan_pretrained(folder: Path, from_scratch: Collection[str] = ()) -> tuple[NemotronVL, ImportPlan]:
    """A model on the meta device, in PyTorch's default dtype, and what fills it with the weights of its folder.

    Args:
        folder: Of a released model, or one of ours.
        from_scratch: Parts that get new random weights, see `plan_import`.

    Raises:
        DataError: If the folder has no config or no weights, or they do not fit.
    """
    files = WeightFiles(folder)
    model = planned_model(folder, files)
    return model, plan_import(model, files, from_scratch)


def open_pretrained(
    folder: Path, from_scratch: Collection[str] = (), device: torch.device | None = None
) -> tuple[NemotronVL, Import]:
    """A model with the weights of its folder, in PyTorch's default dtype.

    Args:
        folder: Of a released model, or one of ours.
        from_scratch: Parts that get new random weights, see `plan_import`.
        device: Where it is to be; the CPU by default.

    Raises:
        DataError: If the folder has no config or no weights, or they do not fit.
    """
    model, weights = plan_pretrained(folder, from_scratch)
    return model.eval(), weights.fill(model, device)


def open_random(folder: Path) -> NemotronVL:
    """A model with random weights, of the config of a folder.

    Args:
        folder: With a ``config.json``.

    Raises:
        DataError: If it has none.
    """
    return NemotronVL(make_config(str(folder / CONFIG_NAME), _read_config(folder)))


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        raise DataError(
            "model.model_id",
            f"{str(folder)!r} has no {CONFIG_NAME}",
            f"name a folder with a {CONFIG_NAME}, or set model.config",
        )
    try:
        config, _ = NemotronVLConfig.get_config_dict(folder)
    except OSError as error:
        raise DataError(str(folder / CONFIG_NAME), "it is no JSON", "fetch or write it anew") from error
    return config


def _as_stored(config: dict[str, Any], files: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The config with as many rows of the vocabulary as the files have: a released one may count fewer."""
    name = "llm_config" if "llm_config" in config else "text_config"
    key = next((key for key in files if canonical_key(key) == _EMBEDDINGS), None)
    if key is None or not isinstance(config.get(name), dict):
        return config
    return {**config, name: {**config[name], "vocab_size": files[key].shape[0]}}
