"""The command line as a user meets it: whole runs in a fresh folder, second runs, typos, wrong data, W&B absent."""

from __future__ import annotations

import builtins
import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_vlm import NemotronVLConfig
from lightning_vlm.cli import VLMCLI, main, suggest
from lightning_vlm.models import packed_mamba
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.segments import documents_from_lengths

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(make_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete config in a folder of its own, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_processor().save_pretrained("model")
    NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1).save_pretrained("model")
    for name in ("train", "val", "test"):
        make_task(6, f"{name}.jsonl")
    make_task(3, "ask.jsonl", answers=False)
    options: dict[str, Any] = {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": "run",
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "run", "name": "metrics"}}],
            "callbacks": [
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {"dirpath": "run/checkpoints", "save_last": True, "enable_version_counter": False},
                },
                {"class_path": "LearningRateMonitor"},
            ],
        },
        "model": {"model_id": "model", "init": "random", "max_new_tokens": 2},
        "data": {
            "train": "train.jsonl",
            "val": "val.jsonl",
            "test": ["test.jsonl"],
            "predict": "ask.jsonl",
            "batch_size": 2,
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(options))
    return Path("config.yaml")


def exit_code(*arguments: str) -> int:
    sys.argv = ["lightning-vlm", *arguments]
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)


def logged(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_fit_test_predict_leave_a_run_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--config", str(config)) == 0
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["data"]["batch_size"] == 2
    assert saved["data"]["processor"] == "model", "the processor of the model is the default"
    rows = logged("run/metrics/version_0/metrics.csv")
    columns = {name for row in rows for name, value in row.items() if value}
    assert {
        "train/loss",
        "train/grad_norm",
        "val/loss",
        "val/gen/exact_match",
        "val/gen/anls",
        "perf/tokens_per_s",
        "perf/images_per_s",
        "perf/data_wait_frac",
        "lr-AdamW/vision",
        "lr-AdamW/projector",
        "lr-AdamW/language",
    } <= columns
    assert "val at step 6" in Path("run/predictions_val.html").read_text()

    assert exit_code("test", "--config", str(config), "--ckpt_path", "run/checkpoints/last.ckpt") == 0
    assert "test/gen/exact_match" in capsys.readouterr().out
    page = Path("run/predictions_test.html").read_text()
    assert page.count("<tr>") == 1 + 6
    assert page.count('src="data:image/png;base64,') == 6, "rows have 0, 1, 2, 0, 1, 2 images"
    assert Path("run/config_test.yaml").exists(), list(Path("run").iterdir())

    assert exit_code("predict", "--config", str(config), "--ckpt_path", "run/checkpoints/last.ckpt") == 0
    lines = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["ask.jsonl:1", "ask.jsonl:2", "ask.jsonl:3"]
    assert all(isinstance(line["answer"], str) and line["prompt"].endswith("assistant\n") for line in lines)

    assert exit_code("validate", "--config", str(config), "--ckpt_path", "run/checkpoints/last.ckpt") == 0


def test_a_second_run_in_the_same_folder_keeps_the_first_config(config: Path) -> None:
    assert exit_code("fit", "--config", str(config)) == 0
    assert exit_code("fit", "--config", str(config), "--trainer.max_epochs", "1") == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert yaml.safe_load(Path("run/config.1.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert Path("run/metrics/version_0/metrics.csv").exists()
    assert Path("run/metrics/version_1/metrics.csv").exists()


def test_ckpt_path_last_continues(config: Path) -> None:
    assert exit_code("fit", "--config", str(config), "--trainer.max_epochs", "1") == 0
    assert exit_code("fit", "--config", str(config), "--ckpt_path", "last") == 0
    rows = logged("run/metrics/version_1/metrics.csv")
    assert [row["step"] for row in rows if row["train/loss"]] == ["3", "4", "5"]


def test_short_flags(config: Path) -> None:
    cli = VLMCLI(["--config", str(config), "--model.lr", "1e-4", "--data.max_tokens", "2048"], run=False)
    assert cli.model.hparams.lr == 1e-4
    assert cli.datamodule.max_tokens == 2048
    cli = VLMCLI(["--config", str(config), "--model.lr", "{vision: 1e-5, projector: 1e-4, language: 1e-6}"], run=False)
    assert cli.model.hparams.lr == {"vision": 1e-5, "projector": 1e-4, "language": 1e-6}


def test_print_config_is_a_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--config", str(config), "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["max_new_tokens"] == 2
    Path("printed.yaml").write_text(yaml.safe_dump(printed))
    assert exit_code("fit", "--config", "printed.yaml", "--trainer.fast_dev_run", "true") == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model.l", "3"], ""),
        (["--data.max_token", "5"], "Did you mean 'data.max_tokens'?"),
        (["--data.batchsize", "5"], "Did you mean 'data.batch_size'?"),
        (["--trainer.max_stepss", "3"], "Did you mean 'trainer.max_steps'?"),
        (["--model.frezee", "[vision]"], "Did you mean 'model.freeze'?"),
    ],
    ids=lambda value: str(value),
)
def test_typos_on_the_command_line(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    assert exit_code("fit", "--config", str(config), *arguments) == 2
    error = capsys.readouterr().err
    assert arguments[0].lstrip("-") in error
    assert hint in error


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("data", "batchsize", "Did you mean 'data.batch_size'?"),
        ("model", "learning_rate", ""),
        ("trainer", "max_epoch", "Did you mean 'trainer.max_epochs'?"),
    ],
)
def test_typos_in_the_config(
    config: Path, capsys: pytest.CaptureFixture[str], section: str, key: str, hint: str
) -> None:
    options = yaml.safe_load(config.read_text())
    options[section][key] = 1
    config.write_text(yaml.safe_dump(options))
    assert exit_code("fit", "--config", str(config)) == 2
    error = capsys.readouterr().err
    assert key in error
    assert hint in error


def test_suggestions() -> None:
    known = ["data.batch_size", "model.lr", "trainer.max_steps"]
    assert suggest("Option 'batchsize' is not accepted", known) == " Did you mean 'data.batch_size'?"
    assert suggest("Group 'data' does not accept option 'batch_sizes'", known) == " Did you mean 'data.batch_size'?"
    assert suggest("unrecognized arguments: --zzz=3", known) == ""
    assert suggest("something else", known) == ""


def test_wrong_data_ends_in_one_sentence_and_exit_code_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert exit_code("fit", "--config", str(config)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: data.train: 1 of 7 samples (14.3 %) cannot be used, expected at most max_bad_fraction = 1 %: "
        "train.jsonl:7: the 1 turn(s) hold no assistant turn, expected one to learn from; "
        "add the answer or remove the row; correct or remove them (lightning-vlm check lists them all), or raise "
        "max_bad_fraction."
    )


def test_a_missing_model_folder_is_named_and_nothing_is_downloaded(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("fit", "--config", str(config), "--model.model_id", "absent") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.processor (by default model.model_id): 'absent' is not a folder")


def test_a_folder_without_a_processor_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert exit_code("fit", "--config", str(config), "--data.processor", "empty") == 1
    assert "'empty' holds no processor that can be loaded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.packing", "true", "--data.sampler", "token_budget"],
            "error: packing=True fills rows by itself; expected sampler='shuffle' or 'sequential'",
        ),
        (
            ["--model.freeze", "[tower]"],
            "error: the model has no part 'tower'; expected one of vision, projector, audio, audio_projector, language",
        ),
        (["--model.model_id", "null"], "error: NemotronVLModule takes either model_id or config; give one of them"),
        (["--trainer.accelerator", "abacus"], "error: You selected an invalid accelerator name"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_end_in_one_sentence_and_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert exit_code("fit", "--config", str(config), *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_sigterm_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(args: Any) -> None:
        raise SIGTERMException

    monkeypatch.setattr("lightning_vlm.cli.VLMCLI", stopped)
    assert main([]) == 143
    assert "continue with --ckpt_path last" in capsys.readouterr().err


WANDB = [{"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": "run", "project": "p"}}]


def test_wandb_offline_when_nobody_is_logged_in(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # a service that an earlier test has left writes into that test's folder
    arguments = ["fit", "--config", str(config), "--trainer.logger", json.dumps(WANDB), "--trainer.max_epochs", "1"]
    assert exit_code(*arguments) == 0
    wandb.finish()  # as the end of the process does
    wandb.teardown()  # its service has written everything then
    (run,) = Path("run/wandb").glob("offline-run-*")
    record = next(run.glob("*.wandb")).read_bytes()
    assert record.count(b"media/images/") >= 4, "the images of the table are part of the run"
    (table,) = (json.loads(path.read_text()) for path in run.glob("files/media/table/val/predictions*.table.json"))
    assert table["columns"] == ["step", "source", "images", "prompt", "target", "answer", "exact_match", "anls"]
    assert [row[1] for row in table["data"]] == [f"val.jsonl:{line}" for line in range(1, 7)]
    monkeypatch.setenv("WANDB_MODE", "offline")  # as the tests' environment has it


@pytest.mark.parametrize(
    ("command", "purpose"),
    [("fit", "Runs the full optimization"), ("plan", "Prints what an epoch"), ("doctor", "Tells which kernels")],
)
def test_help_says_what_a_command_does(command: str, purpose: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    assert purpose in capsys.readouterr().out


def test_help_names_the_command_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    assert "lightning-vlm export RUN OUT" in capsys.readouterr().out


def test_a_missing_extra_is_told_in_one_sentence(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert exit_code("describe", "--config", str(config), "--model.lora", "{rank: 4}") == 1
    assert capsys.readouterr().err.endswith("error: LoRA needs peft: pip install 'lightning-vlm[lora]'\n")


def test_wandb_absent(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    arguments = ["fit", "--config", str(config), "--trainer.logger", json.dumps(WANDB), "--trainer.max_epochs", "1"]
    assert exit_code(*arguments) == 0
    assert not Path("run/wandb").exists()
    assert os.path.exists("run/predictions_val.html")


# Packing


def test_fit_with_packing(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From the plan to the test of the trained model, resumed in between."""
    packing = ["--data.packing", "true", "--data.batch_tokens", "140"]
    assert exit_code("plan", "--config", str(config), *packing) == 0
    planned = capfd.readouterr().out
    assert exit_code("fit", "--config", str(config), *packing, "--trainer.max_epochs", "1") == 0
    assert exit_code("fit", "--config", str(config), *packing, "--ckpt_path", "last") == 0
    rows = [row for version in range(2) for row in logged(f"run/metrics/version_{version}/metrics.csv")]
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    packs = int(planned.partition("packs     ")[2].split()[0])
    assert steps == list(range(2 * packs))
    for name, value in {"planned": 6, "seen": 6, "skipped": 0, "dropped": 0}.items():
        assert [float(row[f"data/samples_{name}"]) for row in rows if row[f"data/samples_{name}"]] == [value] * 2
    assert [float(row["data/padding_frac"]) for row in rows if row["data/padding_frac"]] == [0, 0]
    saved = yaml.safe_load(Path("run/config.yaml").read_text())["data"]
    assert (saved["packing"], saved["batch_tokens"]) == (True, 140)
    assert exit_code("test", "--config", str(config), "--ckpt_path", "run/checkpoints/last.ckpt") == 0


def test_a_packed_fit_says_what_it_found(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    assert exit_code("fit", "--config", str(config), "--data.packing", "true", "--trainer.max_steps", "1") == 0
    headline, isolation = [message for message in caplog.messages if message.startswith("packing")]
    assert headline.startswith("packing: 6 samples, ")
    assert isolation.startswith("packing isolation: max|d| = ")
    assert isolation.endswith(" OK (ssd=torch, attn=sdpa)")


def test_a_leak_ends_in_one_sentence_and_exit_code_1(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = packed_mamba.scan

    def leaks(*args: Any) -> Any:
        *tensors, documents, choice = args
        return sound(*tensors, documents_from_lengths([sum(documents.lengths)]), choice)

    monkeypatch.setattr(packed_mamba, "scan", leaks)
    assert exit_code("fit", "--config", str(config), "--data.packing", "true") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("error: packing isolation: max|d| = ")
    assert last.endswith("; documents of a pack would be trained on each other")
    assert not Path("run/checkpoints").exists()


def test_an_implementation_that_cannot_run_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_VLM_SSD", "mamba_ssm")
    assert exit_code("fit", "--config", str(config), "--data.packing", "true") == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(
            "error: a packed row cannot run on cpu: LIGHTNING_VLM_SSD=mamba_ssm cannot run: runs on NVIDIA GPUs only"
        )
    )


# plan and doctor


def plan(config: Path, *arguments: str) -> int:
    """``plan`` as for a machine that this is not, with a logger that nobody may start."""
    machine = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.logger", json.dumps(WANDB)]
    return exit_code("plan", "--config", str(config), "--data.packing", "true", *machine, *arguments)


def test_plan_tells_an_epoch_and_writes_a_picture_alone(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(Path().rglob("*"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", ".")
    # No model: the processor's folder is all that is needed.
    arguments = ["--model.model_id", "null", "--data.processor", "model"]
    assert plan(config, "--data.batch_tokens", "140", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines if line}
    assert {"samples", "tokens", "images", "packs", "fill", "computed", "steps", "balance", "source"} <= names
    assert "samples   6" in lines
    assert next(line for line in lines if line.startswith("packs")).endswith(" of at most 140 tokens")
    assert "steps     1 micro-batches per epoch on each of 8 rank(s)" in lines
    assert sum(line.startswith("train.jsonl  ") for line in lines) == 1
    assert any("train.jsonl:" in line for line in lines[lines.index(next(x for x in lines if "largest" in x)) :])
    assert lines[-1] == "histogram: run/plan.png"
    assert os.environ.pop("WANDB_MODE", None) is None, "W&B is none of its business"
    assert set(Path().rglob("*")) - before == {Path("run"), Path("run/plan.png")}


@pytest.mark.parametrize(
    ("arguments", "ranks", "written"),
    [
        (["--trainer.num_nodes", "2"], 16, "run/plan.png"),
        (["--ranks", "3"], 3, "run/plan.png"),
        (["--trainer.devices", "auto"], 1, "run/plan.png"),
        (["--picture", ""], 8, None),
        (["--picture", "other/name.png"], 8, "run/other/name.png"),
    ],
    ids=str,
)
def test_plan_of_ranks_and_pictures(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], ranks: int, written: str | None
) -> None:
    assert plan(config, *arguments) == 0
    assert f" micro-batches per epoch on each of {ranks} rank(s)\n" in capsys.readouterr().out
    assert [str(path) for path in Path("run").rglob("*.png")] == ([] if written is None else [written])
    assert Path("run").exists() == (written is not None)


def test_plan_of_padded_batches_and_accumulated_steps(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data.packing", "false", "--trainer.accumulate_grad_batches", "2", "--picture", ""]
    assert exit_code("plan", "--config", str(config), *arguments) == 0
    printed = capsys.readouterr().out
    assert "batches   3 of a fixed number of samples\n" in printed
    assert printed.endswith("\n2 optimizer steps per epoch\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.batch_tokens", "50"],
            "error: data.overlong: 4 of 6 samples (66.7 %) exceed 50 tokens: train.jsonl:2 ",
        ),
        (["--data.train", "absent.jsonl"], "error: absent.jsonl: the file does not exist; "),
        (["--data.train", "null"], "error: data.train: there are no train files, expected at least one; "),
        (
            ["--data.media_root", "model"],
            "error: data.train: 4 of 6 samples (66.7 %) cannot be used, expected at most ",
        ),
        (
            ["--data.media_root", "model", "--data.strict", "true"],
            "error: train.jsonl:2: image 'train.jsonl-1-0.png' does not exist under the ",
        ),
        (["--model.model_id", "null"], "error: data.processor: VLMDataModule has no processor; name one: "),
        (["--data.processor", "absent"], "error: data.processor (by default model.model_id): 'absent' is not a folder"),
    ],
    ids=str,
)
def test_plan_of_wrong_data_ends_in_one_sentence_and_exit_code_1(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert plan(config, *arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(message)
    assert not Path("run").exists()


def test_plan_of_wrong_settings_ends_with_exit_code_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "--data.sampler", "token_budget") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: packing=True fills rows by itself; ")
    assert plan(config, "--rank", "2") == 2
    assert "Did you mean 'ranks'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"weight": 0.07}, "the weights 0.07 are met exactly only after more than 20 epochs"),
        ({"weight": 0}, "the weight of train.jsonl is 0"),
        ({"columns": {"qestion": "q"}}, "columns maps qestion, which is unknown"),
        ({"format": "lava"}, "format='lava' is unknown"),
    ],
)
def test_wrong_settings_of_a_source_end_with_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], setting: dict[str, Any], words: str
) -> None:
    overlay = Path("overlay.yaml")
    overlay.write_text(yaml.safe_dump({"data": {"train": [{"path": "train.jsonl", **setting}]}}))
    assert exit_code("check", "--config", str(config), "--config", str(overlay)) == 2
    assert words in capsys.readouterr().err


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code("doctor") == 0
    printed = capsys.readouterr().out
    assert "  ssd       torch     mamba_ssm: runs on NVIDIA GPUs only, this is cpu; fla: runs on NVIDIA GPUs" in printed
    assert "  attention sdpa      float32: per document: no varlen kernel for cpu\n" in printed
    assert printed.count(" OK (ssd=torch, attn=sdpa)\n") >= 2
    monkeypatch.setenv("LIGHTNING_VLM_SSD", "fla")
    assert exit_code("doctor") == 1
    assert "  ssd       ERROR     LIGHTNING_VLM_SSD=fla cannot run: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# As a part of a pipe


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (["plan", "--picture", ""], ""),  # less than a buffer: written at the end
        (["plan", "--picture", ""], "1"),  # written at once
        (["check", "--json"], "1"),
        (["plan", "--data.train", "absent.jsonl"], ""),  # nothing is written: an error is one all the same
    ],
)
def test_a_reader_that_left_ends_it_quietly(config: Path, arguments: list[str], unbuffered: str) -> None:
    fails = "absent.jsonl" in arguments
    read, write = os.pipe()
    os.close(read)  # as `head` does when it has its lines; here, for certain, before the first is written
    with os.fdopen(write, "w") as pipe:
        script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lightning_vlm.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", script, arguments[0], "--config", str(config), *arguments[1:]]
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=env)
    assert "BrokenPipeError" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if fails else 128 + signal.SIGPIPE)
    assert done.stderr.rstrip().endswith("correct the path in the data config.") == fails


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker or a service that died: stdout is whole, so its reader is not the reason."""

    def broken(args: Any) -> None:
        raise BrokenPipeError("a service")

    monkeypatch.setattr("lightning_vlm.cli.VLMCLI", broken)
    with pytest.raises(BrokenPipeError, match="a service"):
        main([])


@pytest.mark.parametrize("command", ["check", "preview", "plan", "fit"])
def test_only_what_trains_tells_its_seed(config: Path, command: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning")
    options = ["--trainer.fast_dev_run", "true"] if command == "fit" else []
    assert exit_code(command, "--config", str(config), *options) == 0
    assert ("Seed set to" in caplog.text) == (command == "fit")


def test_refusals_that_need_the_model_are_one_sentence(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--config", str(config), "--model.lr", "{vision: 1e-4}") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: lr has no rate for 'projector', which is trainable; add it or freeze that part"
    )


def test_defects_keep_their_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_vlm.network.check_rates", lambda model, lr: float("no number"))
    with pytest.raises(ValueError, match="could not convert"):
        exit_code("fit", "--config", str(config))
