"""The prediction page: every kind of row, escaped, with the images that the model saw."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.predictions import Prediction, PredictionTable, render_page, sample_images


def evaluate(
    files: list[Path], processor: NemotronVLProcessor, folder: Path, max_rows: int, batch_size: int = 3
) -> str:
    config = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    module = NemotronVLModule(config=config, max_new_tokens=2)
    data = VLMDataModule(test=[str(file) for file in files], processor=processor, batch_size=batch_size)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[PredictionTable(max_rows=max_rows)],
    )
    trainer.test(module, datamodule=data, verbose=False)
    return (folder / "predictions_test.html").read_text()


def test_page_takes_turns_between_files(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    files = [make_task(9, "long.jsonl"), make_task(2, "short.jsonl")]
    page = evaluate(files, processor, tmp_path, max_rows=6)
    shown = re.findall(r"<small>.*/(\w+\.jsonl:\d+)</small>", page)
    assert shown == ["long.jsonl:1", "short.jsonl:1", "long.jsonl:2", "short.jsonl:2", "long.jsonl:3", "long.jsonl:4"]


def test_page_does_not_depend_on_the_batch_size(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    files = [make_task(5)]
    shown = [
        re.findall(r"<small>(.*)</small>", evaluate(files, processor, tmp_path, max_rows=4, batch_size=size))
        for size in (1, 5)
    ]
    assert shown[0] == shown[1]


def test_images_are_what_the_model_saw(
    write_rows: Callable[..., Path], write_image: Callable[..., str], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    sizes = [(32, 16), (16, 32), (48, 32)]  # multiples of the patch and merge size: not resized
    names = [write_image(f"{width}x{height}.png", width, height, width) for width, height in sizes]
    rows: list[Any] = [
        {"images": names[:2], "messages": [{"role": "user", "content": "<image><image>"}, answer("a")]},
        {"messages": [{"role": "user", "content": "no image"}, answer("b")]},
        {"images": names[2:], "messages": [{"role": "user", "content": "<image>"}, answer("c")]},
    ]
    data = VLMDataModule(test=str(write_rows(rows)), processor=processor, batch_size=3)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert [len(sample_images(batch, row)) for row in range(3)] == [2, 0, 1]
    shown = [*sample_images(batch, 0), *sample_images(batch, 2)]
    for name, image in zip(names, shown, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / name)))


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_text_is_escaped_and_scores_are_shown() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    rows = [
        Prediction("f:1", "<script>alert(1)</script>", ("yes",), "<b>no", {"exact_match": 0.0, "anls": 0.25}, (image,)),
        Prediction("f:2", "plain", ("yes",), "yes", {"exact_match": 1.0, "anls": 1.0}, ()),
    ]
    page = render_page(rows, "a <title>")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt;title&gt;" in page
    assert "exact_match 0.500, anls 0.625" in page
    assert page.count("class=wrong") == page.count("class=right") == 1
    (encoded,) = re.findall(r"base64,([\w+/=]+)", page)
    shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert shown.getpixel((3, 3)) == (255, 0, 0)


def test_max_rows_is_checked() -> None:
    with pytest.raises(ValueError, match="max_rows is 0; expected at least 1"):
        PredictionTable(max_rows=0)
