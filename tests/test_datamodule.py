"""VLMDataModule: selections, stages, standing alone, and the bad rows that only show when media are read."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.data.lengths import processor_fingerprint
from lightning_vlm.data.samplers import Position
from lightning_vlm.processing.tiny import TINY_SOUND, TINY_VIDEO, tiny_processor
from lightning_vlm.schema import DataError, VLMBatch

BOT = {"role": "assistant", "content": "ho"}


def test_three_lines_without_a_trainer(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    data = VLMDataModule(train=str(make_task(8)), processor=processor, batch_size=3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape[0] == 3
    assert batch.step_label_tokens == batch.num_label_tokens > 0


def test_setup_twice_is_setup_once(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    data = VLMDataModule(train=str(make_task(4)), val=str(make_task(4, "val.jsonl")), processor=processor)
    data.setup("fit")
    sources = {split: data.splits[split].sources for split in ("train", "val")}
    data.setup("fit")
    data.setup("validate")
    assert all(data.splits[split].sources is sources[split] for split in ("train", "val"))


def test_building_it_reads_nothing_and_touches_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was initialised"))
    VLMDataModule(train=str(tmp_path / "absent.jsonl"), processor="absent", num_workers=2)


def test_epoch_holds_every_row_of_every_file_once(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    files = [make_task(5, "a.jsonl"), make_task(4, "b.jsonl")]
    data = VLMDataModule(train=[str(file) for file in files], processor=processor, batch_size=2)
    data.setup("fit")
    seen = [source for batch in data.train_dataloader() for source in batch.sources]
    assert sorted(seen) == sorted([f"{files[0]}:{n}" for n in range(1, 6)] + [f"{files[1]}:{n}" for n in range(1, 5)])


def test_seed_and_processor_folder_make_it_reproducible(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path / "processor")
    file = str(make_task(8))
    batches = []
    for _ in range(2):
        data = VLMDataModule(train=file, processor=str(tmp_path / "processor"), seed=5)
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert torch.equal(batches[0].pixel_values, batches[1].pixel_values)


def test_images_come_from_the_files_folder_or_the_media_root(
    write_rows: Callable[..., Path], write_image: Callable[..., str], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    write_image("pictures/a.png")
    row = {"image": "a.png", "messages": [{"role": "user", "content": "<image>"}, BOT]}
    beside = write_rows([row], "pictures/rows.jsonl")
    apart = write_rows([row], "elsewhere/rows.jsonl")
    for file, root in ((beside, None), (apart, str(tmp_path / "pictures"))):
        data = VLMDataModule(train=str(file), processor=processor, media_root=root)
        data.setup("fit")
        assert next(iter(data.train_dataloader())).num_images.tolist() == [1]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"sampler": "random"},
            "sampler='random' is unknown; expected 'shuffle' or 'sequential' or 'length_grouped' or 'token_budget'",
        ),
        ({"collate": "mine"}, "collate is 'mine'; expected 'auto', one of default, qwen2_5"),
        ({"packing": "yes"}, "packing='yes' is unknown; expected False or True"),
        (
            {"overlong": "cut"},
            "overlong='cut' is unknown; expected 'error' or 'drop' or 'truncate_text' or 'downscale_images'",
        ),
        ({"packing": True, "collate": "padded"}, "packing=True makes rows without padding; expected collate='auto'"),
        ({"packing": True, "sampler": "token_budget"}, "packing=True fills rows by itself; expected sampler='shuffle'"),
        ({"packing": True, "sampler": "length_grouped"}, "not 'length_grouped'"),
    ],
    ids=str,
)
def test_selections_are_refused_by_name(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"; expected|, not") as caught:
        VLMDataModule(**selection)
    assert message in str(caught.value)


def test_what_is_missing_is_named(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    with pytest.raises(ValueError, match="no processor; name one"):
        VLMDataModule().processor  # noqa: B018
    data = VLMDataModule(processor=processor)
    for stage, split in {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}.items():
        with pytest.raises(DataError, match=f"data.{split}: there are no {split} files, expected at least one"):
            data.setup(stage)
    with pytest.raises(ValueError, match=r"no train files; pass train='file.jsonl'"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        VLMDataModule(train=str(make_task(2)), processor=processor).train_dataloader()


def first_error(row: Any, write_rows: Callable[..., Path], processor: NemotronVLProcessor, **options: Any) -> str:
    good = {"messages": [{"role": "user", "content": "hi"}, BOT]}
    data = VLMDataModule(
        train=str(write_rows([good, row])),
        processor=processor,
        batch_size=1,
        sampler="sequential",
        strict=True,
        **options,
    )
    data.setup("fit")
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_media_name_the_row(
    write_rows: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    cases = {
        "absent.png": "does not exist under the media root",
        "broken.png": "cannot be decoded",
        "../outside.png": "leads outside the media root",
        "https://example.com/a.png": "is a URL, expected a path under the media root",
    }
    for ref, words in list(cases.items())[: 1 if workers else None]:
        row = {"image": ref, "messages": [{"role": "user", "content": "<image>"}, BOT]}
        message = first_error(row, write_rows, processor, num_workers=workers)
        assert message.startswith(f"{tmp_path / 'rows.jsonl'}:2: image "), message
        assert words in message


def test_large_images_and_long_samples_name_their_limits(
    write_rows: Callable[..., Path], write_image: Callable[..., str], processor: NemotronVLProcessor
) -> None:
    row = {"image": write_image("a.png", 64, 48), "messages": [{"role": "user", "content": "<image>"}, BOT]}
    assert "64 x 48 = 3,072 pixels, expected at most max_image_pixels = 3,000" in first_error(
        row, write_rows, processor, max_image_pixels=3000
    )
    row = {"messages": [{"role": "user", "content": "long " * 50}, BOT]}
    data = VLMDataModule(train=str(write_rows([row], "long.jsonl")), processor=processor, max_tokens=100)
    with pytest.raises(DataError, match=r"long.jsonl:1 \(273 tokens, 0 patches\); raise the limit"):
        data.setup("fit")


def test_prediction_rows_end_with_a_generation_prompt(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    data = VLMDataModule(predict=str(make_task(3, answers=False)), processor=processor, batch_size=1)
    data.setup("predict")
    for batch in data.predict_dataloader():
        assert batch.prompts[0].endswith("<|im_start|>assistant\n")
        assert batch.prompt_lengths.tolist() == [batch.input_ids.shape[1]]
        assert batch.num_label_tokens == 0


def test_state_survives_json(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    data = VLMDataModule(train=str(make_task(8)), processor=processor, batch_size=2)
    assert data.state_dict() == {}
    data.setup("fit")
    iterator = iter(data.train_dataloader())
    next(iterator)
    state = json.loads(json.dumps(data.state_dict()))
    rest = [batch.sources for batch in iterator]
    for restore_first in (True, False):
        other = VLMDataModule(train=data.files["train"], processor=processor, batch_size=2)
        other.setup("fit")
        loader = None if restore_first else other.train_dataloader()
        other.load_state_dict(state)
        assert [batch.sources for batch in loader or other.train_dataloader()] == rest


def test_what_workers_receive_can_be_pickled(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    """Where processes are spawned instead of forked (macOS, Windows), the dataset travels by pickle."""
    data = VLMDataModule(train=str(make_task(6)), processor=processor, batch_size=3)
    data.setup("fit")
    loader = data.train_dataloader()
    copied = pickle.loads(pickle.dumps(loader._batches))
    planned = loader.plan.batches(Position())[0]
    assert torch.equal(copied[planned].input_ids, loader._batches[planned].input_ids)


def test_an_edited_file_is_opened_again(write_rows: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    def sources(data: VLMDataModule) -> list[str]:
        data.setup("fit")
        return [batch.prompts[0] for batch in data.train_dataloader()]

    row = {"messages": [{"role": "user", "content": "short"}, BOT]}
    longer = {"messages": [{"role": "user", "content": "a longer question"}, BOT]}
    data = VLMDataModule(train=str(write_rows([row, row])), processor=processor, batch_size=1, sampler="sequential")
    assert ["short" in prompt for prompt in sources(data)] == [True, True]
    write_rows([longer, row, longer])
    assert ["longer" in prompt for prompt in sources(data)] == [True, False, True]


def test_testing_a_checkpoint_does_not_move_the_training_position(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    config = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    file = str(make_task(6))

    def trainer(**options: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", enable_checkpointing=False, callbacks=[seen], **quiet, **options)

    class Seen(L.Callback):
        rows: ClassVar[list[str]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.rows.extend(batch.sources)

    seen = Seen()
    data = VLMDataModule(train=file, test=file, processor=processor, batch_size=2)
    first = trainer(max_steps=1)
    first.fit(NemotronVLModule(config=config, max_new_tokens=2), datamodule=data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    trainer().test(
        NemotronVLModule(config=config, max_new_tokens=2), data, ckpt_path=tmp_path / "one.ckpt", verbose=False
    )
    seen.rows.clear()
    trainer(max_epochs=1).fit(NemotronVLModule(config=config), datamodule=data)
    assert len(seen.rows) == len(set(seen.rows)) == 6, "a fresh fit sees every row"
    assert len(list(data.train_dataloader())) == 3, "after a fit the datamodule stands alone again"


# Packing and samplers by length


def epoch_of(data: VLMDataModule) -> list[VLMBatch]:
    data.setup("fit")
    return list(data.train_dataloader())


def patches_of(batch: VLMBatch) -> int:
    return 0 if batch.pixel_values is None else len(batch.pixel_values)


@pytest.mark.parametrize("workers", [0, 2])
def test_packing_alone_is_enough(make_task: Callable[..., Path], processor: NemotronVLProcessor, workers: int) -> None:
    """Packed rows of whole samples, in order and with their images: each equals its samples encoded one by one."""
    files = [make_task(9, "a.jsonl"), make_task(7, "b.jsonl")]
    data = VLMDataModule(
        train=[str(file) for file in files], processor=processor, batch_size=3, packing=True, num_workers=workers
    )
    data.setup("fit")
    loader = data.train_dataloader()
    dataset = data._data_plan("train").dataset
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == len(data.train_plan())
        for batch in batches:
            samples = [dataset[index] for index in batch.indices.tolist()]  # type: ignore[union-attr]
            assert batch.attention_mask is None
            assert batch.cu_seqlens is not None
            assert batch.cu_seqlens.dtype == torch.int32
            assert [b - a for a, b in pairwise(batch.cu_seqlens.tolist())] == [len(sample) for sample in samples]
            assert torch.equal(batch.input_ids[0], torch.cat([sample.input_ids for sample in samples]))
            assert torch.equal(batch.labels[0], torch.cat([sample.labels for sample in samples]))
            assert batch.sources == [sample.source for sample in samples]
            pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
            assert patches_of(batch) == sum(map(len, pixels))
            assert not pixels or torch.equal(batch.pixel_values, torch.cat(pixels))  # type: ignore[arg-type]
            assert batch.step_label_tokens == batch.num_label_tokens == sum(s.num_label_tokens for s in samples)
        orders.append([source for batch in batches for source in batch.sources])
        loader.set_epoch(1)
    for order in orders:
        assert sorted(order) == sorted(f"{file}:{n}" for file, rows in zip(files, (9, 7)) for n in range(1, rows + 1))
    assert orders[0] != orders[1], "each epoch has its own order"


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "batch_tokens": 200},
        {"packing": True, "batch_tokens": 400, "batch_patches": 24},
        {"packing": True, "batch_patches": 32},
        {"packing": True, "sampler": "sequential", "batch_tokens": 140},
        {"sampler": "token_budget", "batch_tokens": 200},
        {"sampler": "token_budget", "batch_tokens": 400, "batch_patches": 24},
        {"sampler": "token_budget", "batch_size": 5},
        {"packing": True, "batch_size": 5},
        {"packing": True, "batch_size": 1},
    ],
    ids=str,
)
def test_real_batches_keep_both_budgets(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, options: dict[str, Any]
) -> None:
    data = VLMDataModule(train=str(make_task(20)), processor=processor, **options)
    batches = epoch_of(data)
    lengths = [n for batch in batches for n in lengths_of(batch)]
    budget = options.get("batch_tokens") or max(math.ceil(data.batch_size * sum(lengths) / 20), max(lengths))
    assert max(batch.input_ids.numel() for batch in batches) <= budget
    assert max(map(patches_of, batches)) <= options.get("batch_patches", 10**9)
    assert sorted(int(source.rpartition(":")[2]) for batch in batches for source in batch.sources) == list(range(1, 21))
    if options.get("batch_size") == 1:
        assert budget == max(lengths)
    # Not by being timid: whatever two batches have in common would not fit into one.
    sizes = sorted((sum(lengths_of(batch)), patches_of(batch)) for batch in batches)[:2]
    assert options.get("sampler") == "token_budget" or (
        sizes[0][0] + sizes[1][0] > budget or sizes[0][1] + sizes[1][1] > options.get("batch_patches", 10**9)
    )


def lengths_of(batch: VLMBatch) -> list[int]:
    if batch.cu_seqlens is not None:
        return [b - a for a, b in pairwise(batch.cu_seqlens.tolist())]
    assert batch.attention_mask is not None
    return batch.attention_mask.sum(1).tolist()


def test_packed_rows_hold_the_samplers_batches(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    file = str(make_task(11))
    for sampler in ("shuffle", "sequential", "length_grouped", "token_budget"):
        padded, packed = (
            epoch_of(VLMDataModule(train=file, processor=processor, batch_size=3, sampler=sampler, collate=collate))
            for collate in ("padded", "packed")
        )
        assert [batch.sources for batch in padded] == [batch.sources for batch in packed]
        for left, right in zip(padded, packed):
            assert right.cu_seqlens is not None
            assert right.input_ids.shape == (1, left.num_tokens)
            assert right.num_label_tokens == left.num_label_tokens
            assert left.attention_mask is not None
            assert torch.equal(left.input_ids[left.attention_mask.bool()], right.input_ids[0])


def test_length_grouped_batches_are_alike(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    file = str(make_task(24))  # 37..39, 65..69 or 93..99 tokens, eight rows each
    spread = {}
    for sampler in ("shuffle", "length_grouped"):
        batches = epoch_of(VLMDataModule(train=file, processor=processor, batch_size=4, sampler=sampler))
        assert [len(batch) for batch in batches] == [4] * 6
        spread[sampler] = max(max(lengths_of(batch)) - min(lengths_of(batch)) for batch in batches)
    assert spread["length_grouped"] <= 6
    assert spread["shuffle"] > 50


def test_evaluation_stays_padded_and_in_order(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    file = str(make_task(5))
    data = VLMDataModule(train=file, val=file, test=file, predict=file, processor=processor, packing=True, batch_size=2)
    data.setup(None)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert all(batch.cu_seqlens is None and batch.attention_mask is not None for batch in batches)
        assert [source.rpartition(":")[2] for batch in batches for source in batch.sources] == list("12345")


class TestOverlong:
    """Rows 3, 6, 9 and 12 have two images and 93 to 99 tokens; the others at most 68."""

    def make(self, make_task: Callable[..., Path], processor: NemotronVLProcessor, **options: Any) -> VLMDataModule:
        return VLMDataModule(train=str(make_task(12)), processor=processor, batch_size=3, **options)

    @pytest.mark.parametrize(
        "options",
        [{"packing": True, "max_tokens": 80}, {"packing": True, "batch_tokens": 80},
         {"sampler": "token_budget", "batch_tokens": 80}],
        ids=str,
    )  # fmt: skip
    def test_an_error_comes_at_setup_and_names_samples(
        self, make_task: Callable[..., Path], processor: NemotronVLProcessor, options: dict[str, Any]
    ) -> None:
        data = self.make(make_task, processor, **options)
        file = data.files["train"][0]
        with pytest.raises(DataError) as caught:
            data.setup("fit")
        message = str(caught.value)
        assert message.startswith("data.overlong: 4 of 12 samples (33.3 %) exceed 80 tokens: ")
        assert all(f"{file}:{row} (" in message for row in (3, 6, 9, 12))

    @pytest.mark.parametrize(
        "options",
        [{"packing": True}, {"sampler": "shuffle"}, {"sampler": "length_grouped"}, {"collate": "packed"}],
        ids=str,
    )
    def test_drop_is_reported_and_counted(
        self,
        make_task: Callable[..., Path],
        processor: NemotronVLProcessor,
        caplog: pytest.LogCaptureFixture,
        options: dict[str, Any],
    ) -> None:
        caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
        data = self.make(make_task, processor, max_tokens=80, overlong="drop", **options)
        batches = epoch_of(data)
        rows = sorted(int(source.rpartition(":")[2]) for batch in batches for source in batch.sources)
        assert rows == [1, 2, 4, 5, 7, 8, 10, 11]
        assert data.num_dropped == data.summary().dropped == 4
        (message,) = [message for message in caplog.messages if "train:" in message]
        assert message.startswith("train: 4 of 12 samples (33.3 %) exceed 80 tokens and will not be trained on: ")
        assert f"{data.files['train'][0]}:12 (99 tokens, 24 patches)" in message

    @pytest.mark.parametrize("options", [{}, {"packing": True}, {"batch_size": 1}], ids=str)
    @pytest.mark.parametrize("limit", [5, 24, 39])
    def test_text_is_never_cut_to_where_nothing_is_learned(
        self, write_rows: Callable[..., Path], processor: NemotronVLProcessor, options: dict[str, Any], limit: int
    ) -> None:
        """The answer of the second row begins behind 39 tokens: without it nothing would be learned from the row."""
        rows = [{"messages": [{"role": "user", "content": text}, BOT]} for text in ("", "x" * 20)]
        where = {"train": str(write_rows(rows)), "processor": processor, "overlong": "truncate_text", **options}
        with pytest.raises(DataError, match=r"rows.jsonl:2 \(43 tokens") as caught:
            VLMDataModule(**where, max_tokens=limit).setup("fit")
        assert "cannot be cut without cutting an image or the whole answer" in str(caught.value)
        for batch in epoch_of(VLMDataModule(**where, max_tokens=40)):
            ends = [0, *(batch.cu_seqlens.tolist()[1:] if batch.cu_seqlens is not None else [])]
            documents = [batch.labels[0, a:b] for a, b in pairwise(ends)] or list(batch.labels)
            assert all((labels[1:] != -100).any() for labels in documents)

    @pytest.mark.parametrize("options", [{"packing": True}, {"sampler": "token_budget"}, {}], ids=str)
    def test_downscaled_samples_fit(
        self,
        make_task: Callable[..., Path],
        processor: NemotronVLProcessor,
        caplog: pytest.LogCaptureFixture,
        options: dict[str, Any],
    ) -> None:
        caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
        data = self.make(make_task, processor, max_tokens=96, overlong="downscale_images", **options)
        batches = epoch_of(data)
        sizes = {source: n for batch in batches for source, n in zip(batch.sources, lengths_of(batch))}
        assert len(sizes) == 12
        assert max(sizes.values()) <= 96
        assert data.num_dropped == 0
        (message,) = [message for message in caplog.messages if "train:" in message]
        assert message == "train: the images of 1 of 12 samples (8.3 %) were made smaller to fit 96 tokens"

    def test_evaluation_is_judged_by_its_own_limit(
        self, make_task: Callable[..., Path], processor: NemotronVLProcessor
    ) -> None:
        file = str(make_task(12))
        data = VLMDataModule(train=file, val=file, processor=processor, packing=True, batch_tokens=80, overlong="drop")
        data.setup("fit")
        assert sum(len(batch) for batch in data.val_dataloader()) == 12, "a budget of packs is none of padded rows"
        data = VLMDataModule(val=file, processor=processor, max_tokens=80, overlong="drop")
        data.setup("validate")
        assert sum(len(batch) for batch in data.val_dataloader()) == 8


def test_a_second_start_reads_what_was_measured(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    file = make_task(8)
    options: dict[str, Any] = {"packing": True, "cache_dir": str(tmp_path / "cache"), "sampler": "sequential"}
    first = VLMDataModule(train=str(file), processor=processor, **options)
    first.setup("fit")
    (table,) = (tmp_path / "cache").glob("*.npz")
    written = table.stat().st_mtime_ns
    for image in tmp_path.glob("*.png"):
        image.unlink()
    second = VLMDataModule(train=str(file), processor=processor, **options)
    second.setup("fit")
    assert len(second.train_plan()) == len(first.train_plan())
    assert table.stat().st_mtime_ns == written
    batch = next(iter(second.train_dataloader()))
    assert batch.skipped
    assert all("does not exist under the media root" in str(error) for _, error in batch.skipped)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_another_size_than_measured_names_its_sample(
    make_task: Callable[..., Path],
    write_image: Callable[..., str],
    processor: NemotronVLProcessor,
    tmp_path: Path,
    workers: int,
) -> None:
    options: dict[str, Any] = {"packing": True, "cache_dir": str(tmp_path / "cache"), "num_workers": workers}
    data = VLMDataModule(train=str(make_task(8)), processor=processor, **options)
    data.setup("fit")
    write_image("rows.jsonl-4-0.png", 64, 64)
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    message = str(caught.value)
    assert message.startswith(f"{data.files['train'][0]}:5: the sample has ")
    assert "as it was measured (a medium or the row has changed since); delete '" in message
    path = Path(message.partition("delete '")[2].partition("'")[0])
    path.unlink()  # as it says
    again = VLMDataModule(train=data.files["train"], processor=processor, **options)
    assert sum(len(batch) for batch in epoch_of(again)) == 8


def test_lengths_are_measured_while_preparing_a_fit_only(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    file = str(make_task(4))
    measured = []

    class Watches(VLMDataModule):
        def setup(self, stage: str | None = None) -> None:
            measured.append((stage, list((tmp_path / "cache").glob("*.npz"))))
            super().setup(stage)

    def trainer() -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", enable_checkpointing=False, max_steps=1, **quiet)

    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    module = NemotronVLModule(config=config, generate_on_validation=False)
    data = Watches(train=file, val=file, processor=processor, packing=True, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()  # by hand, outside of a fit
    trainer().validate(module, data, verbose=False)
    trainer().fit(module, data)
    assert [(stage, len(found)) for stage, found in measured] == [("validate", 0), ("fit", 1)]


def test_an_edited_file_is_measured_again(write_rows: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    row = {"messages": [{"role": "user", "content": "short"}, BOT]}
    longer = {"messages": [{"role": "user", "content": "a longer question" * 9}, BOT]}
    data = VLMDataModule(train=str(write_rows([row, row])), processor=processor, batch_size=1, packing=True)
    lengths = [sorted(n for batch in epoch_of(data) for n in lengths_of(batch))]
    write_rows([longer, row, row])
    lengths.append(sorted(n for batch in epoch_of(data) for n in lengths_of(batch)))
    assert lengths[0] == lengths[1][:2]
    assert lengths[1][2] > 150


def test_packed_data_without_rows_to_train_on(write_rows: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    row = {"messages": [{"role": "user", "content": "short"}, BOT]}
    data = VLMDataModule(train=str(write_rows([row])), processor=processor, packing=True, max_tokens=5, overlong="drop")
    with pytest.raises(
        DataError, match=r"1 of 1 samples \(100.0 %\) exceeds 5 tokens: .*rows.jsonl:1 .*; raise the lim"
    ):
        data.setup("fit")


class TestProcessorOptions:
    def test_stand_in_place_of_what_was_saved(self, tmp_path):
        tiny_processor(video={"target_num_patches": 16, "num_frames": 8}).save_pretrained(tmp_path)
        options = {"max_num_patches": 64, "video": {"pruning_rate": 0.5}}
        processor = VLMDataModule(processor=str(tmp_path), processor_options=options).processor
        assert processor.geometry.max_num_patches == 64
        assert processor.video == {"target_num_patches": 16, "num_frames": 8, "pruning_rate": 0.5}
        assert VLMDataModule(processor=str(tmp_path)).processor.video == {"target_num_patches": 16, "num_frames": 8}

    def test_are_part_of_what_lengths_are_kept_for(self, tmp_path):
        processors = [tiny_processor(), tiny_processor(video=TINY_VIDEO), tiny_processor(sound=TINY_SOUND)]
        processors.append(tiny_processor(video={**TINY_VIDEO, "pruning_rate": 0.5}))
        processors.append(tiny_processor(sound={**TINY_SOUND, "clip_s": 2.0}))
        assert len({processor_fingerprint(processor) for processor in processors}) == len(processors)

    def test_come_dotted_from_the_command_line(self, tmp_path):
        tiny_processor(video={"num_frames": 8}).save_pretrained(tmp_path)
        options = {"video.pruning_rate": 0.5, "video.fps": None, "max_num_patches": 64}
        processor = VLMDataModule(processor=str(tmp_path), processor_options=options).processor
        assert processor.video == {"num_frames": 8, "pruning_rate": 0.5, "fps": None}
        assert processor.geometry.max_num_patches == 64

    def test_wrong_ones_are_told(self, tmp_path):
        tiny_processor(video=TINY_VIDEO).save_pretrained(tmp_path)
        wrong = VLMDataModule(processor=str(tmp_path), processor_options={"video": {"frame_rate": 2}})
        with pytest.raises(DataError, match=r"data\.processor_options: \['video'\] do not fit: .*frame_rate"):
            _ = wrong.processor
        unknown = VLMDataModule(processor=str(tmp_path), processor_options={"max_patches": 2})
        with pytest.raises(DataError, match=r"the processor has no option 'max_patches'; expected some of .*max_num_p"):
            _ = unknown.processor
        made = VLMDataModule(processor=tiny_processor(), processor_options={"max_num_patches": 64})
        with pytest.raises(DataError, match="given beside a NemotronVLProcessor that is made already"):
            _ = made.processor
