"""The table's numbers are the optimizer's, and its parameters are the model's, each once."""

from __future__ import annotations

import json

import torch

from lightning_vlm.models.architecture import describe_architecture
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.optim import warmup_cosine
from lightning_vlm.training.optimizers import make_optimizer
from lightning_vlm.training.parameter_table import parameter_table, table_text, table_values

RATES = {"vision": 2e-6, "projector": 1e-4, "language": 1e-5}


def rows_of(model, name="adamw", frozen=(), **options):
    freeze(model, frozen)
    optimizer = make_optimizer(model, name, RATES, (0.9, 0.95), 0.05, **options)
    warmup_cosine(optimizer, 100, 10, 0.1)  # the rate of the first step is 0: not what is asked about
    return parameter_table(model, dict(model.named_parameters()), [optimizer])


def test_each_part_has_its_numbers(make_model):
    model = make_model(pattern="ME*-")
    rows = {row.group: row for row in rows_of(model, frozen=["vision"])}
    assert list(rows) == ["vision/frozen", "projector", "projector/no_decay", "language", "language/no_decay"]
    assert (rows["projector"].lr, rows["projector"].weight_decay, rows["projector"].optimizer) == (1e-4, 0.05, "AdamW")
    assert rows["language/no_decay"].weight_decay == 0
    frozen = rows["vision/frozen"]
    assert (frozen.trainable, frozen.lr, frozen.weight_decay, frozen.optimizer) == (0, None, None, None)
    total = describe_architecture(model).total
    assert sum(row.parameters for row in rows.values()) == total.parameters
    assert sum(row.trainable for row in rows.values()) == total.trainable


def test_layers_and_optimizers_have_rows(make_model):
    rows = {row.group: row for row in rows_of(make_model(vision_layers=2), "muon", layer_decay=0.5)}
    assert rows["vision/layer_01/muon"].optimizer == "Muon"
    assert rows["vision/layer_01/muon"].lr == 1e-6
    assert rows["vision/embeddings"].optimizer == "AdamW"
    assert rows["vision/embeddings"].lr == 0.25e-6


def test_what_somebodys_optimizer_leaves_out_is_told(make_model):
    model = make_model()
    freeze(model, [])
    optimizer = torch.optim.SGD(model.language_model.parameters(), lr=0.1)
    rows = {row.group: row for row in parameter_table(model, dict(model.named_parameters()), [optimizer])}
    assert set(rows) == {"vision/left out", "projector/left out", "group 0"}
    assert rows["vision/left out"].trainable == rows["vision/left out"].parameters > 0
    assert (rows["group 0"].part, rows["group 0"].optimizer) == ("language", "SGD")


def test_it_reads_as_a_table_and_as_plain_values(make_model):
    rows = rows_of(make_model(), frozen=["language"])
    text = table_text(rows)
    lines = text.splitlines()
    assert lines[0].split() == ["part", "group", "parameters", "trainable", "lr", "weight", "decay", "optimizer"]
    assert [line.split()[:2] for line in lines[1:-1]] == [[row.part, row.group] for row in rows]
    assert lines[-1].startswith("total")
    assert f"{sum(row.trainable for row in rows):,}" in lines[-1]
    values = table_values(rows)
    assert json.loads(json.dumps(values)) == values
    assert values["vision"]["lr"] == 2e-6
    assert values["language/frozen"]["trainable"] == 0
