"""Lengths before training: exact, kept on disk under everything they follow from, and compared with every sample."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm.data import lengths as lengths_module
from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.lengths import LengthTable, default_cache_dir, lengths_key, measure_lengths
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import DataError
from lightning_vlm.sources.open import open_sources
from tests.fixtures.media_files import media_rows
from tests.fixtures.media_samples import media_processor

COLUMNS = ("tokens", "patches", "images", "videos", "sounds", "scaled", "repaired")


def samples(
    *paths: Path, needs_answer: bool = True, policy: MediaPolicy | None = None, **options: Any
) -> SampleDataset:
    processor = options.pop("processor", None) or tiny_processor()
    sources = open_sources(paths, needs_answer, options.pop("media_root", None))
    return SampleDataset(sources, processor, policy or MediaPolicy(Path()), **options)


def assert_same(table: LengthTable, other: LengthTable) -> None:
    for name in COLUMNS:
        assert np.array_equal(getattr(table, name), getattr(other, name)), name


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestMeasuring:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"answer": True, "needs_answer": False},
            {"limit": SampleLimit(90, 40), "overlong": "downscale_images"},
        ],
        ids=["train", "predict", "scaled"],
    )
    def test_gives_the_sizes_of_the_samples(
        self, make_task: Callable[..., Path], cache: Path, workers: int, options: dict[str, Any]
    ) -> None:
        paths = make_task(25, answers="answer" not in options), make_task(8, "more.jsonl", answers=True)
        dataset = samples(*paths, **options)
        table = measure_lengths(dataset, workers, cache, show_progress=False)
        assert len(table) == len(dataset) == 33
        for index in range(33):
            processor = dataset.processor
            source, row, policy = dataset._locate(index)
            conversation = source.conversation(row)
            images = [Image.open(policy.media_root / image.ref) for image in conversation.images]
            sample = processor.encode(conversation, images, **dataset._options(conversation))
            patches = 0 if sample.pixel_values is None else len(sample.pixel_values)
            assert (table.tokens[index], table.patches[index]) == (len(sample), patches)
            assert table.images[index] == len(images)
            own = processor.encode(conversation, images, **{**dataset._options(conversation), "limit": None})
            assert table.scaled[index] == (len(own) != len(sample))
        assert table.scaled.any() == ("limit" in options)
        assert [getattr(table, name).dtype for name in COLUMNS] == [*[np.int32] * 5, np.bool_, np.bool_]

    def test_media_are_counted_by_kind(self, write_rows: Callable[..., Path], cache: Path, tmp_path: Path) -> None:
        dataset = samples(write_rows(media_rows(tmp_path)), processor=media_processor(0.5))
        for _ in range(2):  # measured, and read
            table = measure_lengths(dataset, 0, cache, show_progress=False)
            assert table.images.tolist() == [0, 0, 1, 0, 1]
            assert table.videos.tolist() == [1, 0, 0, 0, 2]
            assert table.sounds.tolist() == [0, 1, 0, 0, 0]
            for index, sample in enumerate(dataset[number] for number in range(5)):
                assert (table.tokens[index], table.patches[index]) == (len(sample), sample.num_patches)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_bad_samples_are_found_all_at_once_and_kept(
        self, make_task: Callable[..., Path], cache: Path, workers: int
    ) -> None:
        path = make_task(20)
        missing, text = sorted(path.parent.glob("rows.jsonl-*-0.png"))[:2]
        missing.unlink()
        text.write_text("no image")
        numbers = [int(image.name.split("-")[1]) for image in (missing, text)]
        table = measure_lengths(samples(path), workers, cache, show_progress=False)
        assert sorted(table.errors) == sorted(numbers)
        assert str(table.errors[numbers[0]]).startswith(
            f"{path}:{numbers[0] + 1}: image '{missing.name}' does not exist"
        )
        assert "cannot be decoded (not an image)" in str(table.errors[numbers[1]])
        assert {error.kind for error in table.errors.values()} == {"missing file", "not an image"}
        assert not table.tokens[numbers].any()
        assert table.tokens[np.setdiff1d(np.arange(20), numbers)].all()
        again = measure_lengths(samples(path), workers, cache, show_progress=False)
        assert {index: str(error) for index, error in again.errors.items()} == {
            index: str(error) for index, error in table.errors.items()
        }
        assert again.path == table.path

    def test_damage_that_headers_do_not_show_is_found_by_decoding_and_serves_later_starts(
        self, make_task: Callable[..., Path], cache: Path
    ) -> None:
        path = make_task(8)
        image = next(path.parent.glob("rows.jsonl-*-0.png"))
        content = bytearray(image.read_bytes())
        content[60] ^= 0xFF  # in the pixels: header and end are whole
        image.write_bytes(content)
        assert not measure_lengths(samples(path), 0, cache, show_progress=False).errors
        table = measure_lengths(samples(path), 0, cache, show_progress=False, decode=True)
        assert list(table.errors) == [int(image.name.split("-")[1])]
        assert list(measure_lengths(samples(path), 0, cache, show_progress=False).errors) == list(table.errors)

    def test_shows_progress_in_samples_and_only_while_measuring(
        self, make_task: Callable[..., Path], cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dataset = samples(make_task(5))
        measure_lengths(dataset, 0, cache / "quiet", show_progress=False)
        assert capsys.readouterr() == ("", "")
        measure_lengths(dataset, 0, cache)
        out, err = capsys.readouterr()
        assert out == ""
        assert "measuring lengths: 100%" in err
        assert "5/5" in err
        measure_lengths(dataset, 0, cache)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_draws_no_random_number(self, make_task: Callable[..., Path], cache: Path, workers: int) -> None:
        before = torch.get_rng_state()
        measure_lengths(samples(make_task(5)), workers, cache, show_progress=False)
        assert torch.equal(torch.get_rng_state(), before)


class TestCache:
    def test_is_read_without_opening_an_image(self, make_task: Callable[..., Path], cache: Path) -> None:
        path = make_task(12)
        first = measure_lengths(samples(path), 0, cache, show_progress=False)
        for image in path.parent.glob("*.png"):
            image.unlink()
        again = measure_lengths(samples(path), 0, cache, show_progress=False)
        assert_same(first, again)
        assert first.path == again.path == next(cache.iterdir())
        other = measure_lengths(samples(path), 0, cache / "other", show_progress=False)
        assert all("does not exist" in str(error) for error in other.errors.values())
        assert len(other.errors) == np.count_nonzero(first.images)

    def test_key_follows_everything_that_lengths_follow_from(
        self, make_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, other = make_task(6), make_task(5, "other.jsonl")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        shutil.copy(path, elsewhere / "rows.jsonl")
        base = lengths_key(samples(path))

        def with_tokenizer(change: Callable[[Any], object]) -> NemotronVLProcessor:
            processor = tiny_processor()
            change(processor.tokenizer)
            return processor

        def with_template(template: str) -> NemotronVLProcessor:
            processor = tiny_processor()
            processor.chat_template = template
            return processor

        limit = SampleLimit(100)
        keys = [
            samples(other),
            samples(path, other),
            samples(other, path),
            samples(path, path),
            samples(path, media_root=elsewhere),
            samples(path, answer=True),
            samples(path, needs_answer=False),
            samples(path, template_kwargs={"thinking": True}),
            samples(path, template_kwargs={"thinking": False}),
            samples(path, policy=MediaPolicy(Path(), max_image_pixels=10**6)),
            samples(path, policy=MediaPolicy(Path(), allow_urls=True)),
            samples(path, processor=with_template("{{ '<s>' }}")),
            samples(path, processor=with_tokenizer(lambda tokenizer: tokenizer.add_tokens(["question"]))),
            samples(path, processor=with_tokenizer(lambda tokenizer: setattr(tokenizer, "eos_token", "<s>"))),
            samples(path, processor=with_tokenizer(lambda tokenizer: setattr(tokenizer, "split_special_tokens", True))),
            samples(
                path,
                processor=NemotronVLProcessor(
                    tiny_processor().image_processor, tiny_processor().tokenizer, image_start_token="<s>"
                ),
            ),
            samples(path, limit=limit, overlong="downscale_images"),
            samples(path, limit=SampleLimit(100, 50), overlong="downscale_images"),
            samples(path, limit=SampleLimit(101), overlong="downscale_images"),
            *(
                samples(path, processor=tiny_processor(**{name: value}))
                for name, value in {
                    "mode": "static",
                    "patch_size": 16,
                    "downsample_ratio": 1.0,
                    "min_num_patches": 8,
                    "max_num_patches": 128,
                    "max_model_len": 1024,
                    "tile_size": 64,
                    "max_tiles": 3,
                    "use_thumbnail": False,
                }.items()
            ),
        ]
        found = [lengths_key(dataset) for dataset in keys]
        monkeypatch.setattr(lengths_module, "FORMAT_VERSION", 0)
        found.append(lengths_key(samples(path)))
        assert len({base, *found}) == 1 + len(found)

    def test_key_does_not_follow_what_moves_no_length(self, make_task: Callable[..., Path], tmp_path: Path) -> None:
        path = make_task(6)
        (tmp_path / "copies").mkdir()
        copy = shutil.copy(path, tmp_path / "copies" / "renamed.jsonl")
        base = lengths_key(samples(path))
        called = tiny_processor()
        called.measure(samples(path).sources[0].conversation(0), [])
        called(text=["a", "bc"], padding=True, truncation=True, max_length=5)
        same = [
            samples(path, processor=called),
            samples(path, processor=tiny_processor(do_normalize=True)),
            samples(path, max_tokens=10),
            samples(Path(copy), media_root=path.parent),
            samples(path, limit=SampleLimit(5), overlong="error"),
            samples(path, limit=SampleLimit(6), overlong="drop"),
            samples(path, media_root=path.parent / "nothing" / ".."),
        ]
        assert {lengths_key(dataset) for dataset in same} == {base}

    def test_survives_saving_a_processor(self, make_task: Callable[..., Path], tmp_path: Path) -> None:
        path = make_task(3)
        tiny_processor().save_pretrained(tmp_path / "model")
        loaded = [NemotronVLProcessor.from_pretrained(tmp_path / "model") for _ in range(2)]
        assert len({lengths_key(samples(path, processor=processor)) for processor in loaded}) == 1

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path, data: path.write_bytes(data[: len(data) // 2]),
            lambda path, data: path.write_bytes(b""),
            lambda path, data: path.write_bytes(data[:60] + bytes([data[60] ^ 255]) + data[61:]),
            lambda path, data: path.write_bytes(b"hello"),
            lambda path, data: np.savez(path, tokens=np.zeros(12, np.int32)),
            lambda path, data: np.savez(path, **{name: np.array([None] * 12, object) for name in COLUMNS}),
            lambda path, data: rewrite(path, tokens=np.zeros(12, np.int64)),
            lambda path, data: rewrite(path, tokens=np.zeros((12, 1), np.int32)),
            lambda path, data: rewrite(path, tokens=np.full(12, -1, np.int32)),
            lambda path, data: rewrite(path, patches=np.zeros(11, np.int32)),
            lambda path, data: rewrite(path, **{name: np.load(path)[name][:11] for name in COLUMNS}),
            lambda path, data: rewrite(path, key=np.array("another")),
        ],
        ids=[
            "half",
            "empty",
            "flipped byte",
            "no archive",
            "columns missing",
            "pickled",
            "type",
            "shape",
            "negative",
            "one column short",
            "all short",
            "renamed",
        ],
    )
    def test_that_is_damaged_or_foreign_is_measured_again_with_one_line(
        self,
        make_task: Callable[..., Path],
        cache: Path,
        caplog: pytest.LogCaptureFixture,
        damage: Callable[[Path, bytes], Any],
    ) -> None:
        dataset = samples(make_task(12))
        table = measure_lengths(dataset, 0, cache, show_progress=False)
        assert table.path is not None
        damage(table.path, table.path.read_bytes())
        for _ in range(2):
            assert_same(measure_lengths(dataset, 0, cache, show_progress=False), table)
            assert len(caplog.records) == 1, "the second time it is whole again"
        assert str(table.path) in caplog.text
        assert "measured again" in caplog.text
        assert "\n" not in caplog.records[0].getMessage()
        assert [path.name for path in cache.iterdir()] == [table.path.name], "nothing unfinished is left"

    def test_that_cannot_be_written_costs_one_line(
        self, make_task: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        with caplog.at_level(logging.WARNING):
            table = measure_lengths(samples(make_task(3)), 0, tmp_path / "file", show_progress=False)
        assert len(table) == 3
        assert table.path is None
        assert "cannot be written" in caplog.records[-1].getMessage()

    def test_is_whole_or_absent(
        self, make_task: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = samples(make_task(3))

        def fail(*args: Any, **kwargs: Any) -> None:
            args[0].write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez_compressed", fail)
        with pytest.raises(KeyboardInterrupt):
            measure_lengths(dataset, 0, cache, show_progress=False)
        assert list(cache.iterdir()) == []

    def test_stands_where_the_environment_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("LIGHTNING_VLM_CACHE", raising=False)
        assert default_cache_dir() == tmp_path / ".cache" / "lightning_vlm" / "lengths"
        monkeypatch.setenv("LIGHTNING_VLM_CACHE", str(tmp_path / "scratch"))
        assert default_cache_dir() == tmp_path / "scratch" / "lengths"

    def test_default_folder_is_used(
        self, make_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("LIGHTNING_VLM_CACHE", str(tmp_path / "scratch"))
        table = measure_lengths(samples(make_task(3)), show_progress=False)
        assert table.path is not None
        assert table.path.parent == tmp_path / "scratch" / "lengths"


def rewrite(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    np.savez(path, **{**content, **changes})


class TestSamples:
    def test_that_are_as_measured_pass(self, make_task: Callable[..., Path], cache: Path) -> None:
        dataset = samples(make_task(9))
        checked = dataset.with_lengths(measure_lengths(dataset, 0, cache, show_progress=False))
        assert [len(checked[index]) for index in range(9)] == [len(dataset[index]) for index in range(9)]

    def test_whose_image_changed_are_refused_with_both_numbers_and_the_way_out(
        self, make_task: Callable[..., Path], write_image: Callable[..., str], cache: Path
    ) -> None:
        path = make_task(9)
        dataset = samples(path)
        table = measure_lengths(dataset, 0, cache, show_progress=False)
        write_image("rows.jsonl-4-0.png", 96, 96)
        checked = samples(path, lengths=measure_lengths(dataset, 0, cache, show_progress=False))
        checked[3], checked[5]
        now = len(dataset[4])
        assert now > table.tokens[4]
        with pytest.raises(DataError) as caught:
            checked[4]
        assert str(caught.value) == (
            f"{path}:5: the sample has {now} tokens and 144 vision patches, expected {table.tokens[4]} and "
            f"{table.patches[4]} as it was measured (a medium or the row has changed since); delete "
            f"'{table.path}' and start again."
        )
        assert table.path is not None
        table.path.unlink()
        again = measure_lengths(dataset, 0, cache, show_progress=False)
        assert len(samples(path, lengths=again)[4]) == now

    def test_of_other_shape_and_as_many_tokens_pass(
        self, make_task: Callable[..., Path], write_image: Callable[..., str], cache: Path
    ) -> None:
        dataset = samples(make_task(5))
        checked = dataset.with_lengths(measure_lengths(dataset, 0, cache, show_progress=False))
        write_image("rows.jsonl-1-0.png", 16, 24)  # was 24 x 16
        assert len(checked[1]) == len(dataset[1])

    def test_whose_patches_alone_differ_are_refused(self, make_task: Callable[..., Path]) -> None:
        dataset = samples(make_task(2))
        true = [dataset.size(index) for index in range(2)]
        table = LengthTable(
            np.array([size.tokens for size in true], np.int32),
            np.array([size.patches + 4 for size in true], np.int32),
            np.array([size.images for size in true], np.int32),
            np.zeros(2, np.int32),
            np.zeros(2, np.int32),
            np.zeros(2, np.bool_),
            np.zeros(2, np.bool_),
        )
        with pytest.raises(DataError, match=r"vision patches, expected .* measure the samples again"):
            dataset.with_lengths(table)[1]

    def test_need_a_table_of_as_many(self, make_task: Callable[..., Path], cache: Path) -> None:
        table = measure_lengths(samples(make_task(4)), 0, cache, show_progress=False)
        with pytest.raises(ValueError, match="lengths of 4 samples were given for 5 samples"):
            samples(make_task(5), lengths=table)
        with pytest.raises(ValueError, match="lengths of 4 samples were given for 5 samples"):
            samples(make_task(5)).with_lengths(table)

    @pytest.mark.parametrize("overlong", ["error", "drop"])
    def test_beyond_the_limit_are_an_error_that_names_them(self, make_task: Callable[..., Path], overlong: Any) -> None:
        path = make_task(3)
        size = samples(path).size(1)
        fits = samples(path, limit=SampleLimit(size.tokens, size.patches), overlong=overlong)
        assert len(fits[1]) == size.tokens
        for limit in (SampleLimit(size.tokens - 1), SampleLimit(size.tokens, size.patches - 1)):
            with pytest.raises(DataError) as caught:
                samples(path, limit=limit, overlong=overlong)[1]
            assert str(caught.value).startswith(
                f"{path}:2: the sample has {size.tokens} tokens and {size.patches} vision patches with 1 image(s), "
                f"expected at most {limit}; "
            )

    def test_that_images_can_shrink_for_are_no_error_and_others_are(self, make_task: Callable[..., Path]) -> None:
        path = make_task(6)
        own = samples(path).size(2)
        limit = SampleLimit(own.tokens - 2)
        dataset = samples(path, limit=limit, overlong="downscale_images")
        size = dataset.size(2)
        assert size.scaled
        assert len(dataset[2]) == size.tokens <= limit.tokens
        text_only = dataset.size(0).tokens
        tight = samples(path, limit=SampleLimit(text_only - 1), overlong="downscale_images")
        with pytest.raises(DataError, match=rf"rows.jsonl:1: the sample has {text_only} tokens and 0 vision patches"):
            tight[0]

    def test_longer_than_max_tokens_are_still_an_error(self, make_task: Callable[..., Path]) -> None:
        path = make_task(3)
        with pytest.raises(DataError, match=r"rows.jsonl:2: .* with 1 image\(s\), expected at most max_tokens = 9"):
            samples(path, max_tokens=9)[1]


class TestTable:
    def test_survives_the_round_trip(self, tmp_path: Path) -> None:
        table = LengthTable(
            np.array([3, 2**31 - 1], np.int32),
            np.array([0, 5], np.int32),
            np.array([0, 1], np.int32),
            np.array([4, 0], np.int32),
            np.array([0, 7], np.int32),
            np.array([False, True]),
            np.array([True, False]),
        )
        table.save(tmp_path / "a" / "table.npz", "key")
        loaded = LengthTable.load(tmp_path / "a" / "table.npz", "key")
        assert_same(table, loaded)
        assert loaded.path == tmp_path / "a" / "table.npz"
        with pytest.raises(ValueError, match="is the table of other lengths"):
            LengthTable.load(tmp_path / "a" / "table.npz", "other")
        with pytest.raises(FileNotFoundError):
            LengthTable.load(tmp_path / "b.npz")

    def test_of_no_sample(self, write_rows: Callable[..., Path], cache: Path) -> None:
        dataset = SampleDataset([], tiny_processor(), MediaPolicy(Path()))
        for _ in range(2):
            assert len(measure_lengths(dataset, 2, cache, show_progress=False)) == 0

    def test_is_written_for_everyone_who_may_read_the_folder(self, make_task: Callable[..., Path], cache: Path) -> None:
        table = measure_lengths(samples(make_task(2)), 0, cache, show_progress=False)
        plain = cache / "plain"
        plain.touch()
        assert table.path is not None
        assert os.stat(table.path).st_mode == os.stat(plain).st_mode


def test_rows_of_other_files_are_found(write_rows: Callable[..., Path]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    paths = [write_rows([{"messages": turns}] * count, f"{count}.jsonl") for count in (1, 3, 2)]
    dataset = samples(*paths)
    assert [dataset.place(index) for index in range(6)] == [
        f"{paths[0]}:1",
        *(f"{paths[1]}:{line}" for line in (1, 2, 3)),
        *(f"{paths[2]}:{line}" for line in (1, 2)),
    ]
