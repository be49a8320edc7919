"""A plan in numbers, text and a picture: every number against one counted the long way from the same samples."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.data.batching import PATCH_COST, FixedBatches
from lightning_vlm.data.packing import PackBudget
from lightning_vlm.schema import DataError, VLMBatch
from tests.fixtures.media_files import media_rows
from tests.fixtures.media_samples import media_processor

PACKED = {"packing": True, "batch_tokens": 130, "batch_patches": 40}
DROPPED = {"packing": True, "max_tokens": 67, "overlong": "drop", "batch_size": 2}


@pytest.fixture
def make_data(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> Callable[..., VLMDataModule]:
    """Two files, of 13 and 8 rows."""
    files = [str(make_task(13)), str(make_task(8, "others.jsonl"))]

    def make(**options: Any) -> VLMDataModule:
        data = VLMDataModule(train=files, processor=processor, **{"batch_size": 3, **options})
        data.setup("fit")
        return data

    return make


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "length_grouped"},
        {"sampler": "token_budget", "batch_tokens": 300},
        {"collate": "packed"},
        PACKED,
        DROPPED,
    ],
    ids=str,
)
def test_numbers_are_those_of_the_real_batches(
    make_data: Callable[..., VLMDataModule], options: dict[str, Any], world_size: int
) -> None:
    data = make_data(**options)
    found = data.summary(world_size)
    assert found.world_size == world_size
    assert found.packed == (options.get("packing", False) or "collate" in options)
    dataset, dropped = data._data_plan("train").dataset, data.num_dropped
    kept = []
    for index in range(21):
        with contextlib.suppress(DataError):  # a dropped one is too long
            kept.append(dataset[index])
    tokens = {sample.source: len(sample) for sample in kept}
    assert len(kept) == 21 - dropped == len(found.tokens)
    assert (found.dropped, found.scaled) == (dropped, 0)
    assert sorted(found.tokens.tolist()) == sorted(tokens.values())

    ranks = [list(rank_batches(data, world_size, rank)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {found.steps}
    real = [batch for batches in ranks for batch in batches if batch.counted.all()]
    assert len(real) == found.num_batches == len(found.batch_tokens)
    assert sorted(found.batch_tokens.tolist()) == sorted(batch.num_tokens for batch in real)
    assert found.computed_tokens == sum(batch.input_ids.numel() for batch in real)
    assert int(found.batch_tokens.sum()) == sum(tokens.values())

    for summary, source in zip(found.sources, dataset.sources):
        own = [sample for sample in kept if sample.source.startswith(f"{source.path}:")]
        images = sum(0 if sample.image_grid_hw is None else len(sample.image_grid_hw) for sample in own)
        assert (summary.path, summary.samples) == (str(source.path), len(own))
        assert (summary.tokens, summary.images) == (sum(map(len, own)), images)

    def size(batch: VLMBatch) -> tuple[int, int]:
        return batch.num_tokens, 0 if batch.pixel_values is None else len(batch.pixel_values)

    largest = sorted(map(size, real), reverse=True)[:5]
    assert [(batch.tokens, batch.patches) for batch in found.largest] == largest
    for summary in found.largest:
        (same, *_) = [batch for batch in real if summary.longest in batch.sources]
        assert size(same) == (summary.tokens, summary.patches)
        assert summary.samples == len(same)
        assert tokens[summary.longest] == max(tokens[source] for source in same.sources)

    budget = data._data_plan("train").budget
    capacity = found.computed_tokens if budget is None else budget.tokens * len(real)
    assert found.fill == pytest.approx(sum(tokens.values()) / capacity)
    lengths = np.array([len(sample) for sample in kept])
    random = FixedBatches(len(kept), data.batch_size).batches(0, world_size)
    assert found.padded_tokens == sum(len(batch) * lengths[batch].max() for batch in random)


def rank_batches(data: VLMDataModule, world_size: int, rank: int) -> Any:
    """The first epoch's batches of a rank, by a loader like those of a run on so many ranks."""
    loader = data.train_dataloader()
    object.__setattr__(loader.plan, "world_size", world_size)
    loader.rank = rank
    return loader


def test_balance_is_the_costliest_rank_of_a_step_over_its_mean(make_data: Callable[..., VLMDataModule]) -> None:
    data = make_data(batch_size=5)  # two whole steps of two ranks, and one sample
    plan, found = data._data_plan("train"), data.summary(2)
    table = data.summary(1)
    batches = plan.batcher.batches(0, 2)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 1]
    lengths = {index: len(plan.dataset[index]) for index in range(21)}
    patches = {i: len(p) if (p := plan.dataset[i].pixel_values) is not None else 0 for i in range(21)}
    cost = [sum(lengths[i] + PATCH_COST * patches[i] for i in batch.tolist()) for batch in batches]
    over = [max(pair) / (sum(pair) / 2) for pair in (cost[:2], cost[2:4])]
    assert found.imbalance == pytest.approx((max(over), sum(over) / 2))
    assert max(over) > 1.01
    assert table.imbalance == (1.0, 1.0), "one rank is its own mean"
    assert data.summary(64).imbalance == (1.0, 1.0), "no whole step"


def test_headlines(make_data: Callable[..., VLMDataModule]) -> None:
    number = r"[\d,]+"
    packed = make_data(**PACKED).summary(1)
    assert re.fullmatch(
        rf"21 samples, {number} tokens in {packed.num_batches} packs of at most 130 tokens, \d+\.\d % full; "
        rf"-?\d+\.\d % fewer tokens to compute than padded batches",
        packed.headline(),
    )
    saved = 100 * (1 - packed.computed_tokens / packed.padded_tokens)
    assert f"{100 * packed.fill:.1f} % full; {saved:.1f} % fewer" in packed.headline()
    assert f"{saved:.1f} % fewer" in packed.headline()
    assert saved > 5
    assert "in 7 packed rows; " in make_data(collate="packed").summary(1).headline()
    assert "in 7 batches; 0.0 % fewer tokens" in make_data().summary(1).headline()


def test_text_names_everything(make_data: Callable[..., VLMDataModule]) -> None:
    data = make_data(**DROPPED, batch_patches=32)
    found = data.summary(4)
    lines = found.text().splitlines()
    values = {line[:10].strip(): line[10:] for line in lines[:8]}
    assert values["samples"] == f"{21 - data.num_dropped} ({data.num_dropped} dropped)"
    assert values["tokens"] == f"{int(found.tokens.sum()):,} (longest {found.tokens.max()})"
    assert values["images"] == str(sum(source.images for source in found.sources))
    assert found.budget is not None
    assert values["packs"] == f"{found.num_batches} of at most {found.budget.tokens} tokens and 32 patches"
    assert values["fill"] == f"{100 * found.fill:.2f} %"
    assert values["steps"] == f"{math.ceil(found.num_batches / 4)} micro-batches per epoch on each of 4 rank(s)"
    assert values["balance"].startswith(f"costliest rank at most {found.imbalance[0]:.3f} of a step's mean (")
    assert [line.split()[1:] for line in lines if "rows.jsonl " in line or "others.jsonl " in line] == [
        [f"{s.samples}", f"{s.tokens}", f"{s.images}"] for s in found.sources
    ]
    assert sum(line.endswith(tuple(batch.longest for batch in found.largest)) for line in lines) == 5
    assert max(map(len, lines[:13])) <= 120
    assert "batches" in make_data().summary(1).text()
    assert "of a fixed number of samples" in make_data().summary(1).text()


def test_scaled_images_are_told(make_data: Callable[..., VLMDataModule]) -> None:
    found = make_data(packing=True, max_tokens=98, overlong="downscale_images").summary(1)
    assert found.scaled > 0
    assert f"21 ({found.scaled} made smaller)" in found.text()
    assert int(found.tokens.max()) <= 98


@pytest.mark.parametrize("options", [{}, PACKED], ids=["batches", "packs"])
def test_the_picture_is_drawn(make_data: Callable[..., VLMDataModule], tmp_path: Path, options: dict[str, Any]) -> None:
    make_data(**options).summary(1).draw(tmp_path / "new" / "plan.png")
    with Image.open(tmp_path / "new" / "plan.png") as image:
        assert image.format == "PNG"
        assert image.size == (1080, 384)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20, "not a blank page"


def test_budget_is_told_without_patches(make_data: Callable[..., VLMDataModule]) -> None:
    found = make_data(packing=True, batch_tokens=150).summary(1)
    assert found.budget == PackBudget(150)
    assert f"{found.num_batches} of at most 150 tokens\n" in found.text()


def test_videos_and_sounds_are_counted(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = media_rows(tmp_path)
    files = [str(write_rows(rows)), str(write_rows([rows[0], rows[3]], "films.jsonl"))]
    data = VLMDataModule(train=files, processor=media_processor(), packing=True)
    data.setup("fit")
    found = data.summary(1)
    assert [(source.images, source.videos, source.sounds) for source in found.sources] == [(2, 3, 1), (0, 1, 0)]
    lines = found.text().splitlines()
    assert [line.split() for line in lines[2:5]] == [["images", "2"], ["videos", "4"], ["sounds", "1"]]
    heading, *sources = lines[lines.index("") + 1 :][:3]
    assert heading.split() == ["source", "samples", "tokens", "images", "videos", "sounds"]
    assert [line.split()[3:] for line in sources] == [["2", "3", "1"], ["0", "1", "0"]]
    assert len({len(line) for line in (heading, *sources)}) == 1, "in columns"

    data = VLMDataModule(train=files[1], processor=media_processor())
    data.setup("fit")
    lines = data.summary(1).text().splitlines()
    assert lines[2] == "videos    1"
    assert "images" not in data.summary(1).text()
