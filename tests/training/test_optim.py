"""Which parameter is in which group with which numbers, and the exact values of the schedule."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts, NemotronHTopkRouter

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.optim import check_no_decay, parameter_groups, warmup_cosine

RATES = {"vision": 1e-6, "projector": 1e-4, "language": 1e-5}


@pytest.fixture
def model(make_model):
    """All kinds of layers."""
    model = make_model(pattern="ME*-", mlp_bias=True).train()
    freeze(model, [])
    return model


def names_of(model: NemotronVL) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def grouped_names(model: NemotronVL, groups) -> dict[str, list[str]]:
    names = names_of(model)
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def matrices(model: NemotronVL) -> set[str]:
    """Weights that multiply activations, told from the kind of module that owns them."""
    found = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | NemotronHTopkRouter):
            found.add(f"{prefix}.weight")
        elif isinstance(module, NemotronHExperts):
            found |= {f"{prefix}.up_proj", f"{prefix}.down_proj"}
    return found


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, RATES, 0.1)
    grouped = [name for names in grouped_names(model, groups).values() for name in names]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_parts_have_their_own_rate_and_only_matrices_decay(model):
    groups = parameter_groups(model, RATES, 0.1)
    numbers = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert numbers == {
        "vision": (1e-6, 0.1),
        "vision/no_decay": (1e-6, 0.0),
        "projector": (1e-4, 0.1),
        "projector/no_decay": (1e-4, 0.0),
        "language": (1e-5, 0.1),
        "language/no_decay": (1e-5, 0.0),
    }
    modules = {
        "vision": "vision_model.",
        "projector": "multi_modal_projector.",
        "language": "language_model.",
    }
    for group, names in grouped_names(model, groups).items():
        assert all(name.startswith(modules[group.partition("/")[0]]) for name in names)


def test_what_decays_is_told_by_the_kind_of_layer(model):
    grouped = grouped_names(model, parameter_groups(model, 1e-5, 0.1))
    decayed = {name for group, names in grouped.items() if not group.endswith("/no_decay") for name in names}
    spared = {name for group, names in grouped.items() if group.endswith("/no_decay") for name in names}
    assert decayed == matrices(model)
    mixer = "language_model.model.layers.0.mixer"
    assert spared >= {
        f"{mixer}.A_log",
        f"{mixer}.D",
        f"{mixer}.dt_bias",
        f"{mixer}.conv1d.bias",
        f"{mixer}.norm.weight",
        "language_model.model.layers.3.mixer.up_proj.bias",
        "language_model.model.norm_f.weight",
        "multi_modal_projector.layer_norm.weight",
        "vision_model.embeddings.position_embedding",
        "vision_model.embeddings.cls_register_token",
        "vision_model.encoder.layer.0.norm1.bias",
        "vision_model.encoder.layer.0.attention.q_proj.bias",
    }


def test_a_step_without_gradients_shrinks_matrices_and_nothing_else(model):
    optimizer = AdamW(parameter_groups(model, RATES, 0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rates = {"vision_model": 1e-6, "multi_modal_projector": 1e-4, "language_model": 1e-5}
    for name, parameter in model.named_parameters():
        factor = 1 - rates[name.partition(".")[0]] * 0.5 if name in matrices(model) else 1
        assert torch.equal(parameter, before[name] * torch.tensor(factor)), name


def test_one_rate_serves_all_parts(model):
    assert {group["lr"] for group in parameter_groups(model, 3e-5, 0.1)} == {3e-5}


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_a_frozen_part_has_no_group_and_needs_no_rate(model, part):
    freeze(model, [part])
    rates = {name: rate for name, rate in RATES.items() if name != part}
    expected = {group for name in rates for group in (name, f"{name}/no_decay")}
    for given in (rates, RATES):
        assert {group["name"] for group in parameter_groups(model, given, 0.1)} == expected


def test_a_trainable_part_without_a_rate_is_an_error(model):
    with pytest.raises(ValueError, match="no rate for 'projector'"):
        parameter_groups(model, {"vision": 1e-6, "language": 1e-5}, 0.1)


def test_a_rate_for_an_unknown_part_is_an_error(model):
    with pytest.raises(ValueError, match=r"lr names \['tower'\]; expected parts among vision, projector, audio, "):
        parameter_groups(model, {**RATES, "tower": 1e-6}, 0.1)


def schedule_of(steps: int, total: int, warmup: float, minimum: float, rates=(1.0,)) -> list[tuple[float, ...]]:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = SGD(groups)
    schedule = warmup_cosine(optimizer, total, warmup, minimum)
    values = []
    for _ in range(steps):
        values.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return values


def test_warm_up_is_linear_and_then_a_cosine_falls_to_the_minimum():
    values = [value for (value,) in schedule_of(11, total=10, warmup=2, minimum=0.1)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert values == pytest.approx([0.0, 0.5, *cosine])
    assert values[2] == 1.0
    assert values[6] == pytest.approx(0.55)
    assert values[10] == pytest.approx(0.1)


def test_every_group_keeps_its_own_peak():
    for vision, language in schedule_of(10, total=10, warmup=3, minimum=0.2, rates=(1e-6, 1e-4)):
        assert vision == pytest.approx(language / 100)


@pytest.mark.parametrize(("warmup", "peak"), [(0, 0), (0.0, 0), (0.3, 6), (0.03, 1), (1, 1), (5, 5)], ids=str)
def test_warm_up_is_a_number_of_steps_or_a_fraction_of_the_run(warmup, peak):
    values = [value for (value,) in schedule_of(20, total=20, warmup=warmup, minimum=0.0)]
    assert values.index(max(values)) == peak
    assert values[peak] == 1.0


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    assert schedule_of(3, total=3, warmup=6, minimum=0.1) == [
        (0.0,),
        (pytest.approx(1 / 6),),
        (pytest.approx(1 / 3),),
    ]


def layer_of(name: str) -> int | None:
    return int(name.split(".")[3]) if name.startswith("vision_model.encoder.layer.") else None


def test_layer_decay_is_the_formula_of_beit_and_mae(make_model):
    """As in facebookresearch/mae util/lr_decay.py: 12 blocks there, 4 here; the projector is the head."""
    model = make_model(vision_layers=4).train()
    freeze(model, [])
    groups = parameter_groups(model, RATES, 0.1, layer_decay=0.75)
    scales = [0.75 ** (5 - number) for number in range(6)]  # MAE's list for num_layers = len(blocks) + 1
    rates = {group["name"]: group["lr"] for group in groups}
    for name, names in grouped_names(model, groups).items():
        layers = {layer_of(key) for key in names}
        assert len(layers) == 1, f"{name} mixes layers"
        layer = layers.pop()
        if name.startswith("vision"):
            assert rates[name] == pytest.approx(1e-6 * (scales[0] if layer is None else scales[layer + 1]))
    assert rates["vision/embeddings"] < rates["vision/layer_00"] < rates["vision/layer_03/no_decay"] < 1e-6
    assert (rates["projector"], rates["language"]) == (1e-4, 1e-5)
    assert len(rates) == len(groups), "names are unique, or schedules cannot be logged"
    grouped = sorted(name for names in grouped_names(model, groups).values() for name in names)
    assert grouped == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_layer_decay_of_a_frozen_tower_changes_nothing(model):
    freeze(model, ["vision"])
    assert grouped_names(model, parameter_groups(model, RATES, 0.1, layer_decay=0.5)) == grouped_names(
        model, parameter_groups(model, RATES, 0.1)
    )


def test_named_parameters_are_spared_from_weight_decay(model):
    patterns = ["language.model.embeddings.weight", "vision.encoder.layer.*.mlp.*"]
    default, spared = (
        grouped_names(model, parameter_groups(model, RATES, 0.1, no_decay=names)) for names in ((), patterns)
    )
    for part in ("vision", "projector", "language"):
        moved = set(default[part]) - set(spared[part])
        assert moved == set(spared[f"{part}/no_decay"]) - set(default[f"{part}/no_decay"])
        assert (
            moved
            == {
                "vision": {f"vision_model.encoder.layer.0.mlp.fc{number}.weight" for number in (1, 2)},
                "projector": set(),
                "language": {"language_model.model.embeddings.weight"},
            }[part]
        )


@pytest.mark.parametrize("pattern", ["language_model.model.embeddings.weight", "vision.encoder.layers.*", "lm_head"])
def test_a_pattern_that_matches_nothing_is_an_error(model, pattern):
    with pytest.raises(ValueError, match=rf"no_decay names '{re.escape(pattern)}', which matches none of the model's"):
        check_no_decay(model, ["language.*", pattern])


def test_a_pattern_may_name_a_part_that_is_frozen(model):
    freeze(model, ["vision"])
    assert parameter_groups(model, RATES, 0.1, no_decay=["vision.*"])


def test_biases_of_attention_to_positions_are_biases():
    model = NemotronVL(NemotronVLConfig.tiny(vocab_size=266, pattern="M", audio_token_id=263))
    names = grouped_names(model, parameter_groups(model, 1e-3, 0.1))
    biases = {f"audio_tower.layers.0.self_attn.bias_{letter}" for letter in "uv"}
    assert biases <= set(names["audio/no_decay"])
    assert "audio_tower.layers.0.self_attn.q_proj.weight" in names["audio"]
