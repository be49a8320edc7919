"""The padded batcher: mixed samples, media that keep their place, and batches that reach a device and a validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vlm.automodel.collate_fns import (
    _truncate_token_axis,
    default_collate_fn,
    neat_packed_vlm_collater,
    nemotron_omni_collate_fn,
    pad_collate_fn,
    qwen2_5_collate_fn,
    qwen3_omni_collate_fn,
)
from lightning_vlm.automodel.neat_samples import _build_packed_vlm_sample, _shift_sample
from lightning_vlm.automodel.padding import pad_samples, to_bfloat16
from lightning_vlm.processing.registry import ENCODERS

Dict = dict[str, Any]


class Tokens:
    """A processor of which only the padding token and the placeholder are known."""

    pad_token_id, image_token_id = 0, 9


def sample(length: int, start: int = 10, **more: Any) -> Dict:
    ids = torch.arange(start, start + length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.none() | st.integers(12, 20))
def test_samples_are_found_again_in_their_batch(lengths: list[int], max_length: int | None) -> None:
    samples = [sample(length, 100 * (number + 1)) for number, length in enumerate(lengths)]
    batch = pad_samples(samples, Tokens(), max_length=max_length)
    width = (max_length or max(lengths)) - 1
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (len(lengths), width)
    )
    for row, (length, own) in enumerate(zip(lengths, samples)):
        seen = min(length, width)
        assert batch["input_ids"][row].tolist() == [*own["input_ids"][:seen].tolist(), *[0] * (width - seen)]
        assert batch["attention_mask"][row].tolist() == [1] * seen + [0] * (width - seen)
        assert batch["labels"][row].tolist() == [*own["labels"][1:].tolist(), *[-100] * (width - length + 1)]


@pytest.mark.parametrize("max_length", [None, 4])
def test_a_placeholder_at_the_end_is_not_shifted_away(max_length: int | None) -> None:
    """Defect 2B.19: its feature would have no place."""
    samples = [sample(3), {**sample(4), "input_ids": torch.tensor([1, 9, 9, 9])}]
    batch = pad_samples(samples, Tokens(), max_length=max_length)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 0], [1, 9, 9, 9]]
    assert batch["labels"].shape == (2, 4)
    by_types = [sample(3), sample(4, mm_token_type_ids=torch.tensor([0, 0, 0, 1]))]
    assert pad_samples(by_types, object(), max_length=max_length)["mm_token_type_ids"].tolist() == [
        [0] * 4,
        [0, 0, 0, 1],
    ]


def test_a_sample_over_the_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sample has 5 tokens, more than max_length 4"):
        pad_samples([sample(5)], Tokens(), max_length=4)


def test_pixels_that_are_not_yet_normalised_stay_bytes() -> None:
    assert to_bfloat16(torch.zeros(2, dtype=torch.uint8)).dtype == torch.uint8
    assert [item.dtype for item in to_bfloat16([torch.zeros(1), torch.zeros(1, dtype=torch.float64)])] == [
        torch.bfloat16
    ] * 2


def test_rows_are_cut_in_place_but_not_through_media() -> None:
    batch = {
        "input_ids": torch.arange(10).reshape(2, 5),
        "labels": torch.arange(10).reshape(2, 5),
        "mm_token_type_ids": torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]),
        "pixel_values": torch.zeros(2, 5),
        "attention_mask": torch.ones(2, 5),
    }
    assert _truncate_token_axis(batch, None)["input_ids"].shape == (2, 5)
    with pytest.raises(ValueError, match="max_length 2 would cut through media tokens"):
        _truncate_token_axis(batch, 2)
    assert _truncate_token_axis(batch, 3) is batch
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (2, 3),
        "labels": (2, 3),
        "mm_token_type_ids": (2, 3),
        "pixel_values": (2, 5),
        "attention_mask": (2, 3),
    }


def test_samples_of_all_kinds_share_a_batch() -> None:
    samples = [
        sample(4),
        sample(5, pixel_values=torch.ones(2, 3, 4, 4), n_images=2),
        sample(3, pixel_values=[torch.ones(3, 8, 6)], n_images=1, image_flags=torch.ones(1, 1)),
        sample(6, pixel_values_videos=torch.ones(8, 6), video_grid_thw=torch.tensor([[2, 2, 2]]), n_videos=1),
        sample(2, input_features=torch.ones(1, 80, 30), feature_attention_mask=torch.ones(1, 30, dtype=torch.int32)),
        sample(2, input_features=torch.ones(2, 80, 50), feature_attention_mask=torch.ones(2, 50, dtype=torch.int32)),
    ]
    batch = pad_samples(samples, Tokens(), bfloat16=True)
    assert [tuple(item.shape) for item in batch["pixel_values"]] == [(3, 4, 4), (3, 4, 4), (3, 8, 6)]
    assert batch["input_features"].shape == (3, 80, 50)
    assert batch["feature_attention_mask"].sum(1).tolist() == [30, 50, 50]
    assert batch["n_images_per_sample"].tolist() == [0, 2, 1, 0, 0, 0]
    assert batch["n_videos_per_sample"].tolist() == [0, 0, 0, 1, 0, 0]


# To a device and through a validation


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in values for tensor in tensors_in(item)]


def mixed_batch() -> Dict:
    samples = [
        sample(5, pixel_values=[torch.ones(3, 8, 6), torch.ones(3, 4, 4)], n_images=2),
        sample(4),
        sample(6, pixel_values=torch.ones(1, 3, 4, 4), n_images=1, sound_features=torch.ones(1, 7, 80)),
    ]
    return pad_samples(samples, Tokens(), bfloat16=True)


def test_lightning_moves_all_of_a_mixed_batch() -> None:
    """Defect 2B.17: in validation only the top level moves. Lightning's own function moves all: no other is needed."""
    batch = mixed_batch()
    moved = move_data_to_device(batch, torch.device("meta"))
    assert {tensor.device.type for tensor in tensors_in(moved)} == {"meta"}
    assert len(tensors_in(moved)) == len(tensors_in(batch)) == 8
    assert isinstance(moved["pixel_values"], list)


class Sees(lightning.LightningModule):
    """Remembers what reaches a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[str, Dict]] = []

    def training_step(self, batch: Dict, index: int) -> Tensor:
        self.seen.append(("train", batch))
        return self.weight.sum() * sum(image.float().mean() for image in batch["pixel_values"])

    def validation_step(self, batch: Dict, index: int) -> None:
        self.seen.append(("validate", batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_mixed_batch_survives_training_and_validation(tmp_path: Any) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(range(2), batch_size=2, collate_fn=lambda _: mixed_batch())  # type: ignore[arg-type]

    module = Sees()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    assert {name for name, _ in module.seen} == {"train", "validate"}
    for _, batch in module.seen:
        assert [tuple(image.shape) for image in batch["pixel_values"]] == [(3, 8, 6), (3, 4, 4), (3, 4, 4)]


def test_real_processors_make_batches_of_mixed_samples_that_move(
    qwen2_5_with_videos: Any,
    qwen3_omni: Any,
    nemotron_omni_remote: Any,
    llava_onevision: Any,
    example: Callable[..., Dict],
) -> None:
    from PIL import Image

    small, large = Image.new("RGB", (56, 56)), Image.new("L", (112, 84))
    video = {"type": "video", "video": [small] * 4}
    sound = {"type": "audio", "audio": (torch.zeros(8000).numpy(), 16_000)}
    text = example("hi", "ho")
    for function, processor, rows in (
        (qwen2_5_collate_fn, qwen2_5_with_videos, [example("q", "a", small, large), example("q", "a", video), text]),
        (qwen3_omni_collate_fn, qwen3_omni, [example("q", "a", large), example("q", "a", sound, small), text]),
        (default_collate_fn, llava_onevision, [text, example("q", "a", small), example("q", "a", large)]),
        (
            nemotron_omni_collate_fn,
            nemotron_omni_remote,
            [example("q", "a", small, sound), example("q", "a", large), example("q", "a", video), text],
        ),
    ):
        batch = function(rows, processor)
        moved = move_data_to_device(batch, torch.device("meta"))
        assert {tensor.device.type for tensor in tensors_in(moved)} == {"meta"}
        assert len(batch["input_ids"]) == len(rows)


STAND_INS = {"kimi_vl", "kimi_k25", "nemotron_parse", "phi4_remote", "nemotron_omni_remote"}


def said(name: Any) -> str:
    """The name of a processor in a test's name, and whether it is a stand-in."""
    return f"{name} stand-in" if name in STAND_INS else str(name)


# The other batcher: the same samples, packed

FAMILIES = {
    "qwen2_5": "qwen2_5",
    "qwen3_omni": "qwen3_omni",
    "llava_onevision": "default",
    "gemma3": "default",
    "gemma4": "gemma4_prefix",
    "nemotron_omni": "nemotron_omni",
    "nemotron_omni_remote": "nemotron_omni",
    "kimi_vl": "kimi_vl",
    "kimi_k25": "kimi_k25_vl",
    "nemotron_parse": "nemotron_parse",
    "phi4": "phi4_mm",
    "phi4_remote": "phi4_mm",
}


@pytest.mark.parametrize("name", FAMILIES, ids=said)
def test_what_an_encoder_makes_can_be_packed_and_nothing_of_it_is_lost(
    name: str, example: Callable[..., Dict], request: pytest.FixtureRequest
) -> None:
    """Defect 2B.1: packing has a list of keys, and what is not on it is gone."""
    from PIL import Image

    processor = request.getfixturevalue(name)
    media_of_two: list[Any] = [Image.new("RGB", (56, 56)), Image.new("RGB", (84, 56))]
    if FAMILIES[name] == "phi4_mm":
        media_of_two = [{"type": "audio", "audio": (torch.zeros(size).numpy(), 16_000)} for size in (8000, 16_000)]
    samples = [ENCODERS[FAMILIES[name]](example("q", "a", item), processor) for item in media_of_two]
    padded = pad_collate_fn(samples, processor)
    packed = neat_packed_vlm_collater([_build_packed_vlm_sample([_shift_sample(item) for item in samples], 4096, 0)])
    per_token = {"input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids"}
    media = set(padded) - per_token - {"input_mode"}  # which is of the batch
    assert media <= set(packed)
    for key in media - {"n_images_per_sample"}:
        ours, theirs = padded[key], packed[key]
        pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
        assert all(torch.equal(one, other) for one, other in pairs)
    assert ("n_images_per_sample" in packed) == (FAMILIES[name] != "phi4_mm")
    assert packed.get("n_images_per_sample", torch.tensor([2])).tolist() == [2]
    assert packed["labels"][packed["labels"] != -100].tolist() == padded["labels"][padded["labels"] != -100].tolist()
    assert sorted(set(packed["_packed_seq_ids"][0].tolist())) == [1, 2]
