"""The stages of a model, one after another, are the model: for every mix of media, padded and packed."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.schema import IGNORE_INDEX, DataError
from lightning_vlm.strategies.layer_times import measure_layers
from lightning_vlm.strategies.micro_batches import blank_like, equal_shapes
from lightning_vlm.strategies.stages import Stage, StageInputs, balance, divide_by_parameters, stage_table
from tests.fixtures.gradients import assert_same_gradients, gradients
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, varied_samples

ONE = torch.tensor(1.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    small = {"pattern": "M*-ME", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}
    return NemotronVL(NemotronVLConfig.tiny(**ALL_MEDIA, **small)).train()


def through_stages(model, batch, num_stages):
    layers = divide_by_parameters(model, num_stages)
    x = batch.input_ids
    for index, own in enumerate(layers):
        stage = Stage(model, own, index == 0, index == num_stages - 1)
        x = stage(x, StageInputs.of(batch.model_inputs(), batch.labels), ONE)
    return x


@pytest.mark.parametrize("pruning_rate", [0.0, 0.5])
@pytest.mark.parametrize("collate", [PaddedCollate(0), PackedCollate()], ids=["padded", "packed"])
@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_stages_are_the_model(model, collate, pruning_rate, num_stages):
    batch = collate(varied_samples(media_processor(pruning_rate)))
    whole = model(**batch.model_inputs(), labels=batch.labels, num_items_in_batch=1, skip_logits=True).loss
    expected = gradients_of(model, whole)
    loss = through_stages(model, batch, num_stages)
    assert loss.item() == whole.item()
    assert_same_gradients(gradients_of(model, loss), expected, 0.0)


@pytest.mark.parametrize("collate", [PaddedCollate(0), PackedCollate()], ids=["padded", "packed"])
def test_a_row_whose_media_do_not_fit_is_named(model, collate):
    batch = collate(varied_samples(media_processor(0.0)))
    row = next(index for index, images in enumerate(batch.num_images.tolist()) if images)
    images = (batch.input_ids == model.config.image_token_id).nonzero()
    batch.input_ids[tuple(images[0])] = 7
    inputs = StageInputs.of(batch.model_inputs(), batch.labels, [f"rows.jsonl:{n}" for n in range(1, 99)])
    with pytest.raises(DataError, match=f"^rows.jsonl:{row + 1}: .* placeholder"):
        Stage(model, range(1), True, False)(batch.input_ids, inputs)


@pytest.mark.parametrize("collate", [PaddedCollate(0), PackedCollate()], ids=["padded", "packed"])
def test_filling_up_changes_nothing(model, collate):
    samples = varied_samples(media_processor(0.5))
    batches = [collate(samples[:1]), collate(samples[1:]), collate(samples[2:3])]
    filled = equal_shapes(batches, pad_token_id=0, multiple=16)
    assert len({batch.input_ids.shape for batch in filled}) == 1
    assert filled[0].input_ids.shape[1] % 16 == 0
    for batch, full in zip(batches, filled):
        sums = [
            model(**one.model_inputs(), labels=one.labels, num_items_in_batch=1, skip_logits=True).loss
            for one in (batch, full)
        ]
        expected, actual = ([g for _, g in sorted(gradients_of(model, loss).items())] for loss in sums)
        assert sums[1].item() == pytest.approx(sums[0].item(), rel=1e-6)
        for one, other in zip(actual, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("collate", [PaddedCollate(0), PackedCollate()], ids=["padded", "packed"])
def test_a_blank_has_no_gradient(model, collate):
    blank = blank_like(collate(varied_samples(media_processor())), 0)
    assert (blank.labels == IGNORE_INDEX).all()
    loss = model(**blank.model_inputs(), labels=blank.labels, num_items_in_batch=1, skip_logits=True).loss
    loss.backward()
    assert loss.item() == 0
    found = gradients(model)
    assert len(found) > 20
    assert not any(gradient.any() for gradient in found.values())


def test_padded_and_packed_rows_do_not_mix():
    samples = varied_samples(media_processor())
    with pytest.raises(ValueError, match="padded rows and packed rows"):
        equal_shapes([PaddedCollate(0)(samples), PackedCollate()(samples)], 0)


@pytest.mark.parametrize(
    ("costs", "stages", "first", "last", "expected"),
    [
        ([1, 1, 1, 1], 2, 0, 0, [2, 2]),
        ([1, 1, 1, 1], 2, 2, 0, [1, 3]),
        ([1, 1, 1, 1], 2, 0, 2, [3, 1]),
        ([5, 1, 1, 1, 1, 1], 2, 0, 0, [1, 5]),
        ([1, 1, 1], 3, 100, 100, [1, 1, 1]),
        ([3, 1, 1, 3, 1, 1], 3, 0, 0, [2, 2, 2]),
    ],
)
def test_the_dearest_stage_is_as_cheap_as_can_be(costs, stages, first, last, expected):
    layers = balance(costs, stages, first, last)
    assert [len(own) for own in layers] == expected
    assert [index for own in layers for index in own] == list(range(len(costs)))


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return gradients(model)


def test_layers_are_measured_by_their_kind():
    small = {"hidden_size": 64, "intermediate_size": 4096, "vision_hidden_size": 32, "vision_layers": 1}
    with torch.device("meta"):
        model = NemotronVL(NemotronVLConfig.tiny(pattern="-*M-E", **small))
    costs, first, last = measure_layers(model, torch.device("cpu"), tokens=64)
    assert costs[0] == costs[3]
    assert len(set(costs)) == 4
    assert costs[0] > costs[1] > 0, "an MLP of this width takes longer than attention over 64 tokens"
    assert first > 0
    assert last > 0


def test_the_table_of_stages_counts_every_parameter_once(model):
    lines = stage_table(model, divide_by_parameters(model, 3), [0, 1, 0]).splitlines()
    sizes = [int(line.split(":")[1].split()[0].replace(",", "")) for line in lines]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert [line.split(":")[0] for line in lines] == ["stage 0 on rank 0", "stage 1 on rank 1", "stage 2 on rank 0"]
    assert "  vision, projector, audio, audio_projector, embeddings, layer" in lines[0]
    assert lines[2].endswith(", norm, head")
