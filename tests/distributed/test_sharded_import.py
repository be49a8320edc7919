"""Released weights straight into shards: FSDP2, tensor parallel, and both, each rank reading what it holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_vlm import NemotronVL
from lightning_vlm.checkpoint.hf_import import import_weights
from lightning_vlm.checkpoint.layout import is_not_ours
from lightning_vlm.checkpoint.opening import open_pretrained, planned_model
from lightning_vlm.checkpoint.weight_files import WeightFiles
from tests.distributed.test_text_only_ranks import run_ranks, whole
from tests.fixtures.released_folders import write_omni
from tests.fixtures.twins import make_theirs, shake

__all__ = ["make_theirs", "shake"]


def apply(model: NemotronVL, kind: str) -> None:
    """Shards a model on the meta device."""
    world = dist.get_world_size()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
    else:
        grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        mesh = grid["dp"]
        for layer in model.language_model.model.layers:
            if hasattr(layer.mixer, "q_proj"):
                plan: Any = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
                parallelize_module(layer.mixer, grid["tp"], {**plan, "o_proj": RowwiseParallel()})
    for module in (*model.vision_model.encoder.layer, *model.language_model.model.layers, model):
        fully_shard(module, mesh=mesh)


def load(folder: Path, kind: str, rank: int) -> dict[str, Any]:
    """What a rank holds afterwards, put together with the others, and how many numbers it read."""
    files = CountingFiles(folder)
    model = planned_model(folder, files)
    apply(model, kind)
    import_weights(model, files)
    state = model.state_dict()
    stored = [value for name, value in state.items() if is_stored(name)]
    held = [value.to_local() if isinstance(value, DTensor) else value for value in stored]
    return {
        "state": {name: whole(value) for name, value in state.items()},
        "inv_freq": model.audio_tower.encode_positions.inv_freq.clone(),
        "held": sum(value.numel() for value in held),
        "all": sum(value.numel() for value in stored),
        "read": sum(files.counts),
    }


class CountingFiles(WeightFiles):
    """Counts the numbers that are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counts: list[int] = []  # several threads read

    def read_into(self, target: torch.Tensor, key: str, start: Any = None) -> None:
        if not is_not_ours(key):  # read whole, to compare the tower's normalisation with the config
            self.counts.append(target.numel())
        super().read_into(target, key, start)


def is_stored(name: str) -> bool:
    return "layer_scale" not in name and "summary_idxs" not in name


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp2", 2), ("fsdp2", 3), ("tp", 2), ("fsdp2_tp", 4)])
def test_ranks_read_their_shards_and_nothing_else(make_theirs, tmp_path, kind, ranks):
    write_omni(tmp_path / "omni", make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    expected, _ = open_pretrained(tmp_path / "omni")
    results = run_ranks(partial(load, tmp_path / "omni", kind), tmp_path, ranks=ranks)
    state = expected.state_dict()
    for result in results:
        assert result["state"].keys() == state.keys()
        for name, value in result["state"].items():
            assert torch.equal(value, state[name]), name
        assert torch.equal(result["inv_freq"], expected.audio_tower.encode_positions.inv_freq)
        assert result["read"] == result["held"]
    if kind == "fsdp2":  # else not all is split
        assert sum(result["held"] for result in results) < 1.02 * results[0]["all"]  # buffers are on every rank
