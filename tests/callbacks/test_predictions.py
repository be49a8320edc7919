"""The prediction page: every kind of row, escaped, with what the model saw and heard."""

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
import wandb
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.predictions import (
    Prediction,
    PredictionTable,
    render_page,
    sample_frames,
    sample_images,
    sample_spectrograms,
)
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.data.preview_sound import draw_spectrogram
from lightning_vlm.media.image import image_pixels, resize_pixels
from lightning_vlm.media.video import Video
from tests.fixtures.media_files import media_rows
from tests.fixtures.media_samples import (
    ALL_MEDIA,
    frames,
    media_processor,
    picture,
    sample,
    sound,
    varied_samples,
    video,
)


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


# Videos and sounds


@pytest.fixture(scope="module")
def all_media() -> NemotronVLProcessor:
    return media_processor()


@pytest.mark.parametrize("collate", [PaddedCollate(0), PackedCollate()], ids=["padded", "packed"])
def test_each_row_has_its_own_media(all_media: NemotronVLProcessor, collate: Any) -> None:
    batch = collate(varied_samples(all_media))
    assert [len(sample_images(batch, row)) for row in range(5)] == [2, 0, 0, 1, 0]
    assert np.array_equal(np.asarray(sample_images(batch, 3)[0]), resized(picture(seed=8), 32, 32))
    shown = [sample_frames(batch, row, 2) for row in range(5)]
    assert [len(own) for own in shown] == [8, 0, 4, 0, 0]
    first = frames(5, seed=2)
    for image, number in zip(shown[0], (0, 2, 3, 4)):  # of six: the fifth is repeated
        assert np.array_equal(np.asarray(image), np.asarray(first[number]))
    for image, number in zip(shown[2], (0, 2, 3, 5)):
        assert np.array_equal(np.asarray(image), resized(frames(6, 40, 24, seed=7)[number], 32, 16))
    heard = [sample_spectrograms(batch, row) for row in range(5)]
    assert [len(own) for own in heard] == [1, 0, 0, 0, 1]
    samples = varied_samples(all_media)
    features, mask = samples[0].input_features, samples[0].input_features_mask
    assert features is not None
    assert mask is not None
    assert np.array_equal(np.asarray(heard[0][0]), np.asarray(draw_spectrogram(features[mask].numpy())))


def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    return resize_pixels(image_pixels(image), height, width).permute(1, 2, 0).numpy()


def test_batches_without_one_kind_of_media_have_none_of_it(all_media: NemotronVLProcessor) -> None:
    for said in (["text"], [sound()], [video(all_media, 4)], [picture()]):
        batch = PaddedCollate(0)([sample(all_media, *said)])
        found = [len(sample_images(batch, 0)), len(sample_frames(batch, 0, 2)), len(sample_spectrograms(batch, 0))]
        assert found == [isinstance(said[0], Image.Image), 4 * isinstance(said[0], Video), isinstance(said[0], Tensor)]


def test_large_frames_are_reduced_and_normalised_ones_left_out() -> None:
    processor = media_processor(video={"target_num_patches": 32 * 64})
    (first, *_) = sample_frames(PaddedCollate(0)([sample(processor, video(processor, 3, 256, 512))]), 0, 2)
    assert first.size == (128, 64)
    floats = media_processor(do_normalize=True)
    assert sample_frames(PaddedCollate(0)([sample(floats, video(floats, 3))]), 0, 2) == []


def test_pages_and_tables_show_all_media(
    write_rows: Callable[..., Path], all_media: NemotronVLProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1, **ALL_MEDIA)
    logger = WandbLogger(save_dir=tmp_path, project="p", offline=True)
    logged: list[Any] = []
    monkeypatch.setattr(logger, "log_table", lambda *args, **options: logged.append(options))
    trainer = L.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[PredictionTable()],
    )
    data = VLMDataModule(test=str(write_rows(media_rows(tmp_path))), processor=all_media, batch_size=5)
    trainer.test(NemotronVLModule(config=config, max_new_tokens=2), datamodule=data, verbose=False)
    wandb.finish()
    cells = re.findall("<td class=media>(.*?)</td>", (tmp_path / "predictions_test.html").read_text())
    assert [cell.count("<img") for cell in cells] == [4, 1, 1, 0, 9]
    assert [cell == "<i>text only</i>" for cell in cells] == [False, False, False, True, False]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
        for encoded in re.findall(r"base64,([\w+/=]+)", cells[0])
    ]
    for shown, number in zip(pictures, (0, 2, 3, 5), strict=True):
        assert np.array_equal(np.asarray(shown), np.asarray(frames(6)[number]))
    (table,) = logged
    sheets = [line[table["columns"].index("images")] for line in table["data"]]
    assert [None if sheet is None else sheet.image.size for sheet in sheets] == [
        (4 * 36 - 4, 32),
        (500, 96),
        (32, 32),
        None,
        (9 * 36 - 4, 32),
    ]
