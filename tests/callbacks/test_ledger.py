"""EpochLedger: balances however an epoch is batched, cut short or resumed, and stops a run whose data goes astray."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule

TINY = {"pattern": "M", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


class Seen(L.Callback):
    """Counts rows and tokens per epoch, the long way."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, Any]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        epoch = self.epochs.setdefault(trainer.current_epoch, {"rows": [], "tokens": 0, "computed": 0})
        epoch["rows"] += [int(source.rpartition(":")[2]) for source in batch.sources]
        epoch["computed"] += batch.input_ids.numel()
        epoch["tokens"] += int((batch.input_ids != 0).sum())  # 0 is the pad token, and no token of a row


class Fit:
    """A run of 13 rows on one process."""

    def __init__(self, file: Path, processor: NemotronVLProcessor, folder: Path) -> None:
        self.file, self.processor, self.folder = file, processor, folder

    def __call__(
        self,
        *callbacks: L.Callback,
        data: dict[str, Any] | None = None,
        kind: type[VLMDataModule] = VLMDataModule,
        module: type[NemotronVLModule] = NemotronVLModule,
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> Seen:
        L.seed_everything(1, verbose=False)
        seen = Seen()
        trainer = L.Trainer(
            accelerator="cpu",
            logger=CSVLogger(self.folder, "metrics"),
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[seen, *callbacks],
            **{"max_epochs": 2, **options},
        )
        network = module(config=NemotronVLConfig.tiny(**TINY), generate_on_validation=False)
        datamodule = kind(train=str(self.file), processor=self.processor, **{"batch_size": 2, **(data or {})})
        trainer.fit(network, datamodule=datamodule, ckpt_path=ckpt_path)
        return seen

    def logged(self) -> list[dict[str, float]]:
        """What the ledger of each epoch of the last run logged."""
        path = max(self.folder.glob("metrics/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
        rows = [row for row in csv.DictReader(path.read_text().splitlines()) if row.get("data/samples_planned")]
        return [{name[5:]: float(row[name]) for name in row if name.startswith("data/")} for row in rows]


@pytest.fixture
def fit(make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path) -> Fit:
    return Fit(make_task(13), processor, tmp_path)


@pytest.mark.parametrize(
    ("data", "options", "planned", "seen"),
    [
        ({}, {}, 13, 13),
        ({"sampler": "sequential"}, {}, 13, 13),
        ({"sampler": "length_grouped"}, {}, 13, 13),
        ({"sampler": "token_budget"}, {}, 13, 13),
        ({"collate": "packed"}, {}, 13, 13),
        ({"packing": True}, {}, 13, 13),
        ({"packing": True, "sampler": "sequential", "num_workers": 2}, {"max_epochs": 1}, 13, 13),
        ({"packing": True}, {"accumulate_grad_batches": 3}, 13, 13),
        ({"packing": True, "max_tokens": 67, "overlong": "drop"}, {}, 8, 8),
        ({"max_tokens": 67, "overlong": "drop"}, {}, 8, 8),
        ({"packing": True}, {"limit_train_batches": 3}, 13, None),
        ({}, {"limit_train_batches": 0.5}, 13, 6),
        ({}, {"overfit_batches": 2}, 13, 4),
        ({"sampler": "token_budget", "batch_tokens": 67, "overlong": "drop"}, {"overfit_batches": 2}, 8, 2),
    ],
    ids=str,
)
def test_it_balances_and_is_logged(
    fit: Fit, data: dict[str, Any], options: dict[str, Any], planned: int, seen: int | None
) -> None:
    found, logged = fit(data=data, **options), fit.logged()
    assert len(found.epochs) == len(logged) == options.get("max_epochs", 2)
    for epoch, numbers in zip(found.epochs.values(), logged):
        rows = epoch["rows"]
        assert len(rows) == len(set(rows))
        assert 0 < len(rows) == (len(rows) if seen is None else seen)
        assert numbers == {
            "samples_planned": planned,
            "samples_seen": len(rows),
            "samples_skipped": 0,
            "samples_dropped": 13 - planned,
            "bad_samples": 0,
            "padding_frac": pytest.approx(1 - epoch["tokens"] / epoch["computed"], abs=1e-6),
        }
        if data.get("packing") or data.get("collate") == "packed":
            assert numbers["padding_frac"] == 0


def test_it_balances_where_max_steps_end_a_run_inside_an_epoch_and_another_goes_on(fit: Fit, tmp_path: Path) -> None:
    for data in ({"packing": True}, {"sampler": "token_budget"}, {}):
        whole = fit(data=data)
        saved = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_last=True, enable_version_counter=False)
        first = fit(saved, data=data, max_steps=2)
        count = len(first.epochs[0]["rows"])
        assert [numbers["samples_seen"] for numbers in fit.logged()] == [count]
        assert 0 < count < 13
        second = fit(data=data, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
        assert [numbers["samples_seen"] for numbers in fit.logged()] == [13 - count, 13]
        assert first.epochs[0]["rows"] + second.epochs[0]["rows"] == whole.epochs[0]["rows"]
        assert second.epochs[1] == whole.epochs[1]


def altered(change: Callable[[list[Any]], None]) -> type[VLMDataModule]:
    """A datamodule whose loader does something to the second epoch's batches on their way."""

    class Altered(VLMDataModule):
        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            sound = loader._generate

            def generate() -> Iterator[Any]:
                epoch, batches = loader._start.epoch, list(sound())
                if epoch == 1:
                    change(batches)
                yield from batches

            loader._generate = generate  # type: ignore[method-assign]
            return loader

    return Altered


UNBALANCED = r"the ledger of epoch 1 does not balance: 13 samples planned, 0 seen before, {} seen, 0 skipped, {} not "
FAULTS: dict[str, tuple[Callable[[list[Any]], None], str]] = {
    "a batch is skipped": (lambda batches: batches.pop(2), UNBALANCED.format(11, 1)),
    "the last batch is missing": (
        lambda batches: batches.pop(),
        r"the loader ended epoch 1 after batch 6 of 7: 13 samples planned, 0 seen before, 12 seen, 0 skipped, 1 not ",
    ),
    "a batch comes twice": (lambda batches: batches.insert(3, batches[2]), UNBALANCED.format(14, 0)),
    "a batch comes instead of another": (lambda batches: batches.__setitem__(3, batches[2]), UNBALANCED.format(13, 0)),
    "a sample comes instead of another": (
        lambda batches: batches[3].indices.__setitem__(0, int(batches[2].indices[0])),
        UNBALANCED.format(13, 0),
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_what_goes_astray_stops_the_run(fit: Fit, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=rf"{message}.*please report this with the config"):
        fit(kind=altered(change))
    assert [numbers["samples_seen"] for numbers in fit.logged()] == [13], "the first epoch was sound"


class StopsEarly(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 2


class SkipsTheRest(NemotronVLModule):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else super().on_train_batch_start(batch, batch_idx)


def test_an_epoch_may_be_ended_on_purpose(fit: Fit) -> None:
    fit(StopsEarly())
    assert [numbers["samples_seen"] for numbers in fit.logged()] == [6]
    fit(module=SkipsTheRest)
    assert [numbers["samples_seen"] for numbers in fit.logged()] == [6, 6]


def test_a_crash_is_forgotten(fit: Fit) -> None:
    """The same module is fitted again after an exception: its ledger opens anew."""

    class Crash(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("power cut")

    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), generate_on_validation=False)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Crash(), module=lambda **options: module)  # type: ignore[arg-type]
    fit(module=lambda **options: module)  # type: ignore[arg-type]
    assert [numbers["samples_seen"] for numbers in fit.logged()] == [13, 13]


def test_other_loaders_have_no_ledger(fit: Fit) -> None:
    data = VLMDataModule(train=str(fit.file), processor=fit.processor)
    data.setup("fit")
    batches: Any = DataLoader([next(iter(data.train_dataloader()))] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(NemotronVLModule(config=NemotronVLConfig.tiny(**TINY)), batches)
    assert not [name for name in trainer.callback_metrics if name.startswith("data/")]


def test_a_ledger_belongs_to_an_epoch(fit: Fit) -> None:
    data = VLMDataModule(train=str(fit.file), processor=fit.processor)
    with pytest.raises(RuntimeError, match="a ledger belongs to an epoch of train_dataloader"):
        data.ledger(0)
