"""What ``preview`` prints and writes, from a datamodule alone."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.commands.preview import print_preview
from lightning_vlm.data.samplers import Position
from lightning_vlm.schema import DataError


@pytest.fixture
def data(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> VLMDataModule:
    return VLMDataModule(
        train=str(make_task(13)), val=str(make_task(4, "val.jsonl")), processor=processor, batch_size=3, strict=True
    )


def test_it_prints_the_samples_and_writes_their_page(
    data: VLMDataModule, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "run" / "preview.html"
    assert print_preview(data, 4, "train", page)
    previews = data.preview(4)
    assert capsys.readouterr().out == f"{previews.text(color=False)}\n\npage: {page}\n"
    assert page.read_text(encoding="utf-8") == previews.html()


@pytest.mark.parametrize("packing", [False, True])
def test_samples_come_as_training_takes_them(data: VLMDataModule, packing: bool) -> None:
    data.packing = packing
    data.setup("fit")
    taken = [index for batch in data.train_plan().batches(Position()) for index in batch.indices]
    batch = next(iter(data.train_dataloader()))
    previews = data.preview(5)
    assert [preview.index for preview in previews] == taken[:5]
    assert [preview.source for preview in previews][: len(batch)] == batch.sources[:5]


def test_other_splits_and_other_samples(data: VLMDataModule, capsys: pytest.CaptureFixture[str]) -> None:
    assert [preview.index for preview in data.preview(3, "val")] == [0, 1, 2]
    assert print_preview(data, split="val", source="val.jsonl:4")
    printed = capsys.readouterr().out
    assert printed.startswith("val: 1 of 4 samples")
    assert "val.jsonl:4\n" in printed
    assert "page:" not in printed
    assert print_preview(data, indices=[12, 1])
    printed = capsys.readouterr().out
    assert printed.index("rows.jsonl:13") < printed.index("rows.jsonl:2")


def test_a_bad_sample_is_shown_and_reported(
    data: VLMDataModule, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "val.jsonl-1-0.png").write_bytes(b"no image")
    assert not print_preview(data, 3, "val")
    assert f"\n  ! {tmp_path / 'val.jsonl'}:2: image 'val.jsonl-1-0.png'" in capsys.readouterr().out


def test_a_split_without_files_is_an_error(data: VLMDataModule) -> None:
    with pytest.raises(DataError, match=r"data\.test: there are no test files"):
        print_preview(data, split="test")


def test_a_terminal_that_lacks_a_character_gets_its_number(
    data: VLMDataModule, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\u3053"}]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    train = VLMDataModule(train=str(write_rows([{"messages": turns}], "one.jsonl")), processor=data.processor)
    assert print_preview(train)
    sys.stdout.flush()
    assert rb"[[\u3053<|im_end|>]]" in written.getvalue()


def test_bad_rows_are_told_once(
    data: VLMDataModule,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the preview itself; a fit with the same data, which shows none, tells them in its log."""
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    file = write_rows([good, {"messages": []}, good], "bad.jsonl")
    own = VLMDataModule(train=str(file), processor=data.processor, max_bad_fraction=0.5)
    assert print_preview(own)
    printed = capsys.readouterr()
    sentence = "1 of 3 samples (33.3 %) cannot be used and will not be trained on"
    assert (printed.out + printed.err + caplog.text).count(sentence) == 1
    assert sentence in printed.out
    own.setup("fit")
    own.setup("fit")
    assert caplog.text.count(sentence) == 1
