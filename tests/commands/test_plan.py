"""What ``plan`` prints, from a datamodule alone, and how many ranks it takes a config to mean."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.commands import plan as plan_command
from lightning_vlm.commands.plan import planned_ranks, print_plan
from lightning_vlm.schema import DataError


@pytest.mark.parametrize(
    ("devices", "num_nodes", "ranks"),
    [
        (8, 1, 8),
        (8, 4, 32),
        ("8", 2, 16),
        ("0,1", 2, 4),
        ("3,", 1, 1),
        ([0, 3], 1, 2),
        ([1], 2, 2),
        ("auto", 1, None),
        (-1, 1, None),
        ("-1", 1, None),
        (0, 1, None),
    ],
)
def test_ranks_of_a_config(devices: Any, num_nodes: int, ranks: int | None) -> None:
    assert planned_ranks(Namespace(devices=devices, num_nodes=num_nodes)) == ranks


@pytest.fixture
def data(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> VLMDataModule:
    return VLMDataModule(train=str(make_task(13)), processor=processor, packing=True, batch_tokens=130)


def test_it_prints_the_summary_and_draws_it(
    data: VLMDataModule, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    print_plan(data, 3, 1, tmp_path / "run" / "plan.png")
    printed = capsys.readouterr().out
    summary = data.summary(3)
    assert printed == f"{summary.text()}\n\nhistogram: {tmp_path / 'run' / 'plan.png'}\n"
    assert (tmp_path / "run" / "plan.png").stat().st_size > 1000


def test_optimizer_steps_are_told_where_they_are_fewer(
    data: VLMDataModule, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    print_plan(data, 1, 3, None)
    steps = data.summary(1).steps
    assert capsys.readouterr().out.endswith(f"\n{-(-steps // 3)} optimizer steps per epoch\n")
    assert steps % 3, "a last, short step is one"
    assert not list(tmp_path.glob("**/plan*"))


def test_without_matplotlib_the_numbers_come_all_the_same(
    data: VLMDataModule, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan_command.importlib.util, "find_spec", lambda name: None)
    print_plan(data, 1, 1, tmp_path / "plan.png")
    printed = capsys.readouterr().out
    assert printed.startswith("samples   13\n")
    assert printed.endswith("no histogram: matplotlib is not installed (pip install matplotlib)\n")
    assert not (tmp_path / "plan.png").exists()


def test_wrong_data_is_an_error(data: VLMDataModule) -> None:
    data.batch_tokens = 50
    with pytest.raises(DataError, match=r"8 of 13 samples \(61.5 %\) exceed 50 tokens"):
        print_plan(data, 1, 1, None)
