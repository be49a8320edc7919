"""Adapters: what they are put on, what is told of it, and that each of them is trained and merged as peft does."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_vlm import NemotronVL
from lightning_vlm.models.lora import Lora, adapters_of, add_adapters, without_adapters
from lightning_vlm.models.parts import parts_of
from lightning_vlm.schema import DataError
from lightning_vlm.training.recomputation import recompute_activations

EVERYTHING = Lora(
    language=["attention", "mamba", "mlp", "experts"],
    **dict.fromkeys(("vision", "projector", "audio", "audio_projector"), "lora"),
    rank=3,
    alpha=6.0,
)


@pytest.fixture
def model(make_model, shake) -> NemotronVL:
    return shake(make_model(pattern="ME*-", vocab_size=266, audio_token_id=263))


def shake_adapters(model: nn.Module) -> None:
    with torch.no_grad():
        for adapter in adapters_of(model):
            model.get_parameter(adapter.b).normal_(std=0.05)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_table_counts_matrices_of_each_kind(model):
    coverage = add_adapters(model, Lora(projector="full", rank=4, alpha=8.0))
    assert str(coverage) == (
        "LoRA of rank 4:\n"
        "part             layers     trained  adapters  matrices  covered  parameters\n"
        "vision           blocks     frozen          0         6       0%           0\n"
        "projector        projector  full            0         2      all      10,240\n"
        "audio            blocks     frozen          0        18       0%           0\n"
        "audio_projector  projector  frozen          0         2       0%           0\n"
        "language         mamba      lora            2         2     100%       1,568\n"
        "language         experts    frozen          0         8       0%           0\n"
        "language         mlp        lora            4         4     100%       1,280\n"
        "language         attention  lora            4         4     100%         896"
    )
    assert coverage.warnings() == []
    adapters = sum(model.get_parameter(n).numel() for a in adapters_of(model) for n in (a.a, a.b))
    assert adapters == 1568 + 1280 + 896
    projector = {f"multi_modal_projector.{name}" for name, _ in model.multi_modal_projector.named_parameters()}
    assert trainable(model) == {n for a in adapters_of(model) for n in (a.a, a.b)} | projector


def test_less_than_half_of_a_part_is_told(model):
    [warning] = add_adapters(model, Lora(language=["attention"])).warnings()
    assert warning == (
        "adapters are on 4 of the 10 matrices of language (40%); it has mamba, mlp besides: name them in lora.language "
        "unless this is meant"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": ["conv"]}, "lora.language is 'conv'; expected attention, mamba, mlp, experts"),
        ({"vision": "half"}, "lora.vision is 'half'; expected lora, full, frozen"),
        ({"language": []}, "lora gives adapters to nothing; name kinds of layers in lora.language"),
        ({"language": "full"}, "lora gives adapters to nothing"),
        ({"rank": 0}, "rank 0, alpha 32 and dropout 0; expected a rank of at least 1"),
        ({"language": ["experts"], "dropout": 0.1}, "lora.dropout does not work with adapters on experts; set it to 0"),
    ],
)
def test_wrong_settings_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


def test_what_the_model_has_not_cannot_have_adapters(make_model):
    model = make_model(pattern="M*-")
    message = r"model\.lora\.language: 'experts' matches nothing, no layer of M\*- is one; name some of attention, m"
    with pytest.raises(DataError, match=message):
        add_adapters(model, Lora(language=["experts", "mlp"]))
    with pytest.raises(DataError, match=r"lora\.audio: 'lora' is for a part that the model has not; leave it out"):
        add_adapters(model, Lora(audio="lora"))
    assert not [m for m in model.modules() if isinstance(m, LoraLayer)]


def test_a_new_adapter_changes_nothing(model, make_batch):
    batch = make_batch([[5, (2, 6), 3], [8]])
    with torch.no_grad():
        before = model(**batch).logits
        add_adapters(model, EVERYTHING)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_adapter_gets_a_gradient(model, make_batch, packed, recomputed):
    add_adapters(model, EVERYTHING)
    recompute_activations(model.train(), recomputed)
    shake_adapters(model)
    batch = make_batch([[5, (2, 6), 3]])
    sound = {
        "input_ids": torch.tensor([[7, 263, 263, 9]]),
        "labels": torch.tensor([[7, -100, -100, 9]]),
        "input_features": torch.randn(1, 16, 32),
    }
    if packed:
        del batch["attention_mask"]
        batch["cu_seqlens"] = torch.tensor([0, 5, batch["input_ids"].shape[1]], dtype=torch.int32)
        sound["cu_seqlens"] = torch.tensor([0, 4], dtype=torch.int32)
    (model(**batch).loss + model(**sound).loss).backward()
    for adapter in adapters_of(model):
        for name in (adapter.a, adapter.b):
            gradient = model.get_parameter(name).grad
            assert gradient is not None, name
            assert gradient.any(), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(model.get_parameter(name).grad is None for name in frozen)


def test_our_merge_is_pefts(model, make_batch):
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model, EVERYTHING)
    shake_adapters(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merged = dict(plain)
    for adapter in adapters_of(model):
        merged[without_adapters(adapter.base)] += adapter.delta(state[adapter.a], state[adapter.b])
    batch = make_batch([[5, (2, 6), 3], [8]])
    with torch.no_grad():
        expected = model(**batch).logits
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    theirs = {without_adapters(name): value for name, value in model.state_dict().items() if "lora_" not in name}
    assert theirs.keys() == merged.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)  # 2.4e-7 measured
    ours = NemotronVL(model.config).eval()
    ours.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, expected, rtol=0, atol=1e-4)


def test_a_model_on_the_meta_device_has_the_same_adapters(model):
    with torch.device("meta"):
        planned = NemotronVL(model.config)
        table = str(add_adapters(planned, EVERYTHING))
    assert str(add_adapters(model, EVERYTHING)) == table
    assert adapters_of(planned) == adapters_of(model)
    assert all(parameter.is_meta for parameter in planned.parameters())


def test_frozen_parts_are_in_eval_mode(model):
    add_adapters(model.train(), Lora())
    assert {name: module.training for name, module in parts_of(model).items()} == {
        "vision": False, "projector": False, "audio": False, "audio_projector": False, "language": True,
    }  # fmt: skip
