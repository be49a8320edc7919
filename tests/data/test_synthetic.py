"""The demo's data: real scans, each in one split, answers that are true, sizes that differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_vlm import NemotronVLConfig, NemotronVLProcessor
from lightning_vlm.data.synthetic import ROWS_PER_KIND, SIDE, make_rows, split_scans, write_digits
from lightning_vlm.sources.open import open_sources


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, progress=False)
    return folder


def test_a_scan_is_in_one_split_only() -> None:
    from sklearn.datasets import load_digits

    splits = split_scans()
    assert sum(len(scans) for scans in splits.values()) == 1797
    as_bytes = {name: [pixels.tobytes() for pixels in scans.pixels] for name, scans in splits.items()}
    everything = sorted(scan for scans in as_bytes.values() for scan in scans)
    assert everything == sorted(pixels.tobytes() for pixels in load_digits().images)
    for name, scans in as_bytes.items():
        others = {scan for other, rest in as_bytes.items() if other != name for scan in rest}
        assert not others & set(scans), "the scans of a split, by their pixels"


def test_every_split_shows_every_digit() -> None:
    for scans in split_scans().values():
        assert set(scans.digits) == set(range(10))


def test_a_row_shows_the_digits_that_it_says() -> None:
    scans = split_scans()["heldout"]
    shown = {scans.image(index).tobytes(): str(scans.digits[index]) for index in range(len(scans))}

    def read(image: Image.Image) -> str:
        cells = [image.crop((left, 0, left + SIDE, SIDE)) for left in range(0, image.width, SIDE)]
        return "".join(nearest(cell, shown) for cell in cells)

    generator = np.random.default_rng(0)
    for row, images in make_rows("digit", 20, scans, generator):
        assert row["conversations"][1]["value"] == read(images[0])
    for row, images in make_rows("row", 20, scans, generator):
        assert row["conversations"][1]["value"] == read(images[0])
    for row, images in make_rows("compare", 20, scans, generator):
        first, second = (int(read(image)) for image in images)
        assert first != second
        assert row["messages"][1]["content"] == ("first" if first > second else "second")
    for row, images in make_rows("two_turn", 20, scans, generator):
        digit = read(images[0])
        assert [turn["value"] for turn in row["conversations"][1::2]] == [digit, "odd" if int(digit) % 2 else "even"]
    for row, images in make_rows("text", 20, scans, generator):
        assert not images
        assert row["messages"][0]["content"].rstrip("?")[-1] == row["messages"][1]["content"]


def nearest(cell: Image.Image, shown: dict[bytes, str]) -> str:
    """The digit of the closest scan: neighbours in a row blur its edges a little."""
    pixels = np.asarray(cell, dtype=float)
    return min(
        shown.items(),
        key=lambda item: np.abs(np.frombuffer(item[0], np.uint8).reshape(SIDE, SIDE, 3) - pixels).sum(),
    )[1]


def test_files_hold_the_mixture_and_parse(digits: Path) -> None:
    for split, kinds in ROWS_PER_KIND.items():
        sources = open_sources([digits / split / f"{kind}.jsonl" for kind in kinds])
        assert [len(source) for source in sources] == list(kinds.values())


def test_image_sizes_differ(digits: Path) -> None:
    widths = {Image.open(path).size for path in (digits / "heldout" / "images").glob("row-*.png")}
    assert widths == {(SIDE * count, SIDE) for count in (2, 3, 4, 5)}


def test_writing_twice_gives_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    write_digits(tmp_path, progress=False)
    for path in sorted(digits.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(digits)).read_bytes(), path.name


def test_the_model_folder_loads(digits: Path) -> None:
    processor = NemotronVLProcessor.from_pretrained(digits / "model")
    config = NemotronVLConfig.from_pretrained(digits / "model")
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.vocab_size == len(processor.tokenizer)
    assert config.vision_config.patch_size == processor.geometry.patch_size
    assert config.merge_size == processor.geometry.merge_size
    assert config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    assert json.loads((digits / "model" / "config.json").read_text())["model_type"] == "nemotron_vl"
