"""Counters of a checkpoint that goes on elsewhere: what Lightning makes of them after it has restored them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.training.resume import move_progress

COUNTERS = ("ready", "started", "processed", "completed")


class Counters(L.Callback):
    """What Lightning counts at the first batch of a resumed run."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        self.first = getattr(self, "first", None) or {
            "epoch": trainer.current_epoch,
            "index": batch_idx,
            "total": loop.total_batch_idx,
            "logged": loop._batches_that_stepped,
            "step": trainer.global_step,
        }


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(**options: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet, **options)

    return make


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_goes_on_where_the_counters_were_moved(
    make_task: Callable[..., Path],
    processor: NemotronVLProcessor,
    tmp_path: Path,
    make_trainer: Callable[..., L.Trainer],
    accumulate: int,
) -> None:
    """8 batches of 2 are saved after 4; they go on in 16 batches of 1, as if they were ranks that became fewer."""
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    data = VLMDataModule(train=str(make_task(16)), processor=processor, batch_size=2)
    options = {"accumulate_grad_batches": accumulate}
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    first = NemotronVLModule(config=config, generate_on_validation=False)
    make_trainer(callbacks=[saves], **options).fit(first, datamodule=data)
    step = 4 // accumulate

    class Elsewhere(NemotronVLModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["VLMDataModule"]
            assert state["yielded"] == 4
            moved = {**state, "yielded": self.goes_on_at, "batches": 16, "fingerprint": self.plan.fingerprint}
            checkpoint["VLMDataModule"] = moved
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [moved]
            move_progress(checkpoint, self.goes_on_at, accumulate, ended=False)

    for to in (0, 1, 8, 15):
        counters, module = Counters(), Elsewhere(config=config, generate_on_validation=False)
        other = VLMDataModule(train=data.files["train"], processor=processor, batch_size=1)
        other.setup("fit")
        module.goes_on_at, module.plan = to, other.train_plan()
        trainer = make_trainer(callbacks=[counters], enable_checkpointing=False, **options)
        trainer.fit(module, datamodule=other, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert counters.first == {"epoch": 0, "index": to, "total": to, "logged": step, "step": step}
        steps_left = -(-16 // accumulate) - to // accumulate
        assert trainer.global_step == step + steps_left + 16 // accumulate
        assert trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.global_step


def checkpoint(done: int, is_last: bool, left_epoch: bool, epoch: int = 0) -> dict[str, Any]:
    """What Lightning saves after ``done`` batches: at a batch's end, or in ``on_train_epoch_end``."""
    current = dict(zip(COUNTERS, (done, done, done, done if left_epoch else done - 1)))
    counts = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch + left_epoch, "completed": epoch}
    return {
        "global_step": 10 * epoch + done,
        "loops": {
            "fit_loop": {
                "epoch_progress": {"current": counts},
                "epoch_loop.batch_progress": {
                    "current": current,
                    "total": {name: count + 10 * epoch for name, count in current.items()},
                    "is_last_batch": is_last,
                },
                "epoch_loop.state_dict": {"_batches_that_stepped": 10 * epoch + done - (not left_epoch)},
            }
        },
    }


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(("yielded", "ended"), [(0, False), (3, False), (17, False), (20, True), (5, True)])
def test_all_counters_are_moved_together(epoch: int, yielded: int, ended: bool) -> None:
    found = checkpoint(10 if ended else 6, ended, False, epoch)
    steps = found["global_step"]
    move_progress(found, yielded, 1, ended)
    loop = found["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    assert progress["current"] == dict(zip(COUNTERS, (yielded, yielded, yielded, yielded - 1)))
    assert progress["total"] == {name: count + 10 * epoch for name, count in progress["current"].items()}
    assert progress["is_last_batch"] == ended
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == steps - 1


@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_that_lightning_has_left_is_left_alone(epoch: int) -> None:
    found = checkpoint(10, True, True, epoch)
    before = copy.deepcopy(found)
    move_progress(found, 20, 1, ended=True)
    assert found == before
