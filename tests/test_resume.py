"""Stopping anywhere and resuming gives the same weights as not stopping."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.callbacks.checkpoint import RunCheckpoint
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.training import optimizers
from lightning_vlm.training.resume import rewind_to_last_step

TINY = {"pattern": "M*", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


class Recorder(L.Callback):
    """Notes which rows each batch holds."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([source.rpartition(":")[2] for source in batch.sources])


class StopInside(L.Callback):
    """Raises in the middle of the given (global) batch, after its forward pass."""

    def __init__(self, batch: int) -> None:
        self.batch, self.seen = batch, 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen += 1
        if self.seen == self.batch + 1:
            raise RuntimeError("power cut")


def fit(
    file: Path,
    folder: Path,
    *callbacks: L.Callback,
    ckpt_path: Path | None = None,
    workers: int = 0,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[NemotronVLModule, Recorder]:
    L.seed_everything(7, verbose=False)
    recorder = Recorder()
    made = {"config": NemotronVLConfig.tiny(**TINY), "lr": 1e-2, "generate_on_validation": False, **(model or {})}
    module = NemotronVLModule(**made)
    datamodule = VLMDataModule(
        train=str(file), processor=tiny_processor(), batch_size=2, num_workers=workers, **(data or {})
    )
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=[recorder, *callbacks],
        **{"max_epochs": 2, "logger": False, **options},
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module, recorder


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        "{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        save_last=True,
        save_on_exception=True,
        save_on_train_epoch_end=True,
    )


def only_at_the_crash(folder: Path) -> ModelCheckpoint:
    """Saves at the exception alone: what is resumed from was written in the middle of things."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1000, save_last=True, save_on_exception=True)


def assert_same_weights(left: NemotronVLModule, right: NemotronVLModule) -> None:
    for (name, a), b in zip(left.network.state_dict().items(), right.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_any_step_is_exact(make_task: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    file = make_task(11)  # 6 batches an epoch, the last one short
    whole, recorded = fit(file, tmp_path, every_step(tmp_path / "ckpt"), workers=workers)
    for epoch in (recorded.rows[:6], recorded.rows[6:]):
        assert sorted(int(row) for batch in epoch for row in batch) == list(range(1, 12)), "each epoch sees every row"
    assert recorded.rows[:6] != recorded.rows[6:], "each epoch has its own order"

    for step in (2, 6, 9) if workers == 0 else (3, 6):
        resumed, rest = fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt", workers=workers)
        assert rest.rows == recorded.rows[step:], f"resumed after step {step}"
        assert_same_weights(resumed, whole)


def saved_states(path: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Groups, and states of an optimizer, as they can be read by whoever has only torch."""
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    return saved["param_groups"], list(saved["state"].values())


@pytest.mark.parametrize(
    "model",
    [
        {"optimizer": "muon"},
        {"optimizer": "adamw8bit"},
        {"layer_decay": 0.5, "no_decay": ["language.model.embeddings.*"]},
        {"optimizer": "muon", "layer_decay": 0.5, "freeze": ["language"]},
    ],
    ids=str,
)
def test_every_optimizer_resumes_exactly(make_task: Callable[..., Path], tmp_path: Path, model: dict[str, Any]) -> None:
    if model.get("optimizer") == "adamw8bit":
        pytest.importorskip("torchao")
    # Mixtures too, and matrices large enough for torchao to quantise their states.
    config = NemotronVLConfig.tiny(pattern="M*E", hidden_size=64, vision_hidden_size=64, vision_layers=1)
    options: dict[str, Any] = {"model": {"config": config, **model}}
    file = make_task(11)
    whole, recorded = fit(file, tmp_path, every_step(tmp_path / "ckpt"), **options)
    for step in (1, 6, 9):
        resumed, rest = fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt", **options)
        assert rest.rows == recorded.rows[step:], f"resumed after step {step}"
        assert_same_weights(resumed, whole)


READ = """
import sys, torch
class NoPackages:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torchao", "lightning_vlm"):
            raise ImportError(name)
sys.meta_path.insert(0, NoPackages())
states = torch.load(sys.argv[1], weights_only=True)["optimizer_states"][0]["state"].values()
kinds = {str(value["codes"].dtype) for state in states for value in state.values() if isinstance(value, dict)}
assert kinds == {"torch.uint8"}, kinds
"""


def test_eight_bit_states_are_read_without_torchao(make_task: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = NemotronVLConfig.tiny(pattern="M*E", hidden_size=64, vision_hidden_size=64, vision_layers=1)
    model = {"config": config, "optimizer": "adamw8bit"}
    fit(make_task(4), tmp_path, every_step(tmp_path / "ckpt"), model=model, max_steps=2)
    command = [sys.executable, "-c", READ, str(tmp_path / "ckpt" / "last.ckpt")]
    subprocess.run(command, check=True, timeout=120)


def test_a_run_goes_on_with_the_kernel_that_it_began_with(
    make_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that was begun before there was a fused one, or on a device that has none."""
    file = make_task(11)
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "_FUSED_ON", ())
        whole, _ = fit(file, tmp_path, every_step(tmp_path / "plain"))
    fused, _ = fit(file, tmp_path, every_step(tmp_path / "fused"))
    different = [
        name
        for name, weight in whole.network.state_dict().items()
        if not torch.equal(weight, fused.network.state_dict()[name])
    ]
    assert different, "the two kernels round alike; this test shows nothing"
    for kind, expected in (("plain", whole), ("fused", fused)):
        groups, _ = saved_states(tmp_path / kind / "step=4.ckpt")
        assert {bool(group.get("fused")) for group in groups} == {kind == "fused"}
        with monkeypatch.context() as patch:
            patch.setattr(optimizers, "_FUSED_ON", ("cpu",) if kind == "plain" else ())
            resumed, _ = fit(file, tmp_path, ckpt_path=tmp_path / kind / "step=4.ckpt")
        assert_same_weights(resumed, expected)


class AsksForSteps(NemotronVLModule):
    """A user's module that calls Lightning's step estimate, which builds the loader before its state is restored."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


def test_resume_is_exact_when_the_optimizer_asks_for_the_number_of_steps(
    make_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "NemotronVLModule", AsksForSteps)
    file = make_task(11)
    whole, recorded = fit(file, tmp_path, every_step(tmp_path / "ckpt"))
    for step in (2, 6, 8):
        resumed, rest = fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt")
        assert rest.rows == recorded.rows[step:], f"resumed after step {step}"
        assert_same_weights(resumed, whole)


PACKED = {"packing": True, "batch_tokens": 140}


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_resume_after_any_step_is_exact(make_task: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    file = make_task(11)  # 6 packs
    whole, recorded = fit(file, tmp_path, every_step(tmp_path / "ckpt"), workers=workers, data=PACKED)
    for epoch in (recorded.rows[:6], recorded.rows[6:]):
        assert sorted(int(row) for batch in epoch for row in batch) == list(range(1, 12)), "each epoch sees every row"
    assert recorded.rows[:6] != recorded.rows[6:], "each epoch has its own packs"
    for step in (1, 5, 6, 9) if workers == 0 else (3, 6):
        path = tmp_path / "ckpt" / f"step={step}.ckpt"
        resumed, rest = fit(file, tmp_path, ckpt_path=path, workers=workers, data=PACKED)
        assert rest.rows == recorded.rows[step:], f"resumed after step {step}"
        assert_same_weights(resumed, whole)


@pytest.mark.parametrize("data", [PACKED, {"sampler": "token_budget"}, {"sampler": "length_grouped"}], ids=str)
@pytest.mark.parametrize(("accumulate", "stop_at"), [(1, 4), (2, 3), (2, 8), (4, 5)])
def test_a_crash_repeats_the_step_with_every_batcher(
    make_task: Callable[..., Path], tmp_path: Path, data: dict[str, Any], accumulate: int, stop_at: int
) -> None:
    file = make_task(11)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "data": data}
    whole, _ = fit(file, tmp_path, **options)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(file, tmp_path, only_at_the_crash(tmp_path / "ckpt"), StopInside(stop_at), **options)
    resumed, _ = fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / "last.ckpt", **options)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize(
    "change",
    [{"batch_tokens": 150}, {"batch_patches": 24}, {"sampler": "sequential"}, {"packing": False}, {"seed": 1},
     {"max_tokens": 98, "overlong": "drop"}],
    ids=str,
)  # fmt: skip
def test_packed_resume_with_other_packs_is_refused(
    make_task: Callable[..., Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    file = make_task(12)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(file, tmp_path, every_step(tmp_path / "ckpt"), StopInside(2), data=PACKED)
    with pytest.raises(ValueError, match=r"stopped after batch 2 of epoch 0 of another plan.*keep data files.*packing"):
        fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / "last.ckpt", data={**PACKED, **change})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_logged_once_however_often_a_run_crashes(
    make_task: Callable[..., Path], tmp_path: Path, accumulate: int
) -> None:
    """Also in the first step of an epoch, which Lightning resumes with an iteration that has no batch."""
    file = make_task(11)
    steps, last = [], tmp_path / "ckpt" / "last.ckpt"
    for number, stop_at in enumerate((3, 2, 1, None)):  # 6 batches an epoch: inside it, at its start, after that
        logger = CSVLogger(tmp_path, "metrics", str(number))
        callbacks = [only_at_the_crash(tmp_path / "ckpt"), *([] if stop_at is None else [StopInside(stop_at)])]
        options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
        if stop_at is None:
            module, _ = fit(file, tmp_path, *callbacks, ckpt_path=last, **options)
        else:
            with pytest.raises(RuntimeError, match="power cut"):
                fit(file, tmp_path, *callbacks, ckpt_path=last if last.exists() else None, **options)
        path = Path(logger.log_dir) / "metrics.csv"
        rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
        steps += [int(row["step"]) for row in rows if row.get("train/loss")]
    assert steps == list(range(12 // accumulate))
    assert module.trainer.global_step == 12 // accumulate


class StopsAfter(L.Callback):
    """Asks the Trainer to stop after a batch, as EarlyStopping does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx + 1 == self.batch


@pytest.mark.parametrize("asked", ["max_steps", "should_stop"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_extended_run_goes_on_inside_its_epoch(
    make_task: Callable[..., Path], tmp_path: Path, asked: str, epoch: int
) -> None:
    """Lightning counts the epoch as done and would leave out what is left of it."""
    file = make_task(11)  # 6 batches an epoch
    _, recorded = fit(file, tmp_path, max_epochs=3)
    steps = 6 * epoch + 2
    saves = RunCheckpoint(tmp_path / "ckpt", every_n_train_steps=1000)
    if asked == "max_steps":
        fit(file, tmp_path, saves, max_steps=steps, max_epochs=None)
    else:  # min_steps keeps the request of epoch 0 from being heard
        fit(file, tmp_path, saves, StopsAfter(2), max_epochs=3, **({"min_steps": steps} if epoch else {}))
    _, rest = fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / "last.ckpt", max_epochs=3)
    assert rest.rows == recorded.rows[steps:]


@pytest.mark.parametrize("saves", [every_step, only_at_the_crash])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("stop_at", [0, 1, 4, 9])
def test_a_crash_inside_a_step_repeats_the_step(
    make_task: Callable[..., Path],
    tmp_path: Path,
    saves: Callable[[Path], ModelCheckpoint],
    accumulate: int,
    stop_at: int,
) -> None:
    file = make_task(11)
    options = {"accumulate_grad_batches": accumulate}
    whole, _ = fit(file, tmp_path, **options)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(file, tmp_path, saves(tmp_path / "ckpt"), StopInside(stop_at), **options)
    last = tmp_path / "ckpt" / "last.ckpt"
    resumed, _ = fit(file, tmp_path, ckpt_path=last if last.exists() else None, **options)
    assert_same_weights(resumed, whole)


def test_resume_with_another_plan_is_refused_and_says_why(make_task: Callable[..., Path], tmp_path: Path) -> None:
    file = make_task(11)
    fit(file, tmp_path, every_step(tmp_path / "ckpt"))
    with file.open("a") as handle:
        handle.write(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"stopped after batch 2 of epoch 0 of another plan.*keep data files"):
        fit(file, tmp_path, ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_batch_lost_on_its_way_to_the_device_is_repeated(
    make_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    file = make_task(11)
    whole, _ = fit(file, tmp_path)
    seen = 0

    def fail_at_batch(self: VLMDataModule, taken: Any, dataloader_idx: int) -> Any:
        nonlocal seen
        seen += 1
        if seen == batch:
            raise RuntimeError("out of memory")
        return taken

    monkeypatch.setattr(VLMDataModule, "on_before_batch_transfer", fail_at_batch)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(file, tmp_path, only_at_the_crash(tmp_path / "ckpt"))
    monkeypatch.undo()
    last = tmp_path / "ckpt" / "last.ckpt"
    resumed, _ = fit(file, tmp_path, ckpt_path=last if last.exists() else None)
    assert_same_weights(resumed, whole)


def stopped_at(ready: int, epoch: int) -> dict[str, Any]:
    """What Lightning saves after ``ready`` batches of an epoch, from ``on_train_batch_end``."""
    counters = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
    total = {name: value + 10 * epoch for name, value in counters.items()}
    position = {"epoch": epoch, "yielded": ready, "fingerprint": "x"}
    return {
        "global_step": ready + 10 * epoch,
        "loops": {
            "fit_loop": {
                "epoch_progress": {"current": {"ready": epoch + 1}},
                "epoch_loop.batch_progress": {"current": counters, "total": total, "is_last_batch": ready == 10},
                "epoch_loop.state_dict": {"_batches_that_stepped": ready + 10 * epoch - 1},
                "state_dict": {"combined_loader": [dict(position)]},
            }
        },
        "VLMDataModule": position,
    }


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("ready", [4, 10])
def test_a_checkpoint_between_steps_is_left_alone(ready: int, epoch: int) -> None:
    checkpoint = stopped_at(ready, epoch)
    assert rewind_to_last_step(checkpoint, "VLMDataModule", (epoch, ready)) == 0
    assert checkpoint == stopped_at(ready, epoch)


@pytest.mark.parametrize(("applied", "done"), [((3, 4), 4), ((2, 10), 0)], ids=["in this epoch", "none in this epoch"])
def test_a_checkpoint_inside_a_step_is_set_back(applied: tuple[int, int], done: int) -> None:
    checkpoint = stopped_at(6, epoch=3)
    assert rewind_to_last_step(checkpoint, "VLMDataModule", applied) == 6 - done
    loop = checkpoint["loops"]["fit_loop"]
    expected = stopped_at(done, epoch=3)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert loop["epoch_loop.batch_progress"] == expected, "as after the last batch of the step before"
    assert loop["state_dict"]["combined_loader"][0]["yielded"] == checkpoint["VLMDataModule"]["yielded"] == done


def test_crash_after_crash_is_still_exact(make_task: Callable[..., Path], tmp_path: Path) -> None:
    file = make_task(11)
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    whole, _ = fit(file, tmp_path, **options)
    last = tmp_path / "ckpt" / "last.ckpt"
    for stop_at in (3, 0, 2, 1, 4):  # batches after each start, inside and between steps, over the end of the epoch
        start = last if last.exists() else None
        with pytest.raises(RuntimeError, match="power cut"):
            fit(file, tmp_path, only_at_the_crash(tmp_path / "ckpt"), StopInside(stop_at), ckpt_path=start, **options)
    resumed, _ = fit(file, tmp_path, ckpt_path=last, **options)
    assert_same_weights(resumed, whole)


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import test_resume as t

class Slow(t.L.Callback):
    def on_train_batch_end(self, trainer, *args):
        print("step", trainer.global_step, flush=True)
        import time; time.sleep(float(sys.argv[3]))

folder = Path(sys.argv[2])
last = folder / "ckpt" / "last.ckpt"
module, _ = t.fit(Path(sys.argv[1]), folder, t.every_step(folder / "ckpt"), Slow(),
                  ckpt_path=last if last.exists() else None, accumulate_grad_batches=2)
torch.save(module.network.state_dict(), folder / "final.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_killed_process_resumes_to_the_same_weights(
    make_task: Callable[..., Path], tmp_path: Path, sig: signal.Signals
) -> None:
    file = make_task(11)
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))

    def start(folder: Path, pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(file), str(folder), str(pause)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        )

    whole = tmp_path / "whole"
    assert start(whole, 0).wait() == 0
    killed = tmp_path / "killed"
    process = start(killed, 0.3)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2"):  # in the middle of the first epoch: three steps of two micro-batches
            process.send_signal(sig)
            break
    process.wait()
    assert not (killed / "final.pt").exists()
    assert start(killed, 0).wait() == 0
    expected, found = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, killed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
