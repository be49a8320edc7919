"""What is told of a model is what it holds: by the released models' own numbers, and by tiny models' tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.models.architecture import COMPONENTS, aligned, describe_architecture, format_bytes
from lightning_vlm.models.parts import PARTS
from lightning_vlm.training.freezing import freeze
from tests.fixtures.released_models import (
    attention_shapes,
    config_12b,
    config_omni,
    mamba_shapes,
    mixture_shapes,
    mlp_shapes,
    shapes_12b,
    shapes_omni,
    weights_of,
)

ROUTER_BIASES = 23 * 128  # e_score_correction_bias of 23 MoE layers with 128 experts: a buffer in transformers
LAYER_SCALES = 32 * 2 * 1280  # of 32 blocks, in transformers' RADIO alone
PREFIXES = {
    "vision": ("vision_model.",),
    "projector": ("mlp1.",),
    "audio": ("sound_encoder.",),
    "audio_projector": ("sound_projection.",),
    "language": ("language_model.",),
}


def on_meta(config: NemotronVLConfig) -> NemotronVL:
    with torch.device("meta"):
        return NemotronVL(config).to(torch.bfloat16)


# The released models


def test_the_table_of_keys_is_that_of_the_released_files() -> None:
    omni = shapes_omni()
    assert len(omni) + 2 == 7349, "with the feature extractor's fb and window: the tensors of the model's card"
    assert weights_of(omni) == 33_015_549_760 == 33_015_546_816 + ROUTER_BIASES, "spec: our sum, and the card's"
    assert len(shapes_12b(131072)) == 761


def test_the_omni_has_exactly_its_parameters() -> None:
    model, shapes = on_meta(config_omni()), shapes_omni()
    told = describe_architecture(model, detailed=True)
    assert told.total.parameters == 33_015_546_816
    assert told.inside is not None
    (mixture,) = [block for block in told.inside.blocks if block.kind == "MoE"]
    assert mixture.count.fixed == ROUTER_BIASES
    assert told.total.parameters + mixture.count.fixed == 33_015_549_760
    assert sum(parameter.numel() for parameter in model.parameters()) == 33_015_546_816 + LAYER_SCALES

    counts = {part.name: part.count for part in told.parts}
    assert list(counts) == list(PARTS)
    for name, prefixes in PREFIXES.items():
        buffers = ROUTER_BIASES if name == "language" else 0
        assert counts[name].parameters + buffers == weights_of(shapes, *prefixes), name
    assert {name: count.parameters for name, count in told.components.items()} == {
        "language_model": 31_577_937_344,
        "vision_model": 653_611_520,
        "projector": 159_912_960,
        "audio": 624_084_992,
        "other": 0,
    }
    assert counts["vision"].fixed == LAYER_SCALES + 2, "and summary_idxs"
    assert counts["audio"].fixed == 24 * (2 * 1024 + 1) + 512, "statistics of 24 normalisations, frequencies"
    assert told.total.parameter_bytes == 2 * 33_015_546_816
    assert told.dtypes == {"bfloat16": 33_015_546_816}


def test_the_inside_of_the_omni() -> None:
    told = describe_architecture(on_meta(config_omni()), detailed=True).inside
    assert told is not None
    assert told.pattern == "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    norm = 2688  # before each layer
    expert = weights_of(mlp_shapes(2688, 1856))
    mixture = weights_of(mixture_shapes()) - 128 + norm
    blocks = {
        block.kind: (block.layers, block.each, block.active) for block in told.blocks if block.path == "model.layers"
    }
    mamba, attention = weights_of(mamba_shapes(2688, 64, 64)) + norm, weights_of(attention_shapes(2688, 32, 2)) + norm
    assert blocks == {
        "Mamba2": (23, mamba, 23 * mamba),
        "MoE": (23, mixture, 23 * (mixture - (128 - 6) * expert)),
        "attention": (6, attention, 6 * attention),
    }
    assert told.experts == (128, 6)
    assert told.language_parameters == 31_577_937_344
    assert told.language_active == 31_577_937_344 - 23 * 122 * 2 * 1856 * 2688 == 3_580_073_408
    rows = {(block.part, block.path): block for block in told.blocks}
    assert rows["language", "model.embeddings"].each == rows["language", "lm_head"].each == 131072 * 2688
    assert rows["vision", "encoder.layer"].layers == 32
    assert rows["audio", "layers"].layers == 24
    assert not told.tied


@pytest.mark.parametrize("vocab_size", [131_082, 131_584])
def test_the_12b_has_what_its_keys_add_up_to(vocab_size: int) -> None:
    told, shapes = describe_architecture(on_meta(config_12b(vocab_size)), detailed=True), shapes_12b(vocab_size)
    counts = {part.name: part.count.parameters for part in told.parts}
    assert counts == {name: weights_of(shapes, *PREFIXES[name]) for name in ("vision", "projector", "language")}
    mamba = 5120 * 22656 + 10240 * 5120 + 12288 * (4 + 1) + 10240 + 3 * 128
    layers = 28 * mamba + 28 * 2 * 5120 * 20480 + 6 * 2 * (5120 + 1024) * 5120 + 62 * 5120
    language = layers + 5120 + 2 * vocab_size * 5120
    vision = 1280 * (768 + 128 * 128 + 16) + 32 * (12 * 1280**2 + 13 * 1280)
    assert told.total.parameters == language + vision + 5120 + 2 * 5120 * 20480
    assert told.components["audio"].parameters == 0
    assert told.inside is not None
    kinds = {block.kind: block.layers for block in told.inside.blocks if block.path == "model.layers"}
    assert kinds == {"Mamba2": 28, "MLP": 28, "attention": 6}
    assert told.inside.experts is None
    assert told.inside.language_active == told.inside.language_parameters


# Tiny models


def test_sums_are_those_of_the_tensors(make_model: Callable[..., NemotronVL]) -> None:
    model = make_model(pattern="ME*-EM*", video=True, audio_token_id=5)
    model.vision_model.to(torch.bfloat16)
    told = describe_architecture(model, detailed=True)
    scales = [parameter for name, parameter in model.named_parameters() if "layer_scale" in name]
    weights = [parameter for name, parameter in model.named_parameters() if "layer_scale" not in name]
    fixed = [*scales, *model.buffers()]
    assert told.total.parameters == sum(tensor.numel() for tensor in weights)
    assert told.total.parameter_bytes == sum(tensor.numel() * tensor.element_size() for tensor in weights)
    assert told.total.fixed == sum(tensor.numel() for tensor in fixed)
    assert told.total.fixed_bytes == sum(tensor.numel() * tensor.element_size() for tensor in fixed)
    vision = told.components["vision_model"]
    assert vision.parameter_bytes == 2 * vision.parameters
    assert told.dtypes == {"bfloat16": vision.parameters, "float32": told.total.parameters - vision.parameters}
    assert list(told.components) == list(COMPONENTS)
    assert sum(told.components.values(), start=type(vision)()) == told.total
    assert told.inside is not None
    for part in told.parts:
        inner = sum((block.count for block in told.inside.blocks if block.part == part.name), start=type(vision)())
        assert inner == part.count, part.name


def test_the_meta_device_tells_the_same(make_model: Callable[..., NemotronVL]) -> None:
    model = make_model(pattern="ME*-", audio_token_id=5)
    with torch.device("meta"):
        empty = NemotronVL(model.config)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    assert describe_architecture(empty, detailed=True) == describe_architecture(model, detailed=True)


def test_tied_weights_are_counted_once(make_model: Callable[..., NemotronVL]) -> None:
    model = make_model()
    apart = describe_architecture(model, detailed=True)
    model.language_model.lm_head.weight = model.get_input_embeddings().weight
    tied = describe_architecture(model, detailed=True)
    assert apart.inside is not None
    assert tied.inside is not None
    assert apart.total.parameters - tied.total.parameters == model.get_input_embeddings().weight.numel()
    assert (apart.inside.tied, tied.inside.tied) == (False, True)
    assert "lm_head" not in {block.path for block in tied.inside.blocks}
    assert tied.inside.language_parameters == tied.components["language_model"].parameters
    assert "head     the embedding again (tied), counted once" in str(tied)


def test_states_are_those_of_the_run(make_model: Callable[..., NemotronVL]) -> None:
    model = make_model(audio_token_id=5)
    freeze(model, [])
    assert {part.count.state for part in describe_architecture(model).parts} == {"trainable"}, (
        "layer scales do not count"
    )
    freeze(model, ["vision", "audio_projector"])
    told = describe_architecture(model)
    states = {name: count.state for name, count in told.components.items()}
    assert states == {
        "language_model": "trainable",
        "vision_model": "frozen",
        "projector": "trainable",
        "audio": "partly",
        "other": "-",
    }
    assert told.components["audio"].trainable == sum(p.numel() for p in model.audio_tower.parameters())
    assert told.total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told.total.trainable_bytes == 4 * told.total.trainable


def test_what_no_part_holds_is_other(make_model: Callable[..., NemotronVL]) -> None:
    model = make_model()
    before = describe_architecture(model).total
    model.value_head = nn.Linear(32, 1)
    told = describe_architecture(model)
    assert told.components["other"].parameters == told.other.parameters == 33
    assert told.total.parameters == before.parameters + 33


def test_layers_that_differ_in_size_stand_apart(make_model: Callable[..., NemotronVL]) -> None:
    model = make_model(pattern="M-M-")
    mixer = model.language_model.model.layers[3].mixer
    mixer.up_proj = nn.Linear(32, 65)
    told = describe_architecture(model, detailed=True).inside
    assert told is not None
    assert [(block.kind, block.layers) for block in told.blocks if block.path == "model.layers"] == [
        ("Mamba2", 2),
        ("MLP", 1),
        ("MLP", 1),
    ]


def test_the_table(make_model: Callable[..., NemotronVL], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = make_model(pattern="ME")
    freeze(model, ["vision"])
    model.print_architecture(detailed=True, save_to_file=tmp_path / "new" / "arch.txt")
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "arch.txt").read_text() == printed
    assert printed.isascii()
    lines = printed.splitlines()
    assert lines[0].split() == ["component", "parameters", "share", "memory", "trainable", "state"]
    told = describe_architecture(model, detailed=True)
    count = told.components["vision_model"]
    share = f"{100 * count.parameters / told.total.parameters:.2f}"
    (vision,) = [line for line in lines if line.startswith("vision_model ")]
    assert vision.split() == ["vision_model", f"{count.parameters:,}", share, "%", f"{4 * count.parameters / 1024:.2f}",
                              "KiB", "0", "frozen"]  # fmt: skip
    assert lines[6].split()[:4] == ["total", f"{told.total.parameters:,}", "100.00", "%"]
    assert len({line.index(line.split()[1]) + len(line.split()[1]) for line in lines[:7]}) == 1, "aligned to the right"
    assert any(line.split()[:3] == ["language", "model.layers", "MoE"] for line in lines)
    assert "pattern  ME" in lines
    assert lines[-1].startswith("experts  a token meets 2 of 4 in each MoE layer: ")
    model.print_architecture()
    assert printed.startswith(capsys.readouterr().out.rstrip())


def test_for_machines_all_numbers_are_there(make_model: Callable[..., NemotronVL]) -> None:
    told = describe_architecture(make_model(pattern="ME"), detailed=True)
    data = json.loads(json.dumps(told.to_dict()))
    assert data["total"]["parameters"] == told.total.parameters
    assert sum(component["share"] for component in data["components"].values()) == pytest.approx(100)
    assert data["parts"]["projector"]["attribute"] == "multi_modal_projector"
    assert data["parts"]["projector"]["role"] == "connector"
    assert [block["kind"] for block in data["inside"]["blocks"] if block["path"] == "model.layers"] == ["Mamba2", "MoE"]
    assert "inside" not in describe_architecture(make_model()).to_dict()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB"), (1 << 52, "4096.00 TiB")],
)
def test_bytes_for_people(number: int, text: str) -> None:
    assert format_bytes(number) == text


def test_columns_are_aligned() -> None:
    assert aligned([("a", "b", "c"), ("long", "1,000", "x")], left=(0, 2)) == "a         b  c\nlong  1,000  x"
