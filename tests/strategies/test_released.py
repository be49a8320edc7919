"""Released weights go straight into shards and stages, and what was trained there is exported by one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.cli import main
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy
from tests.fixtures.released_folders import write_omni
from tests.fixtures.twins import make_theirs, shake
from tests.strategies.conftest import TIMEOUT, assert_same

__all__ = ["make_theirs", "shake"]

LORA = {"rank": 2, "alpha": 4, "language": ["attention", "mamba", "mlp"], "projector": "full"}
WAYS = {
    "fsdp2": (2, partial(FSDP2Strategy, timeout=TIMEOUT), 1),
    "fsdp2 of layers in parts": (4, partial(FSDP2Strategy, tensor=2, timeout=TIMEOUT), 1),
    "pipeline": (2, partial(PipelineStrategy, timeout=TIMEOUT), 2),
    "pipeline of shards": (4, partial(PipelineStrategy, timeout=TIMEOUT), 1),
}


@pytest.mark.parametrize(
    ("way", "module"),
    [
        *((way, {}) for way in WAYS),
        *((way, {"from_scratch": ["projector"]}) for way in WAYS),
        *((way, {"lora": LORA, "from_scratch": ["projector"]}) for way in WAYS if "parts" not in way),
    ],
    ids=str,
)
def test_a_divided_run_is_exported_like_one_process(run, make_theirs, make_task, tmp_path, way, module):
    base = tmp_path / "base"
    write_omni(base, make_theirs("ME*-", sound=True, moe_intermediate_size=48))
    ranks, make, accumulate = WAYS[way]
    options = {
        "module": {"model_id": str(base), **module},
        "data": {"processor": str(base)},
        "file": make_task(24),
        "trainer": {"accumulate_grad_batches": 2},
    }
    single = run(save=tmp_path / "single.ckpt", **options)
    options["trainer"] = {"accumulate_grad_batches": accumulate}
    divided = run(ranks, make, save=tmp_path / "divided.ckpt", **options)
    assert_same(divided, single)
    for name in ("single", "divided"):
        arguments = ["export", str(tmp_path / f"{name}.ckpt"), str(tmp_path / name), "--dtype", "fp32", "--verify"]
        assert main(arguments) == 0
    assert (tmp_path / "divided.ckpt" / ".metadata").is_file(), "a folder of shards"
    before, one, two = (WeightFiles(tmp_path / name) for name in ("base", "single", "divided"))
    assert one.keys() == two.keys() == before.keys()
    moved, worst = 0, 0.0
    for key in (key for key in before if before[key].shape != (0,)):
        first, second = one.read(key).float(), two.read(key).float()
        worst = max(worst, float((second - first).abs().max()))
        moved += not torch.equal(first, before.read(key).float())
    assert moved > (10 if "lora" in module else 50)
    assert worst < 1e-3  # after three steps of AdamW at 1e-2
