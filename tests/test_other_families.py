"""VLMDataModule with a processor of another family: real batches for a real model of it, chosen by class or by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import Gemma3ImageProcessorPil, Gemma3Processor

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.data.examples import ExampleBatch
from lightning_vlm.processing.tiny import tiny_tokenizer
from lightning_vlm.schema import DataError

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<img>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def gemma() -> Gemma3Processor:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name, token in {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<image>"}.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    image_processor = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(image_processor, tokenizer, chat_template=TEMPLATE, image_seq_length=4)


class Model(L.LightningModule):
    """Learns to predict tokens from tokens, and counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300)
        self.seen: list[list[int]] = []

    def training_step(self, batch: ExampleBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.indices.tolist())
        logits = self.head(self.embed(batch["input_ids"]))
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
        ) / max(batch.step_label_tokens, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_on_batches_of_the_familys_own_collate(
    gemma: Gemma3Processor, make_task: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    file = make_task(10)
    image = next(tmp_path.glob("rows.jsonl-*.png"))
    image.write_text("broken")
    bad = int(image.name.split("-")[1])
    model = Model()
    data = VLMDataModule(train=str(file), processor=gemma, batch_size=3, num_workers=workers, max_bad_fraction=0.2)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(model, datamodule=data)
    (record,) = records(tmp_path)
    assert (record["source"], record["split"], record["kind"]) == (f"{file}:{bad + 1}", "train", "not an image")
    assert trainer.callback_metrics["data/bad_samples"] == 1
    for epoch in (model.seen[:4], model.seen[4:]):
        assert sorted(index for batch in epoch for index in batch) == [index for index in range(10) if index != bad]
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ExampleBatch)
    assert {"input_ids", "attention_mask", "labels", "pixel_values"} <= set(batch)
    assert batch.num_label_tokens == int((batch["labels"] != -100).sum()) > 0


def test_a_folder_tells_the_class(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path / "ours")
    data = VLMDataModule(train=str(make_task(4)), processor=str(tmp_path / "ours"))
    assert isinstance(data.processor, NemotronVLProcessor)


def named(examples: list[Any], processor: Any, word: str = "") -> dict[str, Any]:
    """A collate function of a user's own."""
    return {"labels": torch.ones(len(examples), 2), "word": word, "sources": [item["source"] for item in examples]}


def test_a_function_by_its_import_path(
    processor: NemotronVLProcessor, make_task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType("users_own")
    module.named = named  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_own", module)
    data = VLMDataModule(train=str(make_task(4)), processor=processor, collate="users_own.named", batch_size=2,
                         collate_options={"word": "hi"}, sampler="sequential")  # fmt: skip
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["word"] == "hi"
    assert [source.rpartition(":")[2] for source in batch["sources"]] == ["1", "2"]
    assert batch.num_label_tokens == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True}, "packing=True needs the length of every sample, which Gemma3Processor cannot tell"),
        ({"sampler": "token_budget"}, "sampler='token_budget' needs the length"),
        ({"max_tokens": 5}, "max_tokens=5 needs the length"),
    ],
)
def test_what_needs_lengths_is_refused(
    gemma: Gemma3Processor, make_task: Callable[..., Path], options: dict[str, Any], words: str
) -> None:
    data = VLMDataModule(train=str(make_task(4)), processor=gemma, **options)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        data.setup("fit")


def test_headers_and_all_bytes_are_verified_as_for_ours(
    gemma: Gemma3Processor, make_task: Callable[..., Path], tmp_path: Path
) -> None:
    file = make_task(10)
    image = next(tmp_path.glob("rows.jsonl-*.png"))
    image.write_text("broken")
    data = VLMDataModule(train=str(file), processor=gemma, verify="headers", max_bad_fraction=0.2)
    data.setup("fit")
    assert list(data.known_bad("train")) == [int(image.name.split("-")[1])]


class TestNothingToLearn:
    """The family's function cuts at ``max_length``: of rows 3 and 7 it cuts the whole answer."""

    @pytest.fixture
    def file(self, write_rows: Callable[..., Path]) -> Path:
        asked = ["why? " * (40 if index in (2, 6) else 1) for index in range(8)]
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "so"}] for text in asked]
        return write_rows([{"messages": turn} for turn in turns])

    def fit(self, gemma: Gemma3Processor, file: Path, folder: Path, **options: Any) -> tuple[Model, L.Trainer]:
        model = Model()
        data = VLMDataModule(train=str(file), val=str(file), processor=gemma, collate="default",
                             collate_options={"max_length": 60}, **options)  # fmt: skip
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)  # fmt: skip
        trainer.fit(model, datamodule=data)
        return model, trainer

    @pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 1}, {"batch_size": 4, "num_workers": 2}])
    def test_is_listed_counted_and_stays_in_the_batch(
        self, gemma: Gemma3Processor, file: Path, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        model, trainer = self.fit(gemma, file, tmp_path, max_bad_fraction=0.25, **options)
        found = records(tmp_path)
        assert sorted((record["index"], record["source"]) for record in found) == [(2, f"{file}:3"), (6, f"{file}:7")]
        assert {record["kind"] for record in found} == {"nothing to learn"}
        assert {record["split"] for record in found} == {"train"}
        assert trainer.callback_metrics["data/bad_samples"] == 2
        assert sorted(index for batch in model.seen for index in batch) == sorted([*range(8)] * 2)

    def test_too_many_stop_the_run(self, gemma: Gemma3Processor, file: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            self.fit(gemma, file, tmp_path, max_bad_fraction=0.2, batch_size=4)
        assert "2 of 8 samples (25 %) cannot be used" in str(caught.value)
        assert f"{file}:3: none of its tokens is trained on in the batch" in str(caught.value)
        with pytest.raises(DataError, match=r"rows.jsonl:[37]: none of its tokens"):
            self.fit(gemma, file, tmp_path, strict=True, max_bad_fraction=1.0, batch_size=4)
