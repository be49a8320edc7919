"""The whole folder of an exported model: weights, and all that serving reads beside them.

Config, tokenizer, template and the rest are the base's own files; the processor's settings are those of the training
where they differ; the model card says where the weights come from.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from lightning_vlm.checkpoint.adapter import write_adapter
from lightning_vlm.checkpoint.hf_export import complete_folder, plan_weights, write_weights
from lightning_vlm.checkpoint.merged import MergedWeights, lora_of, trained_adapters
from lightning_vlm.checkpoint.model_card import CARD, model_card
from lightning_vlm.checkpoint.opening import local_folder
from lightning_vlm.checkpoint.serving import changes, serve_options, served_config
from lightning_vlm.checkpoint.source import pretrained_source
from lightning_vlm.checkpoint.trained import TrainedWeights
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.parts import PARTS
from lightning_vlm.processing.load import load_processor
from lightning_vlm.schema import DataError

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf")
_DTYPE_NAMES = ("torch_dtype", "dtype")


@dataclass(slots=True)
class Release:
    """What was written.

    Attributes:
        folder: Where to.
        base: What the rest came from; ``None`` without one.
        files: Files of weights.
        num_bytes: Of the weights.
        notes: What whoever serves the model should know.
    """

    folder: Path
    base: Path | None
    files: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)


def release(
    trained: TrainedWeights,
    out: Path,
    base: Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    check: Callable[[TrainedWeights, Path], object] | None = None,
) -> Release:
    """Writes a model that can be served.

    Args:
        trained: Its weights and what the checkpoint knows of the run.
        out: The folder; it appears when it is complete.
        base: The model that the training began with, where the checkpoint's own ``model_id`` does not lead there.
        dtype: Of the weights; as in the base, or as trained, by default.
        overwrite: Replace an earlier export in ``out``.
        check: Gets the weights that were written and the complete folder before it has its name; what it raises leaves
            nothing behind.

    Raises:
        DataError: If the base is not where it was, does not fit the weights, or the folder cannot be written.
    """
    base = base or _recorded_base(trained)
    files = _weights_of(base, trained)
    if (lora := lora_of(trained)) is not None:
        trained = MergedWeights(trained, trained_adapters(trained, lora, base, files))
    plan = plan_weights(trained, files, dtype)
    result = Release(out, base, len(plan.files), plan.num_bytes)
    with complete_folder(out, overwrite, _sources(trained, base)) as folder:
        write_weights(folder, plan, trained, files)
        if base is not None:
            _copy_rest(base, folder)
        if not (folder / CONFIG_NAME).is_file():
            NemotronVLConfig.from_dict(trained.hyperparameters["config"]).save_pretrained(folder)
        if dtype is not None or files is None:  # else the weights are stored as in the base, whose config says so
            _set_dtype(folder / CONFIG_NAME, dtype or plan.dtype)
        result.notes += _write_processor(trained, base, folder)
        (folder / CARD).write_text(model_card(trained, out.name, plan.num_bytes, result.notes), encoding="utf-8")
        if check is not None:
            check(trained, folder)
    return result


def release_adapter(trained: TrainedWeights, out: Path, base: Path | None = None, overwrite: bool = False) -> Release:
    """Writes the adapters of a LoRA run alone.

    Args:
        trained: Its checkpoint.
        out: The folder; it appears when it is complete.
        base: As for `release`.
        overwrite: As for `release`.

    Raises:
        DataError: If it was no LoRA run, or more was trained than adapters.
    """
    if (lora := lora_of(trained)) is None:
        raise DataError(str(trained.path), "it was trained without LoRA", "export without --adapter")
    base = base or _recorded_base(trained)
    result = Release(out, base, 1, 0)
    with complete_folder(out, overwrite, _sources(trained, base)) as folder:
        adapters = trained_adapters(trained, lora, base, _weights_of(base, trained))
        result.num_bytes = write_adapter(folder, trained, lora, adapters)
        on = {adapter.base.partition(".")[0] for adapter in adapters}
        if others := [name for name, part in PARTS.items() if part.attribute in on and part.role != "language_model"]:
            result.notes.append(
                f"vLLM applies adapters of the language model alone, and says nothing of those of {', '.join(others)}; "
                "serve the merged model, exported without --adapter"
            )
        (folder / CARD).write_text(model_card(trained, out.name, result.num_bytes, result.notes), encoding="utf-8")
    return result


def _recorded_base(trained: TrainedWeights) -> Path | None:
    name = trained.hyperparameters.get("model_id")
    if name is None:
        return None
    try:
        return local_folder(pretrained_source(name, "model.model_id"))
    except DataError as error:
        raise DataError(
            str(trained.path),
            f"it was trained from {name!r}, which is no folder here ({error.problem})",
            "name that folder with --base",
        ) from error


def _weights_of(base: Path | None, trained: TrainedWeights) -> WeightFiles | None:
    """The weights that a training began with; of a folder, it may have taken the config alone."""
    return None if base is None or trained.hyperparameters.get("init") == "random" else WeightFiles(base)


def _sources(trained: TrainedWeights, base: Path | None) -> list[Path]:
    return [trained.path, *([] if base is None else [base])]


def _copy_rest(base: Path, folder: Path) -> None:
    for file in sorted(base.iterdir()):
        is_weight = file.name.endswith(_WEIGHTS)
        if file.is_file() and not is_weight and file.name != CARD and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if (changed := _with_dtype(config, dtype)) != config:
        _write_json(path, changed)


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config and those of its parts, where they name a dtype."""
    parts = {name: _with_dtype(part, dtype) for name, part in config.items() if isinstance(part, dict)}
    named = {name: str(dtype).removeprefix("torch.") for name in _DTYPE_NAMES if name in config}
    return {**config, **parts, **named}


def _write_processor(trained: TrainedWeights, base: Path | None, folder: Path) -> list[str]:
    """Leaves the base's files where they say what the training did; returns what serving should know."""
    has_tokenizer = (folder / TOKENIZER_CONFIG_FILE).is_file()
    settings = trained.record.get("processor")
    saved = None
    if base is not None and has_tokenizer and settings is not None:
        try:
            saved = json.loads(json.dumps(load_processor(str(base)).to_dict()))
        except (OSError, ValueError) as error:  # the training had its processor from elsewhere
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"{base}: its processor cannot be loaded ({reason}), so the export is not held against it; "
                f"{PROCESSOR_NAME} gets the settings of the training",
                stacklevel=2,
            )
    notes = [] if has_tokenizer else ["there is no tokenizer in this folder: it is served with that of the training"]
    if base is None:
        notes.append(
            "there was no released model to begin with: NemotronVL.from_pretrained reads this folder, vLLM and "
            "transformers alone do not"
        )
    if settings is None:
        return notes
    changed = [] if saved is None else changes(saved, settings)
    if saved is None or changed:
        _write_json(folder / PROCESSOR_NAME, settings, sort_keys=True)
    if changed:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if (served := served_config(config, settings, changed)) != config:
            _write_json(folder / CONFIG_NAME, served)
        said = ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changed)
        notes.append(f"media were prepared otherwise than the base says: {said}; serve with the same settings")
    if base is not None and (options := serve_options(settings, changed)):
        notes.append(f"vLLM prepares media as in training with: vllm serve FOLDER {' '.join(options)}")
    return notes


def _write_json(path: Path, content: dict[str, Any], sort_keys: bool = False) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
