"""The two small tasks: rows whose answers can be seen or heard, and a folder of a model that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_vlm import NemotronVLConfig, VLMDataModule
from lightning_vlm.data import synthetic_media
from lightning_vlm.data.synthetic import split_scans
from lightning_vlm.data.synthetic_media import BEEP_S, FRAMES_PER_DIGIT, RATE_HZ, beeps, write_beeps, write_videos


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": 6, "val": 2, "heldout": 2}
    monkeypatch.setattr(synthetic_media, "ROWS", {"videos": rows, "beeps": rows})


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("few_rows")
def test_the_answer_of_a_video_is_what_its_frames_show(tmp_path: Path) -> None:
    write_videos(tmp_path, progress=False)
    scans = split_scans()
    for split in ("train", "val", "heldout"):
        for row in rows_of(tmp_path / split / "rows.jsonl"):
            frames = row["messages"][0]["content"][0]["video"]
            assert all((tmp_path / split / frame).exists() for frame in frames)
            shown = [int(Path(frame).stem) for frame in frames]
            held = [shown[start : start + FRAMES_PER_DIGIT] for start in range(0, len(shown), FRAMES_PER_DIGIT)]
            assert all(len(set(frames)) == 1 for frames in held)
            answer = row["messages"][1]["content"]
            assert answer == "".join(str(scans[split].digits[frames[0]]) for frames in held)
            assert 1 <= len(answer) <= 3


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_sound_has_so_many_beeps(count: int) -> None:
    for seed in range(20):
        sound = beeps(count, np.random.default_rng(seed))
        window = round(0.01 * RATE_HZ)
        loud = np.abs(sound[: len(sound) // window * window]).reshape(-1, window).max(axis=1) > 0.25
        starts = int((np.diff(np.r_[False, loud].astype(int)) == 1).sum())
        assert starts == count
        assert abs(loud.sum() * 0.01 - count * BEEP_S) <= 0.02 * count


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(("write", "kind"), [(write_videos, "videos"), (write_beeps, "clips of sound")])
def test_the_folder_trains_what_is_written_beside_it(tmp_path: Path, write, kind: str) -> None:
    write(tmp_path, progress=False)
    data = VLMDataModule(
        train=str(tmp_path / "train/rows.jsonl"),
        processor=str(tmp_path / "model"),
        batch_size=2,
        cache_dir=str(tmp_path),
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert f"2 {kind}" in repr(batch)
    config = NemotronVLConfig.from_pretrained(tmp_path / "model")
    assert int(batch.input_ids.max()) < config.text_config.vocab_size


@pytest.mark.usefixtures("few_rows")
def test_the_same_seed_writes_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_beeps(tmp_path / name, seed=3, progress=False)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
