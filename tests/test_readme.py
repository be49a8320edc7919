"""The README's python and lightning-vlm lines run as they stand, in its order, shortened only by Trainer limits."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from lightning_vlm.cli import main
from lightning_vlm.data import synthetic_media
from lightning_vlm.data.synthetic import write_digits
from lightning_vlm.data.synthetic_media import write_beeps, write_videos
from lightning_vlm.sources.formats import parse_row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = [
    "--trainer.limit_val_batches",
    "1",
    "--trainer.num_sanity_val_steps",
    "0",
    "--trainer.enable_progress_bar",
    "false",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as after ``make demo``'s first step."""
    folder = tmp_path_factory.mktemp("clone")
    write_digits(folder / "data" / "digits", progress=False)
    with pytest.MonkeyPatch.context() as fewer:  # what the two lines of synthetic_media write, shortened
        few = {"train": 64, "val": 4, "heldout": 4}
        fewer.setattr(synthetic_media, "ROWS", {"videos": few, "beeps": few})
        write_videos(folder / "data" / "digits_video", progress=False)
        write_beeps(folder / "data" / "beeps", progress=False)
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def test_python_blocks(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
def test_command_lines(demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(demo)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("lightning-vlm ")]
    commands = [
        *("fit", "fit", "predict", "check", "preview", "plan", "describe", "doctor", "fit", "fit", "fit"),
        *("export", "fit", "export", "plan"),
    ]
    assert [line.split()[1] for line in lines] == commands
    for steps, line in enumerate(lines, start=1):
        command = line.split()[1]
        limits = {"fit": ["--trainer.max_steps", str(2 * steps), *SHORT], "predict": SHORT[-2:]}.get(command, [])
        monkeypatch.setattr(sys, "argv", [*shlex.split(line), *limits])
        assert main() == 0
    assert len((demo / "runs/digits/predictions.jsonl").read_text().splitlines()) == 80
    assert (demo / "runs/digits/plan.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    for line in ("samples   4,697", "packing isolation: max|d| = "):
        assert line in printed
    (described,) = [block for block in blocks("text") if block.startswith("component ")]
    assert described in printed


def test_rows_parse() -> None:
    import json

    rows = [json.loads(line) for block in blocks("json") for line in block.splitlines()]
    assert len({parse_row(row, "README.md:1").turns[0].text.strip() for row in rows}) == 1


def test_yaml_blocks_hold_known_keys() -> None:
    import inspect

    from lightning_vlm import NemotronVLModule, VLMDataModule

    kinds = {"model": NemotronVLModule, "data": VLMDataModule}
    for block in blocks("yaml"):
        for part, options in yaml.safe_load(block).items():
            assert set(options) <= set(inspect.signature(kinds[part].__init__).parameters)


def test_files_named_in_the_readme_exist() -> None:
    names = re.findall(r"`((?:lightning_vlm|tests|benchmarks|notebooks|configs)/[\w/.]*)`", README)
    names += re.findall(r"\]\(([\w/.]+)\)", README)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
