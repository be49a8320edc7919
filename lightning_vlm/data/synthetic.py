"""The demo's data: 1,797 scans of handwritten digits (scikit-learn's copy of the UCI set) cut into five kinds of rows.

    digit     read one digit                        image 32 x 32
    row       read two to five digits in one image   64 x 32 to 160 x 32: resolutions and lengths differ
    compare   two images: which is larger            two images in one conversation
    text      a question without an image            text-only samples in the same batches
    two_turn  read the digit, then is it even        two trained turns

Real scans of 43 writers, small enough for a laptop. Each scan is in exactly one of train, val and heldout.

    python -m lightning_vlm.data.synthetic data/digits
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lightning_vlm.processing.tiny import tiny_processor

SIDE = 32
"""Side of one rendered digit, in pixels."""

ROWS_PER_KIND: dict[str, dict[str, int]] = {
    "train": {"digit": 1397, "row": 1300, "compare": 1300, "text": 300, "two_turn": 400},
    "val": {"digit": 60, "row": 20, "compare": 20, "text": 10, "two_turn": 10},
    "heldout": {"digit": 300, "row": 80, "compare": 80, "text": 40, "two_turn": 40},
}
_SCANS = {"train": 1397, "val": 100, "heldout": 300}


@dataclass(frozen=True)
class Scans:
    """Scans of one split.

    Attributes:
        pixels: ``(N, 8, 8)`` ink in 0..16.
        digits: ``(N,)`` what each shows.
    """

    pixels: np.ndarray
    digits: np.ndarray

    def __len__(self) -> int:
        return len(self.digits)

    def image(self, *indices: int) -> Image.Image:
        """Scans side by side as dark ink on white, ``SIDE`` pixels high."""
        ink = np.concatenate([self.pixels[index] for index in indices], axis=1)
        paper = (255 - ink / 16 * 255).astype(np.uint8)
        return Image.fromarray(paper).resize((SIDE * len(indices), SIDE), Image.Resampling.BICUBIC).convert("RGB")


Row = tuple[dict[str, Any], list[Image.Image]]


def write_digits(folder: Path, seed: int = 0, progress: bool = True) -> None:
    """Writes the demo's JSONL files, images, and a processor and config for a tiny model.

    Args:
        folder: Receives ``train``, ``val``, ``heldout`` and ``model``.
        seed: Of the split and the mixture.
        progress: Show a progress bar.
    """
    splits = split_scans(seed)
    bar = tqdm(total=sum(sum(kinds.values()) for kinds in ROWS_PER_KIND.values()), disable=not progress, desc="rows")
    for split, kinds in ROWS_PER_KIND.items():
        images = folder / split / "images"
        images.mkdir(parents=True, exist_ok=True)
        for number, (kind, count) in enumerate(kinds.items()):
            generator = np.random.default_rng([seed, len(split), number])
            with (folder / split / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
                for index, (row, pictures) in enumerate(make_rows(kind, count, splits[split], generator)):
                    names = [f"images/{kind}-{index:04d}-{position}.png" for position in range(len(pictures))]
                    for name, picture in zip(names, pictures):
                        picture.save(folder / split / name)
                    file.write(json.dumps({**row, "images": names} if names else row) + "\n")
                    bar.update()
    bar.close()
    processor = tiny_processor()
    processor.save_pretrained(folder / "model")
    _write_config(folder / "model")


def split_scans(seed: int = 0) -> dict[str, Scans]:
    """The scans of each split, disjoint, together all 1,797.

    Args:
        seed: Of the split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    ends = np.cumsum(list(_SCANS.values()))
    parts = np.split(order, ends[:-1])
    return {name: Scans(data.images[part], data.target[part]) for name, part in zip(_SCANS, parts)}


def make_rows(kind: str, count: int, scans: Scans, generator: np.random.Generator) -> Iterator[Row]:
    """Rows of one kind with their images.

    Args:
        kind: One of the five kinds.
        count: Number of rows; ``digit`` uses each scan once before it repeats one.
        scans: The split's scans.
        generator: Source of chance.
    """
    for index in range(count):
        yield _KINDS[kind](index, scans, generator)


def _digit(index: int, scans: Scans, generator: np.random.Generator) -> Row:
    scan = index % len(scans)
    return _llava("<image>\nWhich digit is this?", str(scans.digits[scan])), [scans.image(scan)]


def _row(index: int, scans: Scans, generator: np.random.Generator) -> Row:
    chosen = generator.integers(len(scans), size=generator.integers(2, 6))
    answer = "".join(str(scans.digits[scan]) for scan in chosen)
    return _llava("<image>\nRead the digits.", answer), [scans.image(*chosen)]


def _compare(index: int, scans: Scans, generator: np.random.Generator) -> Row:
    first = second = int(generator.integers(len(scans)))
    while scans.digits[first] == scans.digits[second]:
        second = int(generator.integers(len(scans)))
    answer = "first" if scans.digits[first] > scans.digits[second] else "second"
    user = [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "Which is larger?"},
    ]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages}, [scans.image(first), scans.image(second)]


def _text(index: int, scans: Scans, generator: np.random.Generator) -> Row:
    digits = "".join(str(digit) for digit in generator.integers(10, size=generator.integers(2, 6)))
    messages = [
        {"role": "user", "content": f"What is the last digit of {digits}?"},
        {"role": "assistant", "content": digits[-1]},
    ]
    return {"messages": messages}, []


def _two_turn(index: int, scans: Scans, generator: np.random.Generator) -> Row:
    scan = int(generator.integers(len(scans)))
    digit = int(scans.digits[scan])
    row = _llava("<image>\nWhich digit is this?", str(digit))
    row["conversations"] += [
        {"from": "human", "value": "Is it even or odd?"},
        {"from": "gpt", "value": "odd" if digit % 2 else "even"},
    ]
    return row, [scans.image(scan)]


def _llava(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


_KINDS: dict[str, Callable[[int, Scans, np.random.Generator], Row]] = {
    "digit": _digit,
    "row": _row,
    "compare": _compare,
    "text": _text,
    "two_turn": _two_turn,
}


def _write_config(folder: Path) -> None:
    from lightning_vlm.models.config import NemotronVLConfig

    NemotronVLConfig.tiny().save_pretrained(folder)


def main() -> None:
    """Writes the demo's data into the folder given on the command line."""
    parser = argparse.ArgumentParser(description="Write the digits demo: JSONL, images, and a tiny model's folder.")
    parser.add_argument("folder", type=Path, help="where to write, e.g. data/digits")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and the mixture")
    arguments = parser.parse_args()
    write_digits(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
