"""``describe``: the numbers are those of the model that a run would make, and nothing but its config is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_vlm import NemotronVLConfig, NemotronVLModule
from lightning_vlm.cli import main
from lightning_vlm.commands.describe import planned_network, training_memory
from lightning_vlm.models.architecture import describe_architecture
from lightning_vlm.training.optimizers import make_optimizer, state_bytes
from tests.fixtures.released_models import config_omni

TINY: dict[str, Any] = {"pattern": "ME*-", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose data is not there and whose weights cannot be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-vlm"])
    NemotronVLConfig.tiny(**TINY, audio_token_id=5).save_pretrained("model")
    Path("model/model.safetensors").write_text("no weights")
    options = {
        "trainer": {"default_root_dir": "run", "precision": "bf16-true"},
        "model": {"model_id": "model", "freeze": ["vision", "audio"]},
        "data": {"train": "absent.jsonl", "packing": True, "batch_size": 2},
    }
    Path("config.yaml").write_text(yaml.safe_dump(options))
    return Path("config.yaml")


def describe(*arguments: str) -> int:
    sys.argv = ["lightning-vlm", "describe", *arguments]
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)


def test_it_tells_the_model_of_the_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe("--config", str(config), "--detailed", "--json") == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert printed.err == "", "no seed, no warnings"
    module = NemotronVLModule(model_id="model", init="random", freeze=["vision", "audio"])
    expected = describe_architecture(module.network.to(torch.bfloat16), detailed=True)
    assert {key: told[key] for key in ("total", "dtypes", "components", "parts", "inside")} == json.loads(
        json.dumps(expected.to_dict())
    )
    assert (told["precision"], told["dtype"]) == ("bf16-true", "bfloat16")
    assert told["components"]["vision_model"]["state"] == "frozen"
    assert told["components"]["audio"]["state"] == "partly", "its projector is trained"
    assert not Path("run").exists()


def test_the_text_says_what_it_takes_for_granted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe("--config", str(config), "--save", "out/arch.txt") == 0
    printed = capsys.readouterr().out
    assert Path("out/arch.txt").read_text() == printed
    lines = printed.splitlines()
    assert lines[0] == "trainer.precision bf16-true: 2 bytes a parameter (bfloat16); no weights were read"
    assert "pattern" not in printed
    assert lines[-1].endswith("activations come on top; sharding over devices is not considered")
    assert [line.split()[0] for line in lines[-4:]] == ["weights", "gradients", "adamw", "total"]


def test_adapters_count_in_float32(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", str(config), "--model.freeze", "null", "--model.lora", "{rank: 4}")
    assert describe(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    adapters = told["total"]["trainable"]
    assert told["dtypes"]["float32"] == adapters > 0
    assert told["training_memory_bytes"]["gradients"] == 4 * adapters
    assert told["total"]["parameter_bytes"] == 2 * told["total"]["parameters"] + 2 * adapters
    assert describe(*arguments) == 0
    first = "trainer.precision bf16-true: 2 bytes a parameter (bfloat16), of adapters 4 (float32); no weights were read"
    assert capsys.readouterr().out.startswith(f"{first}\n")


def test_overrides_count(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe("--config", str(config), "--model.freeze", "[]", "--trainer.precision", "32", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["state"] == "trainable"
    assert told["total"]["parameter_bytes"] == 4 * told["total"]["parameters"]
    bigger = NemotronVLConfig.tiny(**{**TINY, "pattern": "ME*-M"}).to_dict()
    overlay = {"model": {"model_id": None, "config": bigger, "freeze": None}}
    Path("overlay.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(overlay))))
    assert describe("--config", str(config), "--config", "overlay.yaml", "--detailed") == 0
    printed = capsys.readouterr().out
    assert "pattern  ME*-M\n" in printed
    assert "\naudio " in printed
    assert "embed_audio" not in printed


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (None, torch.float32),
        (32, torch.float32),
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16", torch.float32),
        (16, torch.float32),
        ("16-true", torch.float16),
        ("bf16-true", torch.bfloat16),
        (64, torch.float64),
    ],
)
def test_weights_have_the_dtype_that_lightning_gives_them(precision: Any, dtype: torch.dtype) -> None:
    from lightning.pytorch import Trainer

    options = {"config": NemotronVLConfig.tiny(**TINY).to_dict(), "freeze": []}
    network = planned_network(options, precision)
    assert network.dtype == dtype
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    if precision not in ("16-true", 16):  # these want a GPU
        plugin = Trainer(
            precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False
        ).precision_plugin
        with plugin.module_init_context():
            made = plugin.convert_module(NemotronVLModule(init="random", **options).network)
        assert describe_architecture(made) == describe_architecture(network)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_training_memory_is_what_a_step_allocates(precision: str, name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    options = {"config": NemotronVLConfig.tiny(**TINY).to_dict(), "freeze": ["vision"]}
    network = planned_network(options, precision)
    planned = training_memory(describe_architecture(network), state_bytes(network, name), name)
    model = NemotronVLModule(init="random", **options).network
    model.to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    optimizer = make_optimizer(model, name, 1e-3, (0.9, 0.95), 0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    states = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
    found = {
        "weights": size([*model.parameters(), *model.buffers()]),
        "gradients": size(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
        name: sum(size([s.codes, s.scale, s.qmap] if hasattr(s, "codes") else [s]) for s in states),
    }
    assert planned == {**found, "total": sum(found.values())}


@pytest.mark.slow
def test_thirty_billion_parameters_take_seconds_and_no_memory(tmp_path: Path) -> None:
    config_omni().save_pretrained(tmp_path)
    script = (
        "import resource, sys, time\n"
        "from lightning_vlm.cli import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = peak(), time.perf_counter()\n"
        "code = main()\n"
        "print(peak() - before, time.perf_counter() - start, code, file=sys.stderr)\n"
    )
    arguments = ["describe", "--model.model_id", str(tmp_path), "--trainer.precision", "bf16-true", "--json"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["total"]["parameters"] == 33_015_546_816
    grown_mib, seconds, code = done.stderr.split()[-3:]
    assert int(code) == 0
    assert float(grown_mib) < 200, "MiB"
    assert float(seconds) < 30


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "error: NemotronVLModule takes either model_id or config; give one of them"),
        (["--model.model_id", "absent"], 1, "error: model.model_id: 'absent' is not a folder"),
        (
            ["--model.model_id", "empty"],
            1,
            "error: model.model_id: 'empty' has no config.json; name a folder with a config.json, or set model.config",
        ),
        (
            ["--model.model_id", "broken"],
            1,
            "error: broken/config.json: it is no JSON; fetch or write it anew",
        ),
        (
            ["--model.config", "{text_config: {hidden_size: wide}}"],
            1,
            "error: model.config: it describes no model: Validation error for field 'hidden_size'",
        ),
        (
            ["--model.model_id", "model", "--model.freeze", "[tower]"],
            2,
            "error: the model has no part 'tower'; expected",
        ),
        (
            ["--model.model_id", "model", "--model.freeze", "[vision,projector,audio,audio_projector,language]"],
            2,
            "error: freeze=['audio', 'audio_projector', 'language', 'projector', 'vision'] leaves nothing to train",
        ),
        (
            ["--model.model_id", "model", "--detail"],
            2,
            "error: unrecognized arguments: --detail Did you mean 'detailed'?",
        ),
        (
            ["--model.model_id", "model", "--save", "config.yaml/x"],
            1,
            "error: --save: 'config.yaml/x' cannot be written",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_wrong_use_ends_in_one_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    assert describe(*arguments) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(message)


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe("--help") == 0
    printed = capsys.readouterr().out
    assert "Prints what the model consists of" in printed
    for option in ("--save", "--detailed", "--json"):
        assert option in printed
