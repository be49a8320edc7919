"""Padding: every token, label and patch of each sample is where it belongs, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.schema import IGNORE_INDEX, Sample
from tests.fixtures.media_samples import media_processor, varied_samples


def sample(length: int, num_images: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, 200, (length,), generator=generator)
    labels = ids.clone()
    labels[: length // 2] = IGNORE_INDEX
    grids = torch.tensor([[2, 2 + 2 * (k % 2)] for k in range(num_images)]) if num_images else None
    patches = int(grids.prod(-1).sum()) if grids is not None else 0
    pixels = torch.randint(0, 256, (patches, 12), generator=generator, dtype=torch.uint8) if num_images else None
    return Sample(ids, labels, pixels, grids, length // 2, f"prompt {seed}", (f"answer {seed}",), f"file:{seed}")


@pytest.mark.parametrize("lengths", [[5], [1, 9, 4], [3, 3]])
def test_rows_are_the_samples(lengths: list[int]) -> None:
    samples = [sample(length, index % 3, index) for index, length in enumerate(lengths)]
    batch = PaddedCollate(pad_token_id=0)(samples)
    assert batch.input_ids.shape == (len(lengths), max(lengths))
    for row, item in enumerate(samples):
        n = len(item)
        assert torch.equal(batch.input_ids[row, :n], item.input_ids)
        assert torch.equal(batch.labels[row, :n], item.labels)
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (max(lengths) - n)
        assert (batch.labels[row, n:] == IGNORE_INDEX).all()
        assert (batch.input_ids[row, n:] == 0).all()
    assert batch.num_tokens == sum(lengths)
    assert batch.num_label_tokens == sum(item.num_label_tokens for item in samples)
    assert batch.sources == [item.source for item in samples]
    assert batch.prompt_lengths.tolist() == [item.prompt_length for item in samples]


def test_images_are_concatenated_in_reading_order() -> None:
    samples = [sample(4, count, count) for count in (2, 0, 1)]
    batch = PaddedCollate(0)(samples)
    assert batch.num_images.tolist() == [2, 0, 1]
    assert batch.pixel_values is not None
    assert batch.image_grid_hw is not None
    assert torch.equal(batch.pixel_values, torch.cat([samples[0].pixel_values, samples[2].pixel_values]))
    assert torch.equal(batch.image_grid_hw, torch.cat([samples[0].image_grid_hw, samples[2].image_grid_hw]))


def test_text_only_batches_have_no_pixels() -> None:
    batch = PaddedCollate(0)([sample(4, 0, 1)])
    assert batch.pixel_values is None
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "num_images"}


def test_a_stand_in_batch_trains_and_counts_nothing() -> None:
    batch = PaddedCollate(0)([sample(6, 1, 0)], counted=False)
    assert (batch.labels == IGNORE_INDEX).all()
    assert batch.num_label_tokens == 0
    assert not batch.counted.any()


def test_to_moves_every_tensor() -> None:
    batch = PaddedCollate(0)([sample(6, 1, 0)]).to("meta")
    tensors = [batch.input_ids, batch.labels, batch.attention_mask, batch.pixel_values, batch.image_grid_hw]
    assert {tensor.device.type for tensor in [*tensors, batch.counted, batch.num_images] if tensor is not None} == {
        "meta"
    }


def test_a_batch_prints_its_size_not_its_tensors() -> None:
    batch = PaddedCollate(0)([sample(6, 1, 0), sample(4, 0, 1)])
    assert repr(batch) == f"VLMBatch(2 x 6 tokens, 1 images, {batch.num_label_tokens} label tokens)"


# Videos and sounds


@pytest.fixture(scope="module")
def varied() -> list[Sample]:
    return varied_samples(media_processor(0.5))


def test_media_of_all_kinds_follow_on_in_reading_order(varied: list[Sample]) -> None:
    for batch in (PaddedCollate(0)(varied), PackedCollate()(varied)):
        assert batch.num_images.tolist() == [2, 0, 0, 1, 0]
        assert batch.num_videos.tolist() == [2, 0, 1, 0, 0]
        assert batch.num_clips.tolist() == [3, 0, 0, 0, 1]  # a sound of two clips, and one of one
        for name in ("pixel_values", "image_grid_hw", "pixel_values_videos", "video_grid_thw", "num_video_tokens"):
            expected = torch.cat([value for item in varied if (value := getattr(item, name)) is not None])
            assert torch.equal(getattr(batch, name), expected), name


def test_clips_of_all_samples_are_padded_to_the_longest(varied: list[Sample]) -> None:
    batch = PaddedCollate(0)(varied)
    longest = max(item.input_features.shape[1] for item in varied if item.input_features is not None)
    assert batch.input_features.shape == (4, longest, 32)
    assert batch.input_features_mask.dtype == torch.bool
    start = 0
    for item in (item for item in varied if item.input_features is not None):
        clips, frames = item.input_features.shape[:2]
        own, mask = batch.input_features[start : start + clips], batch.input_features_mask[start : start + clips]
        assert torch.equal(own[:, :frames], item.input_features)
        assert torch.equal(mask[:, :frames], item.input_features_mask)
        assert not own[:, frames:].any()
        assert not mask[:, frames:].any()
        start += clips
    assert varied[-1].input_features.shape[1] < longest


def test_token_types_stand_beside_tokens(varied: list[Sample]) -> None:
    padded, packed = PaddedCollate(0)(varied), PackedCollate()(varied)
    assert padded.mm_token_type_ids.shape == padded.input_ids.shape
    assert packed.mm_token_type_ids.shape == packed.input_ids.shape == (1, sum(map(len, varied)))
    for row, item in enumerate(varied):
        types = item.mm_token_type_ids
        # Text and images need no telling: theirs may be zeros.
        types = torch.zeros_like(item.input_ids) if types is None else types
        assert torch.equal(padded.mm_token_type_ids[row, : len(item)], types)
        assert not padded.mm_token_type_ids[row, len(item) :].any()
        start, end = packed.cu_seqlens[row : row + 2].tolist()
        assert torch.equal(packed.mm_token_type_ids[0, start:end], types)


def test_what_no_sample_has_is_left_out(varied: list[Sample]) -> None:
    images = PaddedCollate(0)([varied[3], varied[1]]).model_inputs()
    assert set(images) == {"input_ids", "attention_mask", "pixel_values", "image_grid_hw", "num_images"}
    videos = PackedCollate()([varied[2]]).model_inputs()
    assert set(videos) == {
        "input_ids",
        "cu_seqlens",
        "mm_token_type_ids",
        "pixel_values_videos",
        "video_grid_thw",
        "num_video_tokens",
        "num_images",
        "num_videos",
    }
    sounds = PaddedCollate(0)([varied[4]]).model_inputs()
    assert set(sounds) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "input_features",
        "input_features_mask",
        "num_images",
        "num_clips",
    }


def test_to_moves_every_medium(varied: list[Sample]) -> None:
    batch = PaddedCollate(0)(varied).to("meta")
    assert {value.device.type for value in batch.model_inputs().values()} == {"meta"}
    assert len(batch.model_inputs()) == 13


def test_a_batch_of_all_kinds_prints_their_numbers(varied: list[Sample]) -> None:
    assert "3 images, 3 videos, 4 clips of sound" in repr(PaddedCollate(0)(varied))
