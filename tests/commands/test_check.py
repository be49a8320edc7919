"""``check``: everything that is wrong is told, by kind, with its place, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.cli import main
from lightning_vlm.commands.check import check_data
from lightning_vlm.data import lengths
from lightning_vlm.schema import DataError
from tests.fixtures.media_files import media_rows
from tests.fixtures.media_samples import media_processor

BOT = {"role": "assistant", "content": "ho"}


def asking(image: str, **others: Any) -> dict[str, Any]:
    return {"image": image, "messages": [{"role": "user", "content": "<image>what?"}, BOT], **others}


@pytest.fixture
def broken(
    write_rows: Callable[..., Path], write_image: Callable[..., str], processor: NemotronVLProcessor, tmp_path: Path
) -> VLMDataModule:
    """Ten rows, of which headers show four to be bad and decoding a fifth; and a file that is not there."""
    pixels = tmp_path / write_image("pixels.png")
    content = bytearray(pixels.read_bytes())
    content[60] ^= 0xFF
    pixels.write_bytes(content)
    (tmp_path / "text.png").write_text("no image")
    rows = [asking(write_image(f"{index}.png", seed=index)) for index in range(4)]
    rows += [asking("absent.png"), asking("gone.png"), asking("text.png"), asking("pixels.png")]
    rows += [
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"image": "0.png", "messages": [{"role": "user", "content": "q"}, BOT]},
    ]
    train = write_rows(rows, "train.jsonl")
    val = [str(write_rows([asking("0.png")], "val.jsonl")), str(tmp_path / "nowhere.jsonl")]
    return VLMDataModule(train=str(train), val=val, processor=processor, cache_dir=str(tmp_path / "cache"))


def test_the_report_names_everything(broken: VLMDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data(broken, examples=1) is False
    printed = capsys.readouterr().out
    train, val = printed.split("\nval ")
    lines = train.splitlines()
    assert lines[0].split() == ["train", "rows", "bad", "images", "tokens"]
    assert lines[1].split()[1:4] == ["10", "4", "6"]
    assert "images: 6 in 6 of 10 samples" in train
    assert "notes: in 1 rows the only image was placed before the first user turn" in train
    assert "missing file: 2\n" in train
    assert f"  {tmp_path / 'train.jsonl'}:5: image 'absent.png' does not exist" in train
    assert "  ... and 1 more" in train
    assert "gone.png" not in train, "one example each"
    assert "not an image: 1\n" in train
    assert "unknown role: 1\n" in train
    assert train.index("missing file") < train.index("not an image"), "the most frequent first"
    assert "nowhere.jsonl: the file does not exist" in val
    assert printed.splitlines()[-1] == "5 error(s) in 11 samples"


def test_decoding_finds_what_headers_do_not_show_and_a_fit_reads_it(
    broken: VLMDataModule, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.files["val"] = broken.splits["val"].files = []
    check_data(broken, as_json=True)
    before = json.loads(capsys.readouterr().out)["splits"]["train"]
    check_data(broken, decode=True, as_json=True)
    after = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert before["sources"][0]["bad"] == 4
    assert after["sources"][0]["bad"] == 5
    assert set(after["errors"]) - set(before["errors"]) == {"damaged image"}
    monkeypatch.setattr(lengths, "pass_over", None)
    fit = VLMDataModule(train=broken.files["train"], processor=broken.processor, packing=True, max_bad_fraction=0.5,
                        cache_dir=broken.cache_dir)  # fmt: skip
    fit.setup("fit")
    assert sorted(fit.known_bad("train")) == [4, 5, 6, 7, 8]


def test_what_was_put_right_is_good_and_what_broke_since_is_not(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = VLMDataModule(train=str(make_task(8)), processor=processor, packing=True, max_bad_fraction=0.5,
                         cache_dir=str(tmp_path / "cache"))  # fmt: skip
    image = next(tmp_path.glob("rows.jsonl-*.png"))
    content = image.read_bytes()
    image.unlink()
    assert check_data(data) is False
    data.setup("fit")
    assert len(data.known_bad("train")) == 1
    image.write_bytes(content)
    again = VLMDataModule(train=data.files["train"], processor=processor, packing=True, cache_dir=data.cache_dir)
    again.setup("fit")
    assert again.known_bad("train") == {}
    assert check_data(again) is True
    image.write_text("no image")
    assert check_data(again) is False
    assert "not an image: 1" in capsys.readouterr().out


def test_checking_opens_nothing_for_a_fit(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    data = VLMDataModule(train=[str(make_task(4)), str(tmp_path / "absent.jsonl")], processor=processor)
    assert check_data(data) is False
    with pytest.raises(DataError, match=r"absent.jsonl: the file does not exist"):
        data.setup("fit")


def test_what_is_too_long_is_told(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    data = VLMDataModule(train=str(make_task(8)), processor=processor, max_tokens=60)
    assert check_data(data, examples=1) is False
    printed = capsys.readouterr().out
    assert "too long: " in printed
    assert "vision patches, expected at most 60 tokens; raise the limit" in printed
    with pytest.raises(DataError, match=r"samples \(.* %\) exceed"):
        data.setup("fit")


def test_for_machines_all_errors_are_there(
    broken: VLMDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_data(broken, as_json=True, examples=1) is False
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    missing = found["splits"]["train"]["errors"]["missing file"]
    assert [error["source"] for error in missing] == [f"{tmp_path / 'train.jsonl'}:{line}" for line in (5, 6)]
    assert set(missing[0]) == {"source", "problem", "fix"}
    assert found["splits"]["train"]["sources"][0]["tokens"] > 0
    assert found["splits"]["val"]["errors"]["missing file"][0]["source"].endswith("nowhere.jsonl")


def test_good_data_ends_well(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_data(VLMDataModule(train=str(make_task(8)), processor=processor)) is True
    assert capsys.readouterr().out.splitlines()[-1] == "all 8 samples can be used"


def test_data_without_images_is_asked_about(
    write_rows: Callable[..., Path], processor: NemotronVLProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, BOT]}]
    assert check_data(VLMDataModule(train=str(write_rows(rows)), processor=processor)) is True
    assert "images: 0 in 0 of 1 samples; is that meant?" in capsys.readouterr().out


@pytest.mark.parametrize("decode", [False, True])
def test_videos_and_sounds_are_counted(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], decode: bool
) -> None:
    rows = media_rows(tmp_path)
    data = VLMDataModule(
        train=str(write_rows(rows)), val=str(write_rows(rows[1:2], "val.jsonl")), processor=media_processor()
    )
    assert check_data(data, decode)
    train, val, _ = capsys.readouterr().out.split("\n\n")
    heading, counts, *sentences = train.splitlines()
    tokens = sum(len(data.dataset_to_check("train")[0][index]) for index in range(5))
    assert heading.split() == ["train", "rows", "bad", "images", "videos", "sounds", "tokens"]
    assert counts.split()[1:] == ["5", "0", "2", "3", "1", str(tokens)]
    assert heading.index("tokens") == counts.index(str(tokens)) + len(str(tokens)) - len("tokens"), "in one column"
    assert sentences == ["images: 2 in 2 of 5 samples", "videos: 3 in 2 of 5 samples", "sounds: 1 in 1 of 5 samples"]
    heading, counts, *sentences = val.splitlines()
    assert heading.split() == ["val", "rows", "bad", "sounds", "tokens"], "no column of what there is none of"
    assert counts.split()[1:-1] == ["1", "0", "1"]
    assert sentences == ["sounds: 1 in 1 of 1 samples"]
    check_data(data, decode, as_json=True)
    (source,) = json.loads(capsys.readouterr().out)["splits"]["train"]["sources"]
    names = ("images", "videos", "sounds")
    assert [source[name] for name in names] == [2, 3, 1]
    assert [source[f"with_{name}"] for name in names] == [2, 2, 1]


def test_videos_and_sounds_are_counted_for_another_familys_processor(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_data(VLMDataModule(train=str(write_rows(media_rows(tmp_path)))))
    heading, counts, *_ = capsys.readouterr().out.splitlines()
    assert heading.split() == ["train", "rows", "bad", "images", "videos", "sounds", "tokens"]
    assert counts.split()[1:] == ["5", "0", "2", "3", "1", "-"]


def test_nothing_to_check_is_no_success(processor: NemotronVLProcessor, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data(VLMDataModule(processor=processor)) is False
    assert capsys.readouterr().out == "there are no files to check; set data.train\n"


def test_another_familys_processor_has_rows_and_media_checked(
    broken: VLMDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    broken._processor = None
    assert check_data(broken, as_json=True) is False
    train = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert train["sources"][0]["tokens"] is None
    assert train["sources"][0]["bad"] == 4


def test_the_command_line(
    make_task: Callable[..., Path],
    processor: NemotronVLProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    processor.save_pretrained("model")
    make_task(6, "train.jsonl")
    arguments = ["check", "--data.train", "train.jsonl", "--data.processor", "model"]
    assert main(arguments) == 0
    assert "all 6 samples can be used" in capsys.readouterr().out
    next(Path().glob("train.jsonl-*.png")).unlink()
    assert main([*arguments, "--decode", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
