"""Adapters: what they are put on, what is told of it, and that each of them is trained and merged as peft does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLModule, VLMDataModule
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


@pytest.mark.parametrize("packed", [False, True])
def test_in_bfloat16_too_a_new_adapter_changes_nothing(model, make_batch, packed):
    batch = make_batch([[5, (2, 6), 3]])
    if packed:
        del batch["attention_mask"]
        batch["cu_seqlens"] = torch.tensor([0, 5, batch["input_ids"].shape[1]], dtype=torch.int32)
    model.bfloat16()
    with torch.no_grad():
        before = model(**batch).logits
        add_adapters(model, EVERYTHING)
        after = model(**batch).logits
    assert torch.equal(after, before)


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


# Precision


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for each in adapters_of(model) for name in (each.a, each.b)}


def dtypes_of(parameters: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in parameters}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_cast_takes_a_bit_of_an_adapter(model, dtype):
    add_adapters(model, EVERYTHING)
    shake_adapters(model)
    before = {name: value.clone() for name, value in factors_of(model).items()}
    model.to(dtype=dtype).to(dtype)
    after = factors_of(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert dtypes_of(after.values()) == {torch.float32}
    others = [value for name, value in model.named_parameters() if name not in after]
    assert dtypes_of(others) == {dtype}
    model.to("meta")
    assert dtypes_of(factors_of(model).values()) == {torch.float32}
    assert dtypes_of(factors_of(model.to_empty(device="cpu").double()).values()) == {torch.float64}


def test_adapters_compute_in_the_precision_of_their_input_and_have_gradients_in_their_own(model):
    """Else the backward pass would keep a float32 copy of each adapter's input."""
    add_adapters(model, Lora(rank=4))
    shake_adapters(model)
    model.bfloat16()
    attention = model.language_model.model.layers[2].mixer
    inputs = torch.randn(1, 7, 32, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = [projection(inputs) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert dtypes_of(outputs) == {torch.bfloat16}
    assert torch.float32 not in dtypes_of(kept)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() == inputs.numel()} == {inputs.data_ptr()}
    sum(output.float().pow(2).sum() for output in outputs).backward()
    gradients = [value.grad for value in factors_of(attention).values() if value.grad is not None]
    assert len(gradients) == 6
    assert dtypes_of(gradients) == {torch.float32}


class Steps(L.Callback):
    """Begins with adapters that do something, and remembers what each step moved of what had a gradient."""

    def __init__(self) -> None:
        self.began: dict[str, torch.Tensor] = {}
        self.moved = self.driven = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:
            shake_adapters(pl_module.network)
        self.began = {name: value.clone() for name, value in pl_module.network.state_dict().items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        factors = factors_of(pl_module.network)
        self.before = {name: value.detach().clone() for name, value in factors.items()}
        self.has_gradient = {name: value.grad != 0 for name, value in factors.items() if value.grad is not None}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        for name, has_gradient in self.has_gradient.items():
            now = pl_module.network.get_parameter(name)
            self.driven += int(has_gradient.sum())
            self.moved += int((has_gradient & (now != self.before[name])).sum())


def test_in_bf16_true_small_steps_of_adapters_are_not_rounded_away(make_task, processor, tmp_path):
    """Were the factors bfloat16 as the rest is, 518 of the 5,688 elements would move in the first step.

    With betas of zero each step is the learning rate, whatever the gradients before: none cancels another.
    """
    file = str(make_task(12))
    lora = {**asdict(EVERYTHING), "projector": "full", "audio": "frozen", "audio_projector": "frozen"}

    def fit(max_steps: int, resumed: Path | None = None) -> tuple[NemotronVLModule, Steps]:
        options = {"lr": 2e-5, "betas": (0.0, 0.0), "weight_decay": 0.0, "warmup": 0, "generate_on_validation": False}
        config = NemotronVLConfig.tiny(pattern="ME*-", hidden_size=32, vision_hidden_size=32, vision_layers=1)
        module, steps = NemotronVLModule(config=config, lora=lora, **options), Steps()
        quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        trainer = L.Trainer(accelerator="cpu", precision="bf16-true", max_steps=max_steps, gradient_clip_val=1.0,
                            callbacks=[steps], **dict.fromkeys(quiet, False))  # fmt: skip
        data = VLMDataModule(train=file, processor=processor, batch_size=4)
        trainer.fit(module, datamodule=data, ckpt_path=resumed)
        return module, steps

    def check(module: NemotronVLModule, steps: Steps) -> None:
        factors = factors_of(module.network)
        assert dtypes_of(factors.values()) == {torch.float32}
        others = {name: value for name, value in module.network.named_parameters() if name not in factors}
        assert dtypes_of(others.values()) == {torch.bfloat16}
        states = module.optimizers().optimizer.state
        assert dtypes_of(states[value]["exp_avg"] for value in factors.values()) == {torch.float32}
        assert steps.moved == steps.driven > 0.9 * sum(value.numel() for value in factors.values())

    module, steps = fit(1)
    check(module, steps)
    path = tmp_path / "run.ckpt"
    module.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, value in module.network.state_dict().items():
        assert saved[f"model.{name}"].dtype == value.dtype, name
        assert torch.equal(saved[f"model.{name}"], value), name
    resumed, steps = fit(2, path)
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in steps.began.items())
    check(resumed, steps)
