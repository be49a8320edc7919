"""``plan --memory``: layouts of configs, the sentence at the end, and the recipes whose comments are what it prints."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_vlm import NemotronVLConfig, NemotronVLProcessor, VLMDataModule
from lightning_vlm.cli import main
from lightning_vlm.commands.describe import planned_network
from lightning_vlm.commands.memory_layout import Layout, layout_of, pieces
from lightning_vlm.training.memory import Gathering, gradient_bytes, optimizer_bytes, weight_bytes
from lightning_vlm.training.optimizers import state_bytes
from tests.fixtures.released_models import config_12b, config_omni

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {"pattern": "ME*-MM", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}
RECIPES = sorted((ROOT / "configs" / "experiment").glob("*_*b_*gpu.yaml"))


def named(name: str, **init_args: Any) -> Any:
    arguments = Namespace(as_dict=lambda: init_args)
    return Namespace(class_path=f"lightning_vlm.strategies.{name}", init_args=arguments)


def trainer(strategy: Any, devices: Any = 8, num_nodes: int = 1, accumulate: int = 4) -> Namespace:
    return Namespace(
        strategy=strategy, devices=devices, num_nodes=num_nodes, accumulate_grad_batches=accumulate, precision=None
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (trainer("auto", 1), "1 rank, one device"),
        (trainer("auto", "auto"), "1 rank, one device"),
        (trainer("auto", 2), "2 ranks, DDP"),
        (trainer("ddp_find_unused_parameters_true"), "8 ranks, DDP"),
        (trainer(Namespace(class_path="lightning.pytorch.strategies.DDPStrategy"), 4, 2), "8 ranks, DDP"),
        (trainer("fsdp2"), "8 ranks, FSDP2: 8 shards"),
        (trainer(named("FSDP2Strategy", shards=8), 8, 8), "64 ranks, FSDP2: 8 shards, 8 copies"),
        (trainer("pipeline", 2), "2 ranks, pipeline of 2 (1f1b, 4 micro-batches)"),
        (
            trainer(named("PipelineStrategy", stages=4, schedule="gpipe"), 8, 2),
            "16 ranks, pipeline of 4 (gpipe, 4 micro-batches), FSDP2 in stages: 4 shards",
        ),
    ],
)
def test_the_layout_is_the_strategys(given: Namespace, expected: str) -> None:
    assert str(layout_of(given)) == expected


def test_ranks_may_be_given() -> None:
    assert layout_of(trainer("fsdp2", "auto"), ranks=16).shards == 16
    assert layout_of(trainer(named("PipelineStrategy", stages=4), "auto"), ranks=2).world_size == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (trainer("deepspeed"), "does not know trainer.strategy 'deepspeed'; expected auto, ddp, fsdp2 or pipeline"),
        (
            trainer(named("FSDP2Strategy", shards=3)),
            "stages=1, shards=3 and tensor=1 need a multiple of 3 ranks, and there are 8",
        ),
    ],
)
def test_what_it_cannot_divide_is_an_error(given: Namespace, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(given)


def test_micro_batches_in_flight() -> None:
    one = Layout("pipeline", 4, 4, micro_batches=6)
    assert [one.in_flight(rank) for rank in range(4)] == [4, 3, 2, 1]
    gpipe = Layout("pipeline", 4, 4, schedule="gpipe", micro_batches=6)
    assert [gpipe.in_flight(rank) for rank in range(4)] == [8] * 4, "whole rounds over the ranks"
    assert Layout("fsdp2", 8, micro_batches=6).in_flight(0) == 1


@pytest.mark.parametrize("stages_per_rank", [1, 2])
def test_stages_hold_the_whole_model_once(stages_per_rank: int) -> None:
    network = planned_network({"config": NemotronVLConfig.tiny(**TINY).to_dict(), "freeze": ["vision"]}, "bf16-true")
    schedule = "1f1b" if stages_per_rank == 1 else "interleaved_1f1b"
    gathering = Gathering(None, torch.float32, frees_layers=False, keeps_gradients=True)
    layout = Layout("pipeline", 2, 2, gathering=gathering, schedule=schedule, stages_per_rank=stages_per_rank)
    found = pieces(network, layout)
    assert [piece.name for piece in found] == ["stage 0", "stage 1"]
    assert [(piece.first, piece.last) for piece in found] == [(True, False), (False, True)]
    models = [piece.model for piece in found]
    assert sum(map(weight_bytes, models)) == weight_bytes(network)
    assert sum(map(gradient_bytes, models)) == gradient_bytes(network)
    assert sum(optimizer_bytes(model, "muon") for model in models) == state_bytes(network, "muon")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config for 8 GPUs, whose data is not there and whose weights cannot be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-vlm"])
    NemotronVLConfig.tiny(**TINY).save_pretrained("model")
    Path("model/model.safetensors").write_text("no weights")
    written = {
        "trainer": {"accelerator": "gpu", "devices": 8, "strategy": "fsdp2", "default_root_dir": "run"},
        "model": {"model_id": "model"},
        "data": {"train": "absent.jsonl", "packing": True, "batch_tokens": 4096, "batch_patches": 1024},
    }
    Path("config.yaml").write_text(yaml.safe_dump(written))
    return Path("config.yaml")


def plan(*arguments: str) -> int:
    sys.argv = ["lightning-vlm", "plan", "--memory", *arguments]
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_laptop_plans_for_eight_gpus(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--config", str(config)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == "8 ranks, FSDP2: 8 shards; trainer.precision 32-true"
    assert lines[1] == "micro-batches of at most 4,096 tokens, 1,024 patches: data.batch_tokens, data.batch_patches"
    assert lines[-1].startswith("fits: ")
    assert lines[-1].endswith(" of 80 GiB")
    assert not Path("run").exists()


def test_layers_computed_together_take_less(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(tensor: int) -> dict[str, Any]:
        options = {"class_path": "lightning_vlm.strategies.FSDP2Strategy", "init_args": {"tensor": tensor, "shards": 2}}
        assert plan("--config", str(config), "--json", "--trainer.strategy", json.dumps(options)) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["layout"]["tensor"] == tensor
        return printed["ranks"][0]["held_bytes"] | printed["ranks"][0]["activation_bytes"]

    alone, together = planned(1), planned(2)
    for name in ("weights", "gradients", "adamw", "gathered weights", "attention", "MLP"):
        assert together[name] < alone[name], name
    assert together["Mamba2"] == alone["Mamba2"], "whole on every rank"


def test_the_sum_is_of_the_items(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--config", str(config), "--json", "--trainer.strategy", "pipeline", "--gpu_memory", "3") == 0
    told = json.loads(capsys.readouterr().out)
    assert [rank["name"] for rank in told["ranks"]] == ["stage 0", "stage 1"]
    for rank in told["ranks"]:
        items = [*rank["held_bytes"].values(), *rank["activation_bytes"].values(), rank["allowance_bytes"]]
        assert rank["total_bytes"] == sum(items)
    assert told["gpu_memory_bytes"] == 3 * 2**30
    assert told["fits"] is True


ACTIVATIONS = ("--data.batch_tokens", "400000", "--gpu_memory", "4", "--data.batch_patches")
WEIGHTS = ("--data.batch_tokens", "64", "--gpu_memory", "1.001", "--trainer.strategy", "auto")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ((*ACTIVATIONS, "0"), "model.gradient_checkpointing: true"),
        ((*ACTIVATIONS, "0", "--model.gradient_checkpointing", "true"), "a smaller data.batch_tokens"),
        ((*ACTIVATIONS, "4000000"), "model.gradient_checkpointing: true"),
        ((*ACTIVATIONS, "400000000", "--model.gradient_checkpointing", "true"), "model.vision_micro_batch: 8"),
    ],
)
def test_it_says_what_to_try(
    arguments: tuple[str, ...], advice: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--config", str(config), *arguments) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("does not fit: ")
    assert f" of {float(arguments[3]):g} GiB; the largest items are " in last
    assert last.endswith(f"; try {advice}")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("--trainer.strategy", "ddp"), "trainer.strategy: fsdp2"),
        (("--trainer.devices", "1"), "model.lora, or trainer.strategy: fsdp2 on several devices"),
    ],
)
def test_large_models_are_spread(
    arguments: tuple[str, ...], advice: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = {**TINY, "hidden_size": 1024, "vocab_size": 50_000}
    NemotronVLConfig.tiny(**large).save_pretrained("model")
    assert plan("--config", str(config), *WEIGHTS, *arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"; try {advice}")


def test_without_a_budget_it_says_what_to_set(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--config", str(config), "--data.batch_tokens", "null") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("cannot tell: ")
    assert last.endswith("; set data.batch_tokens (and data.batch_patches), or data.max_tokens")
    options = ("--data.batch_tokens", "null", "--data.batch_patches", "null", "--data.max_tokens", "512")
    assert plan("--config", str(config), *options) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("micro-batches of at most 4,096 tokens, 16,384 patches: data.batch_size x data.max_tokens; ")


def test_data_that_is_there_is_measured(
    config: Path, make_task: Any, processor: NemotronVLProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    processor.save_pretrained("model")
    rows = str(make_task(13))
    arguments = ("--data.train", rows, "--data.batch_tokens", "null", "--data.batch_patches", "null")
    assert plan("--config", str(config), *arguments) == 0
    line = capsys.readouterr().out.splitlines()[1]
    module = VLMDataModule(train=rows, processor=processor, packing=True)
    module.setup("fit")
    batches = module.summary(8).largest
    tokens, patches = max(batch.tokens for batch in batches), max(batch.patches for batch in batches)
    assert line == f"micro-batches of at most {tokens} tokens, {patches} patches: the largest batch of the data"


def test_wrong_settings_end_in_a_sentence(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--config", str(config), "--trainer.strategy", "deepspeed") == 2
    assert "does not know trainer.strategy 'deepspeed'" in capsys.readouterr().err
    assert plan("--config", str(config), "--model.optimizer", "adamw8bit") == 2
    assert "does not work with shards" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_as_their_comments_say(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comment = [line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")]
    (command,) = [line.split() for line in comment if line.startswith(" lightning-vlm plan --memory ")]
    assert command[-2:] == ["--model.model_id", "FOLDER"]
    config = config_12b(vocab_size=131_584) if "12b" in path.stem else config_omni()
    config.save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-vlm"])
    assert plan(*command[3:-1], str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "fits: " in printed
    told = [line.removeprefix("   ") for line in comment if line.startswith("   ") or not line]
    start = told.index(printed.splitlines()[0])
    assert told[start : start + len(printed.splitlines())] == printed.splitlines()


def test_there_are_six_recipes() -> None:
    assert len(RECIPES) == 6
