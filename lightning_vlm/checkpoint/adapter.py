"""The adapters of a LoRA run alone, in peft's format and by the released names of what they are on.

Released files have query, key and value of the vision tower in one matrix: their three adapters become one of three
times the rank, whose second factor is block-diagonal. The update is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_vlm.checkpoint.layout import places
from lightning_vlm.checkpoint.trained import TrainedWeights
from lightning_vlm.models.lora import Adapter, Lora, without_adapters
from lightning_vlm.models.parts import PARTS
from lightning_vlm.schema import DataError

_PREFIX = "base_model.model."  # of peft's files


def write_adapter(folder: Path, trained: TrainedWeights, lora: Lora, adapters: list[Adapter]) -> int:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: Where to.
        trained: The checkpoint.
        lora: Settings of its run.
        adapters: In it.

    Returns:
        Bytes of the adapters.

    Raises:
        DataError: If more was trained than adapters of matrices can hold.
    """
    _check_holds_all(trained, lora, adapters)
    grouped: dict[str, list[tuple[int, Adapter]]] = {}
    for adapter in adapters:
        name = without_adapters(adapter.base)
        [place] = places(name, trained.shape(adapter.base))
        grouped.setdefault(place.key.removesuffix(".weight"), []).append((place.rows[0] if place.rows else 0, adapter))
    tensors: dict[str, Tensor] = {}
    fused = []
    for module, found in grouped.items():
        parts = [adapter for _, adapter in sorted(found, key=lambda each: each[0])]
        a, b = _joined(trained, parts)
        tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"] = a, b
        if len(parts) > 1:
            fused.append(module)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": trained.hyperparameters.get("model_id"),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(grouped),
        "rank_pattern": dict.fromkeys(fused, 3 * lora.rank),
        "alpha_pattern": dict.fromkeys(fused, 3 * lora.alpha),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _joined(trained: Mapping[str, Tensor], parts: list[Adapter]) -> tuple[Tensor, Tensor]:
    a, b = [trained[part.a] for part in parts], [trained[part.b] for part in parts]
    return torch.cat(a).contiguous(), (torch.block_diag(*b) if len(b) > 1 else b[0]).contiguous()


def _check_holds_all(trained: TrainedWeights, lora: Lora, adapters: list[Adapter]) -> None:
    full = [name for name in PARTS if lora.how(name) == "full"]
    new = trained.hyperparameters.get("from_scratch") or []
    stacked = any(adapter.num_experts is not None for adapter in adapters)
    if full or new or stacked:
        what = f"{', '.join([*full, *new])} was trained in full" if full or new else "experts have adapters"
        raise DataError(
            str(trained.path),
            f"{what}, which an adapter in peft's format and released names cannot hold",
            "export without --adapter: the whole model, merged",
        )
