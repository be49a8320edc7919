"""VLMDataModule: selections, stages, standing alone, and the bad rows that only show when media are read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.data.samplers import Position
from lightning_vlm.schema import DataError

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
    sources = dict(data._sources)
    data.setup("fit")
    data.setup("validate")
    assert all(data._sources[split] is sources[split] for split in ("train", "val"))


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
        ({"collate": "mine"}, "collate='mine' is unknown; expected 'auto' or 'padded' or 'packed'"),
        ({"packing": "yes"}, "packing='yes' is unknown; expected False or True"),
        ({"overlong": "cut"}, "overlong='cut' is unknown; expected 'error' or 'drop' or 'downscale_images'"),
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
        train=str(write_rows([good, row])), processor=processor, batch_size=1, sampler="sequential", **options
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
    message = first_error(row, write_rows, processor, max_tokens=100)
    assert "tokens with 0 image(s), expected at most max_tokens = 100; raise max_tokens" in message


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
