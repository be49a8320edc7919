"""The rules of the house: one-way imports, small files with a sign on the door, configs and commands that run."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_vlm import NemotronVLModule, VLMDataModule
from lightning_vlm.cli import VLMCLI

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_vlm"
FILES = sorted(PACKAGE.rglob("*.py"))

STEPS = {
    **dict.fromkeys(("schema", "geometry", "segments"), 0),
    **dict.fromkeys(("media", "ops"), 1),
    **dict.fromkeys(("processing", "models", "sources"), 2),
    **dict.fromkeys(("data", "training"), 3),
    **dict.fromkeys(("automodel", "checkpoint"), 4),
    "strategies": 5,
    **dict.fromkeys(("datamodule", "network"), 6),
    "callbacks": 7,
    "module": 8,
    "commands": 9,
    "cli": 10,
    "__main__": 11,
}
# The data half (rows to batches) and the model half (network to step) meet on step 0 only...
HALVES = [({"media", "sources", "processing", "data", "automodel"}, {"models", "training"})]
# ...except where a room's purpose is to join them, or is told not to need the other at import time.
JOINTS = {
    ("processing/image_processor.py", "ops"),  # one normalisation formula for tower and processor
    ("training/generation.py", "processing"),  # answers are decoded by the processor that made the prompts
    ("data/synthetic_media.py", "models"),
    ("data/synthetic.py", "models"),  # the demo's folder holds the config of the model it is for
}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lightning_vlm.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
class TestEveryFile:
    def test_imports_only_from_lower_steps(self, path: Path) -> None:
        own = room(path)
        if own == "__init__":
            return
        for other in imported_rooms(path) - {own}:
            assert STEPS[other] < STEPS[own], f"{own} (step {STEPS[own]}) imports {other} (step {STEPS[other]})"

    def test_halves_meet_only_at_the_contracts(self, path: Path) -> None:
        own, name = room(path), str(path.relative_to(PACKAGE))
        for data_half, model_half in HALVES:
            other_half = model_half if own in data_half else data_half if own in model_half else set()
            crossing = {other for other in imported_rooms(path) & other_half if (name, other) not in JOINTS}
            assert not crossing, f"{name} imports {crossing} of the other half"

    def test_is_short_and_flat(self, path: Path) -> None:
        assert len(path.read_text().splitlines()) <= 400
        assert len(path.relative_to(PACKAGE).parts) <= 2
        assert path.stem not in {"utils", "common", "helpers", "misc"}

    def test_says_what_it_is(self, path: Path) -> None:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, "no module docstring"
        assert len(docstring) > 40

    def test_is_ascii(self, path: Path) -> None:
        assert path.read_text().isascii()


def test_every_room_has_a_step() -> None:
    assert {room(path) for path in FILES} - {"__init__"} <= set(STEPS)


def test_tests_mirror_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= folders


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_instantiates_and_opens_with_its_command(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert command[:1] == ["lightning-vlm"]
    assert str(path.relative_to(ROOT)) in command
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", ["lightning-vlm"])
    configs = [part for pair in itertools.pairwise(command) if pair[0] == "--config" for part in pair]
    cli = VLMCLI(configs, run=False)  # an overlay goes over the config that its command names
    assert isinstance(cli.model, NemotronVLModule)
    assert isinstance(cli.datamodule, VLMDataModule)
    assert list(tmp_path.iterdir()) == [tmp_path / "configs"], "making the objects writes nothing"


def test_pins_satisfy_the_project() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.\-]+)==([\w.\-+!]+)", line)
            assert match, f"constraints.txt: {line!r} is not an exact version"
            pins[match[1].lower().replace("_", "-")] = match[2]
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("lightning", "torch", "transformers", "pillow", "torchmetrics", "jsonargparse", "wandb", "peft"):
        assert name in pins
        assert name in project


def readme_commands() -> list[str]:
    """Commands of the README's shell blocks."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in {"make", "lightning-vlm", "python"}]


def test_readme_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {line.split()[1] for line in readme_commands() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets
