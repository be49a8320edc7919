"""Padding: every token, label and patch of each sample is where it belongs, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.schema import IGNORE_INDEX, Sample


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
