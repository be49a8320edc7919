"""Media in rows: how long they may be, and how fast a row wants its video to be seen; the same in a check and a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from lightning_vlm import VLMDataModule
from lightning_vlm.data.checking import check_samples
from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.examples import ExampleDataset
from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.schema import DataError
from lightning_vlm.sources.open import open_sources
from tests.fixtures.media_files import media_rows, write_film
from tests.fixtures.media_samples import frames, media_processor

LIMITED = {"video": ({"max_video_frames": 8}, 9, 8), "sound": ({"max_audio_s": 0.5}, 0.51, 0.5)}
WORDS = {
    "video": "gives 9 frames, expected at most max_video_frames = 8; take fewer (data.processor_options.video: "
    "num_frames, fps), or raise data.max_video_frames.",
    "sound": "lasts 0.5 s, expected at most max_audio_s = 0.5; cut the sound or raise data.max_audio_s.",
}


def row(*media: dict[str, Any], answer: str = "a") -> dict[str, Any]:
    user = [*media, {"type": "text", "text": "?"}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def medium(folder: Path, kind: str, size: Any, form: str = "file") -> dict[str, Any]:
    """A row's part: a video of so many frames, or a sound of so many seconds."""
    if kind == "sound":
        soundfile.write(folder / f"{size}.wav", np.zeros(round(16_000 * size), np.float32), 16_000)
        return {"type": "audio", "audio": f"{size}.wav"}
    if form == "file":
        write_film(folder / f"{size}.mp4", size, rate=1)  # so slow that all of it is taken
        return {"type": "video", "video": f"{size}.mp4"}
    for number, image in enumerate(frames(size)):
        image.save(folder / f"{number}.png")
    return {"type": "video", "video": [f"{number}.png" for number in range(size)]}


@pytest.mark.parametrize(("kind", "form"), [("video", "file"), ("video", "frames"), ("sound", "file")])
@pytest.mark.parametrize("ours", [True, False])
def test_a_check_of_headers_and_a_run_refuse_the_same(
    write_rows: Callable[..., Path], tmp_path: Path, kind: str, form: str, ours: bool
) -> None:
    options, above, most = LIMITED[kind]
    processor: Any = media_processor(video={"num_frames": 100, "fps": None})
    path = write_rows([row(medium(tmp_path, kind, size, form)) for size in (above, most)])
    data = VLMDataModule(train=str(path), processor=processor if ours else SimpleNamespace(), **options)
    source = open_sources([str(path)], True)
    dataset = (SampleDataset if ours else ExampleDataset)(source, data.processor if ours else None, data.media)
    with pytest.raises(DataError) as trained:
        dataset[0]
    (checked,) = check_samples("train", dataset, cache_dir=tmp_path / "cache", show_progress=False).errors
    assert str(checked) == str(trained.value)
    assert WORDS[kind] in str(checked)
    assert isinstance(checked, MediaError)
    assert dataset[1]


@pytest.mark.parametrize(
    ("limits", "bad"), [({}, []), ({"max_video_frames": 8}, [0]), ({"max_video_frames": 8, "max_audio_s": 0.5}, [0, 1])]
)
def test_limits_can_be_set_where_they_are_named(
    write_rows: Callable[..., Path], tmp_path: Path, limits: dict[str, Any], bad: list[int]
) -> None:
    path = write_rows([*(row(medium(tmp_path, kind, above)) for kind, (_, above, _) in LIMITED.items()), row()])
    options: dict[str, Any] = {"processor": media_processor(), "verify": "headers", "max_bad_fraction": 1.0}
    data = VLMDataModule(train=str(path), cache_dir=str(tmp_path / "cache"), **options, **limits)
    data.setup("fit")
    assert list(data.known_bad("train")) == bad


def test_schemes_as_one_text_are_refused_and_not_read_letter_by_letter() -> None:
    with pytest.raises(ValueError, match="allow_urls is 'https'; expected true, false or a list of schemes"):
        VLMDataModule(allow_urls="https")  # type: ignore[arg-type]


@pytest.mark.parametrize(("fps", "count"), [(None, 8), (2.0, 8), (1.0, 4), (5, 20), (100, 40)])
def test_a_file_is_sampled_as_its_row_asks(
    write_rows: Callable[..., Path], tmp_path: Path, fps: float | None, count: int
) -> None:
    """Four seconds at ten frames a second, of which the processor takes two, as Qwen's rows write ``fps``."""
    write_film(tmp_path / "a.mp4", 40)
    part = {"type": "video", "video": "a.mp4", "fps": fps}
    source = open_sources([str(write_rows([row(part)]))], True)
    processor = media_processor(video={"num_frames": 100, "fps": 2.0})
    dataset = SampleDataset(source, processor, MediaPolicy(""))
    sample, size = dataset[0], dataset.size(0)
    assert sample.prompt_length
    assert f"rame {count}" in processor.tokenizer.decode(sample.input_ids)
    assert f"rame {count + 1}" not in processor.tokenizer.decode(sample.input_ids)
    assert (len(sample), sample.num_patches) == (size.tokens, size.patches)
    example = ExampleDataset(source, None, MediaPolicy(""))[0]  # type: ignore[arg-type]
    assert len(example["conversation"][0]["content"][0]["video"]) == count


def test_each_video_of_a_row_is_sampled_as_it_asks(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    media_rows(tmp_path)
    write_film(tmp_path / "a.mp4", 40)
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": ["0.png", "1.png", "2.png"], "fps": 1.0},
        {"type": "image", "image": "0.png"},
        {"type": "video", "video": "a.mp4", "fps": 5.0},
        {"type": "video", "video": "a.mp4"},
    ]
    processor = media_processor(video={"num_frames": 100, "fps": 2.0, "temporal_patch_size": 1})
    dataset = SampleDataset(open_sources([str(write_rows([row(*parts)]))], True), processor, MediaPolicy(""))
    sample, size = dataset[0], dataset.size(0)
    assert sample.video_grid_thw is not None
    assert sample.video_grid_thw[:, 0].tolist() == [3, 20, 8]
    assert (len(sample), sample.num_patches) == (size.tokens, size.patches)


def test_what_is_too_long_is_told_with_what_helps_its_own_media(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows(media_rows(tmp_path))
    images = "make its images smaller (overlong: downscale_images, or processor_options: max_num_patches, max_tiles), "
    videos = "show fewer frames or prune them (processor_options.video: num_frames, fps, pruning_rate), "
    dataset = SampleDataset(open_sources([str(path)], True), media_processor(), MediaPolicy(""), max_tokens=3)
    cases = [
        ("1 video(s)", videos),
        ("1 sound(s)", "cut its sounds, "),
        ("1 image(s)", images),
        ("no media", ""),
        ("1 image(s), 2 video(s)", images + videos),
    ]
    for index, (counted, ways) in enumerate(cases):
        with pytest.raises(DataError) as caught:
            dataset[index]
        assert f"tokens with {counted}, expected at most max_tokens = 3" in caught.value.problem
        assert caught.value.fix == f"raise max_tokens, {ways}or shorten the row"
