"""BadSamples: a run ends in spite of broken data, names what was broken, and learns as if it had not been there."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.data.bad_samples import BadSamples
from lightning_vlm.schema import DataError

TINY = {"pattern": "M*", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}
BROKEN = (4, 11, 17, 23)  # of 80 rows: 5 %


@pytest.fixture
def write_set(write_image: Callable[..., str], write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """80 rows with an image each, of which some are broken in one of several ways, or left out."""

    def write(name: str, how: dict[int, str], leave_out: bool = False) -> Path:
        folder = tmp_path / name
        rows = []
        for index in range(80):
            image = f"{name}/{index}.png"
            folder.mkdir(exist_ok=True)
            shutil.copy(tmp_path / write_image("any.png", 16 + index % 5, 16, index), tmp_path / image)
            rows.append(
                {
                    "image": image,
                    "messages": [
                        {"role": "user", "content": "<image>" + "what? " * (index % 4)},
                        {"role": "assistant", "content": f"no {index}"},
                    ],
                }
            )
        for index, kind in how.items():
            path = tmp_path / name / f"{index}.png"
            if kind == "missing":
                path.unlink()
            elif kind == "text":
                path.write_text("not an image")
            elif kind == "cut":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            elif kind == "pixels":
                content = bytearray(path.read_bytes())
                content[60] ^= 0xFF
                path.write_bytes(content)
            elif kind == "row":
                rows[index] = {"messages": [{"role": "wizard", "content": "x"}]}
        if leave_out:
            rows = [row for index, row in enumerate(rows) if index not in how]
        return write_rows(rows, f"{name}.jsonl")

    return write


class Fit:
    def __init__(self, processor: NemotronVLProcessor, folder: Path) -> None:
        self.processor, self.folder = processor, folder

    def __call__(self, file: Path, name: str, ckpt_path: Any = None, callbacks: Any = (), **options: Any) -> Any:
        L.seed_everything(1, verbose=False)
        trainer_options = {key: options.pop(key) for key in ("max_epochs", "max_steps") if key in options}
        self.trainer = L.Trainer(
            default_root_dir=self.folder / name,
            accelerator="cpu",
            logger=CSVLogger(self.folder / name, "metrics"),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **{"max_epochs": 2, **trainer_options},
        )
        network = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), generate_on_validation=False)
        data = VLMDataModule(
            train=str(file), processor=self.processor, **{"batch_size": 8, "max_bad_fraction": 0.06, **options}
        )
        self.trainer.fit(network, datamodule=data, ckpt_path=ckpt_path)
        return network

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "bad_samples.jsonl").read_text().splitlines()]

    def logged(self, name: str) -> list[dict[str, float]]:
        (path,) = (self.folder / name).glob("metrics/version_*/metrics.csv")
        rows = [row for row in csv.DictReader(path.read_text().splitlines()) if row.get("data/bad_samples")]
        return [{key[5:]: float(row[key]) for key in row if key.startswith("data/")} for row in rows]

    def logged_last(self, name: str) -> dict[str, float]:
        path = max((self.folder / name).glob("metrics/version_*/metrics.csv"), key=lambda path: path.parent.name)
        rows = [row for row in csv.DictReader(path.read_text().splitlines()) if row.get("data/bad_samples")]
        return {key[5:]: float(rows[-1][key]) for key in rows[-1] if key.startswith("data/")}


@pytest.fixture
def fit(processor: NemotronVLProcessor, tmp_path: Path) -> Fit:
    return Fit(processor, tmp_path)


HOW = dict(zip(BROKEN, ("missing", "text", "cut", "row")))


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (HOW, {"packing": True}),
        (HOW, {"sampler": "length_grouped"}),
        (HOW, {"sampler": "token_budget"}),
        (HOW, {"verify": "headers"}),
        ({**HOW, 17: "pixels"}, {"packing": True, "verify": "decode"}),
        ({**HOW, 17: "pixels"}, {"verify": "decode", "num_workers": 2}),
    ],
    ids=str,
)
def test_weights_are_those_of_the_data_without_the_broken_files(
    fit: Fit, write_set: Callable[..., Path], how: dict[int, str], options: dict[str, Any]
) -> None:
    broken, clean = write_set("broken", how), write_set("clean", how, leave_out=True)
    learned, expected = fit(broken, "a", **options), fit(clean, "b", **options)
    weights, other = learned.state_dict(), expected.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in weights.items())
    records = fit.records("a")
    assert sorted((record["split"], record["source"]) for record in records) == sorted(
        ("train", f"{broken}:{index + 1}") for index in how
    )
    assert all(record["problem"] and record["fix"] and record["kind"] for record in records)
    assert [row["bad_samples"] for row in fit.logged("a")] == [4.0, 4.0]
    assert not (fit.folder / "b" / "bad_samples.jsonl").exists()
    assert [row["bad_samples"] for row in fit.logged("b")] == [0.0, 0.0]


class Batches(L.Callback):
    """The rows of every batch."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([int(source.rpartition(":")[2]) for source in batch.sources if source != "stand-in"])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_only_training_finds_is_left_out_of_its_batch(
    fit: Fit, write_set: Callable[..., Path], workers: int
) -> None:
    file, whole = write_set("broken", {**HOW, 17: "pixels"}), write_set("whole", {23: "row"})
    seen, expected = Batches(), Batches()
    fit(file, "a", callbacks=[seen], num_workers=workers)
    fit(whole, "b", callbacks=[expected])
    bad = {index + 1 for index in BROKEN}
    assert seen.rows == [[row for row in batch if row not in bad] for batch in expected.rows]
    assert sorted(record["source"] for record in fit.records("a")) == sorted(f"{file}:{row}" for row in bad)
    ledger = fit.logged("a")
    assert [row["bad_samples"] for row in ledger] == [4.0, 4.0]
    assert [row["samples_skipped"] for row in ledger] == [3.0, 3.0]  # the row was known before the epoch was planned
    assert [row["samples_seen"] for row in ledger] == [76.0, 76.0]


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_of_bad_samples_alone_is_a_step_without_them(
    fit: Fit, write_set: Callable[..., Path], packing: bool
) -> None:
    file = write_set("broken", {4: "pixels", 11: "pixels"})
    seen = Batches()
    module = fit(file, "a", callbacks=[seen], batch_size=1, packing=packing, collate="packed" if packing else "auto",
                 batch_tokens=None, max_epochs=1)  # fmt: skip
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert len(fit.records("a")) == 2
    if not packing:
        assert seen.rows.count([]) == 2


def test_a_resumed_run_skips_the_same_and_lists_none_twice(fit: Fit, write_set: Callable[..., Path]) -> None:
    file = write_set("broken", {**HOW, 17: "pixels"})
    whole = fit(file, "a").state_dict()
    path = fit.folder / "b" / "stop.ckpt"

    class Crash(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 13:
                trainer.save_checkpoint(path)
                raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(file, "b", callbacks=[Crash()])
    assert 0 < len(fit.records("b")) <= 4
    learned = fit(file, "b", ckpt_path=path).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in learned.items())
    sources = [record["source"] for record in fit.records("b")]
    assert sorted(sources) == sorted({record["source"] for record in fit.records("a")})


def test_a_new_run_in_the_same_folder_keeps_the_old_list(fit: Fit, write_set: Callable[..., Path]) -> None:
    file = write_set("broken", HOW)
    fit(file, "a", max_epochs=1)
    first = fit.records("a")
    fit(write_set("other", {3: "missing"}), "a", max_epochs=1)
    assert len(first) == 4
    assert len(fit.records("a")) == 1
    kept = (fit.folder / "a" / "bad_samples.1.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == first


@pytest.mark.parametrize("verify", ["rows", "headers"])
def test_too_many_stop_the_run_with_a_sentence(fit: Fit, write_set: Callable[..., Path], verify: str) -> None:
    file = write_set("broken", {4: "missing", 11: "text"})
    with pytest.raises(DataError) as caught:
        fit(file, "a", max_bad_fraction=0.01, verify=verify)
    message = str(caught.value)
    count = "2 of 80 samples (2.5 %)" if verify == "headers" else "1 of 80 samples (1.25 %)"  # the first that is met
    assert message.startswith(f"data.train: {count} cannot be used, expected at most max_bad_fraction = 1 %: ")
    assert f"{file}:5: image 'broken/4.png' does not exist" in message or verify == "rows"
    assert message.endswith("(lightning-vlm check lists them all), or raise max_bad_fraction.")


@pytest.mark.parametrize("verify", ["rows", "headers"])
def test_strict_stops_at_the_first(fit: Fit, write_set: Callable[..., Path], verify: str) -> None:
    file = write_set("broken", {11: "text"})
    with pytest.raises(DataError, match=r"broken.jsonl:12: image 'broken/11.png' cannot be decoded"):
        fit(file, "a", strict=True, max_bad_fraction=1.0, verify=verify)


def test_evaluation_goes_on_over_the_others(
    processor: NemotronVLProcessor, write_set: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_set("broken", HOW)
    trainer = L.Trainer(default_root_dir=tmp_path / "a", accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), generate_on_validation=False)
    data = VLMDataModule(val=str(file), processor=processor, batch_size=1, max_bad_fraction=0.1)
    trainer.validate(module, datamodule=data, verbose=False)
    records = [json.loads(line) for line in (tmp_path / "a" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(record["source"] for record in records) == sorted(f"{file}:{index + 1}" for index in BROKEN)
    assert {record["split"] for record in records} == {"val"}


def test_evaluation_over_too_few_is_no_score(
    processor: NemotronVLProcessor, write_set: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_set("broken", HOW)
    trainer = L.Trainer(default_root_dir=tmp_path / "a", accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), generate_on_validation=False)
    data = VLMDataModule(val=str(file), processor=processor, batch_size=8, max_bad_fraction=0.04)
    with pytest.raises(DataError, match=r"data.val: 4 of 80 samples \(5 %\) cannot be used"):
        trainer.validate(module, datamodule=data, verbose=False)


def test_a_list_whose_last_line_was_cut_off_is_gone_on_with(fit: Fit, write_set: Callable[..., Path]) -> None:
    file = write_set("broken", {**HOW, 17: "pixels"})
    path = fit.folder / "b" / "stop.ckpt"
    fit(file, "b", max_epochs=1)
    fit.trainer.save_checkpoint(path)
    listed = fit.folder / "b" / "bad_samples.jsonl"
    whole = listed.read_text().splitlines()
    listed.write_text("\n".join(whole)[:-20])  # the process was killed while it wrote
    fit(file, "b", ckpt_path=path)
    lines = listed.read_text().splitlines()
    assert [json.loads(line)["source"] for line in (*lines[:3], lines[-1])] == [
        json.loads(line)["source"] for line in whole
    ]
    assert fit.logged_last("b")["bad_samples"] == 4.0


def test_a_list_that_another_rank_has_just_opened_gets_no_blank_line(fit: Fit, write_set: Callable[..., Path]) -> None:
    class Opens(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (fit.folder / "a" / "bad_samples.jsonl").touch()

    fit(write_set("broken", {4: "text"}), "a", callbacks=[Opens()], max_epochs=1)
    assert [record["index"] for record in fit.records("a")] == [4]


def test_a_number_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_bad_fraction is 5; expected a share from 0 to 1"):
        VLMDataModule(max_bad_fraction=5)
    assert BadSamples().found == {}


class Plain(L.LightningModule):
    """A user's own module, which knows nothing of ours: it brings no callback."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(300, 4), torch.nn.Linear(4, 300)

    def loss(self, batch: Any) -> torch.Tensor:
        logits = self.head(self.embed(batch.input_ids))
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class TestAnyModule:
    """`VLMDataModule` brings the list to whatever Trainer it serves."""

    def trainer(self, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        return L.Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=1, callbacks=list(callbacks),
                         enable_checkpointing=checkpoints, **quiet, **options)  # fmt: skip

    def data(self, file: Path, processor: NemotronVLProcessor, *splits: str, **options: Any) -> VLMDataModule:
        files = dict.fromkeys(splits, str(file))
        return VLMDataModule(processor=processor, batch_size=8, **{"max_bad_fraction": 0.06, **options}, **files)

    def records(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]

    def lists(self, trainer: Any) -> list[BadSamples]:
        return [callback for callback in trainer.callbacks if isinstance(callback, BadSamples)]

    def test_a_fit_lists_counts_and_bounds(
        self, processor: NemotronVLProcessor, write_set: Callable[..., Path], tmp_path: Path
    ) -> None:
        file = write_set("broken", HOW)
        trainer = self.trainer(tmp_path / "a", ModelCheckpoint(tmp_path / "a"))
        trainer.fit(Plain(), datamodule=self.data(file, processor, "train"))
        assert sorted(record["source"] for record in self.records(tmp_path / "a")) == sorted(
            f"{file}:{index + 1}" for index in BROKEN
        )
        assert trainer.callback_metrics["data/bad_samples"] == 4
        assert len(self.lists(trainer)) == 1
        assert isinstance(trainer.callbacks[-1], ModelCheckpoint), "Lightning runs checkpoints last"
        with pytest.raises(DataError, match=r"expected at most max_bad_fraction = 2 %"):
            self.trainer(tmp_path / "b").fit(
                Plain(), datamodule=self.data(file, processor, "train", max_bad_fraction=0.02)
            )

    @pytest.mark.parametrize("stage", ["val", "test", "predict"])
    def test_so_does_evaluation(
        self, processor: NemotronVLProcessor, write_set: Callable[..., Path], tmp_path: Path, stage: str
    ) -> None:
        file = write_set("broken", HOW)
        run = {"val": "validate"}.get(stage, stage)
        trainer = self.trainer(tmp_path / "a")
        getattr(trainer, run)(Plain(), datamodule=self.data(file, processor, stage))
        assert [record["split"] for record in self.records(tmp_path / "a")] == [stage] * 4
        with pytest.raises(DataError, match=rf"data.{stage}: 4 of 80 samples \(5 %\) cannot be used"):
            getattr(self.trainer(tmp_path / "b"), run)(
                Plain(), datamodule=self.data(file, processor, stage, max_bad_fraction=0.04)
            )

    def test_a_trainer_has_one_whatever_it_runs_next(
        self, processor: NemotronVLProcessor, write_set: Callable[..., Path], tmp_path: Path
    ) -> None:
        """A fit, an evaluation, a fit on other data, and one on a datamodule of the user's own, one after the other."""
        first, second = write_set("one", {4: "text"}), write_set("two", {7: "text", 9: "missing"})
        trainer, module = self.trainer(tmp_path / "a"), Plain()
        data, other = self.data(first, processor, "train", "val"), self.data(second, processor, "train")
        trainer.fit(module, datamodule=data)
        trainer.validate(module, datamodule=data, verbose=False)
        (found,) = self.lists(trainer)
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(module, datamodule=other)
        assert self.lists(trainer) == [found]
        assert sorted(found.found["train"]) == [7, 9]
        data.setup("validate")  # a look beside the runs: the Trainer is on other data by now
        assert found._datamodule is other
        users = L.LightningDataModule()
        users.train_dataloader = data.val_dataloader  # type: ignore[method-assign]
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(module, datamodule=users)
        assert (self.lists(trainer), found.found) == ([found], {}), "it is there and keeps out of it"

    def test_a_users_own_is_taken(
        self, processor: NemotronVLProcessor, write_set: Callable[..., Path], tmp_path: Path
    ) -> None:
        class Mine(BadSamples):
            pass

        mine = Mine()
        trainer = self.trainer(tmp_path / "a", mine)
        trainer.fit(Plain(), datamodule=self.data(write_set("broken", HOW), processor, "train"))
        assert self.lists(trainer) == [mine]
        assert sorted(mine.found["train"]) == sorted(BROKEN)
