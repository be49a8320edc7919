"""A checkpoint of any strategy continues under any other, in the middle of an epoch, as if nothing had happened."""

from __future__ import annotations

import errno
import itertools
import os
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.checkpoint.trained import load_whole
from lightning_vlm.schema import StoppingError
from lightning_vlm.strategies import FSDP2Strategy, PipelineStrategy
from lightning_vlm.strategies.mesh import MeshStrategy
from lightning_vlm.training.movement import parameters_at_rest
from tests.strategies.conftest import TIMEOUT, TINY, Fit

# Ranks, strategy, and batches that each step takes: 4 rows, however many ranks look at them.
WAYS: dict[str, tuple[int, Any, int]] = {
    "single": (1, lambda: "auto", 2),
    "ddp": (2, lambda: "ddp", 1),
    "fsdp2": (2, partial(FSDP2Strategy, timeout=TIMEOUT), 1),
    "fsdp2 of layers in parts": (4, partial(FSDP2Strategy, tensor=2, timeout=TIMEOUT), 1),
    "pipeline of 2": (2, partial(PipelineStrategy, timeout=TIMEOUT), 2),
    "pipeline of 4": (4, partial(PipelineStrategy, stages=4, timeout=TIMEOUT), 2),
    "pipeline of 2, shards of 2": (4, partial(PipelineStrategy, timeout=TIMEOUT), 1),
}


FOUND: dict[str, Fit] = {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def go(run, way: str, **options: Any) -> Fit:
    ranks, make, accumulate = WAYS[way]
    trainer = {"accumulate_grad_batches": accumulate, "max_steps": 8, "max_epochs": 2}
    module = {"lr": 3e-3, "warmup": 2}
    return run(ranks, make, trainer=trainer, module=module, data={"sampler": "shuffle"}, **options)


# All 49 pairs were run once; these have each way before and after a single process, itself, and two others.
PAIRS = {
    **dict.fromkeys((way, way) for way in WAYS),
    **dict.fromkeys(("single", way) for way in WAYS),
    **dict.fromkeys((way, "single") for way in WAYS),
    **dict.fromkeys(itertools.pairwise(WAYS)),
}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_any_strategy_continues_any_other(run, saved, first, second):
    path = saved / f"{first}.ckpt"
    if not path.exists():
        go(run, first, stop_at=4, save=path)
    if "whole" not in FOUND:
        FOUND["whole"] = go(run, "single")
    expected, continued = FOUND["whole"], go(run, second, ckpt_path=path)
    assert len(expected.losses) == 8
    assert continued.losses == pytest.approx(expected.losses[4:], rel=1e-5)
    assert continued.norms == pytest.approx(expected.norms[4:], rel=1e-4)
    assert sorted(continued.rows) == sorted(expected.rows[4 * 4 :]), "every remaining sample once, and no other"


@pytest.mark.parametrize("killed", [False, True], ids=["", "after a kill between two renames"])
def test_a_full_disk_keeps_the_older_folder(run, tmp_path, killed):
    path = tmp_path / "last.ckpt"
    go(run, "fsdp2", stop_at=1, save=path)
    before = (path / "meta.pt").read_bytes()
    if killed:
        path.rename(tmp_path / ".last.ckpt.replaced")
    create_stream = FileSystem.create_stream

    def full(self, name, mode):
        if os.environ["RANK"] == "1" and mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return create_stream(self, name, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", full)
        with pytest.raises(Exception, match="the disk is full, this checkpoint could not be written, the older"):
            go(run, "fsdp2", stop_at=2, save=path)
    assert (path / "meta.pt").read_bytes() == before
    assert [child.name for child in tmp_path.iterdir() if child.name.startswith(".")] == []
    assert len(go(run, "single", ckpt_path=path, stop_at=2).losses) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_fails_on_rank_0_alone_is_told_on_all(run, tmp_path, number):
    path, told = tmp_path / "last.ckpt", tmp_path / "told"
    go(run, "fsdp2", stop_at=1, save=path)
    told.mkdir()
    save, save_folder = torch.save, MeshStrategy.save_checkpoint

    def failing(obj, f, *args, **kwargs):
        if str(f).endswith("meta.pt"):
            raise OSError(number, os.strerror(number))
        return save(obj, f, *args, **kwargs)

    def tell(self, *args, **kwargs):
        with pytest.raises((OSError, StoppingError)) as caught:
            save_folder(self, *args, **kwargs)
        (told / os.environ["RANK"]).write_text(str(caught.value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", failing)
        patch.setattr(MeshStrategy, "save_checkpoint", tell)
        go(run, "fsdp2", stop_at=2, save=path)
    sentences = [(told / rank).read_text() for rank in ("0", "1")]
    assert sentences[0] == sentences[1]
    assert ("the disk is full" if number == errno.ENOSPC else os.strerror(number)) in sentences[0]
    assert [child.name for child in tmp_path.iterdir() if child.name.startswith(".")] == []
    assert len(go(run, "single", ckpt_path=path, stop_at=2).losses) == 1, "the older one is whole"


def test_files_and_folders_replace_each_other(run, tmp_path):
    path = tmp_path / "last.ckpt"
    for way in ("fsdp2", "single", "pipeline of 2", "fsdp2"):
        go(run, way, stop_at=1, save=path)
        assert path.is_dir() == (way != "single")
    assert [child.name for child in tmp_path.iterdir() if child.name.startswith(".")] == []


@pytest.mark.parametrize("way", ["fsdp2", "fsdp2 of layers in parts", "pipeline of 2", "pipeline of 2, shards of 2"])
def test_nothing_is_left_out_after_validation(run, make_task, tmp_path, way):
    path, val = tmp_path / "last.ckpt", str(make_task(3, "val.jsonl"))
    ranks, make, accumulate = WAYS[way]
    trainer = {"accumulate_grad_batches": accumulate, "max_steps": 2, "val_check_interval": accumulate}
    data = {"val": val, "packing": True, "batch_tokens": 200}  # packed rows are probed before training

    class SaveHere(L.Callback):
        def on_train_start(self, trainer, pl_module):
            known = set(map(id, parameters_at_rest(pl_module).values()))
            groups = trainer.optimizers[0].param_groups
            stale = [p.shape for group in groups for p in group["params"] if id(p) not in known]
            assert not stale, f"the optimizer has {stale}, which the module does not have any more"

        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)

    module = {"generate_on_validation": True, "max_new_tokens": 2}
    run(ranks, make, trainer=trainer, data=data, module=module, callbacks=[SaveHere()])
    saved = load_whole(path)
    (groups,) = saved["optimizer_layouts"]
    trained = [name for group in groups for name in group["parameters"]]
    model = NemotronVL(NemotronVLConfig.tiny(**TINY))
    whole = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters() if "layer_scale" not in name}
    assert sorted(trained) == sorted(whole)
    states = saved["optimizer_states"][0]["states_by_name"]
    assert {name: tuple(state["exp_avg"].shape) for name, state in states.items()} == whole
