"""Which optimizer takes what, that each is one object whose state is plain, and what is refused in a sentence."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.muon import MuonAdamW
from lightning_vlm.training.optimizers import make_optimizer

BETAS = (0.9, 0.95)


@pytest.fixture
def model() -> NemotronVL:
    torch.manual_seed(0)
    config = NemotronVLConfig.tiny(
        vocab_size=266, pattern="ME*-", hidden_size=64, vision_hidden_size=64, vision_layers=2, video=True,
        audio_token_id=263,
    )  # fmt: skip
    model = NemotronVL(config).train()
    freeze(model, [])
    return model


def give_gradients(model: NemotronVL, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def weights(model: NemotronVL) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def by_muon(model: NemotronVL) -> set[str]:
    groups = make_optimizer(model, "muon", 1e-3, BETAS, 0.1).param_groups
    taken = {id(p) for group in groups if group["algorithm"] == "muon" for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in taken}


def test_muon_takes_hidden_matrices_only(model: NemotronVL) -> None:
    taken = by_muon(model)
    assert all(parameter.ndim == 2 for name, parameter in model.named_parameters() if name in taken)
    assert taken >= {
        "vision_model.encoder.layer.1.attention.q_proj.weight",
        "vision_model.encoder.layer.0.mlp.fc2.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.weight",
        "audio_tower.layers.0.feed_forward1.linear1.weight",
        "embed_audio.linear_2.weight",
        "language_model.model.layers.0.mixer.in_proj.weight",
        "language_model.model.layers.0.mixer.out_proj.weight",
        "language_model.model.layers.1.mixer.shared_experts.up_proj.weight",
        "language_model.model.layers.2.mixer.o_proj.weight",
        "language_model.model.layers.3.mixer.down_proj.weight",
    }
    assert not taken & {
        "language_model.model.embeddings.weight",
        "language_model.lm_head.weight",
        "vision_model.embeddings.patch_projection.weight",
        "vision_model.embeddings.video_patch_projection.weight",
        "vision_model.embeddings.position_embedding",
        "vision_model.embeddings.cls_register_token",
        "language_model.model.layers.0.mixer.conv1d.weight",
        "language_model.model.layers.0.mixer.A_log",
        "language_model.model.layers.1.mixer.gate.weight",
        "language_model.model.layers.1.mixer.experts.up_proj",  # of three dimensions
        "audio_tower.layers.0.self_attn.bias_u",
        "audio_tower.layers.0.conv.pointwise_conv1.weight",
    }


def test_a_head_that_is_the_embedding_stays_with_adamw() -> None:
    model = NemotronVL(NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1))
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert not any("embeddings" in name or "lm_head" in name for name in by_muon(model))


def test_factors_of_adapters_stay_with_adamw(model: NemotronVL) -> None:
    layer: Any = model.vision_model.encoder.layer[0].attention
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(64, 4, bias=False)})
    assert "vision_model.encoder.layer.0.attention.lora_A.default.weight" in dict(model.named_parameters())
    assert not any("lora_A" in name for name in by_muon(model))


def test_it_steps_as_pytorchs_two_optimizers_do(model: NemotronVL) -> None:
    torch.manual_seed(0)
    other = NemotronVL(model.config).train()
    other.load_state_dict(model.state_dict())
    freeze(other, [])
    one = make_optimizer(model, "muon", 1e-2, BETAS, 0.1)
    taken = by_muon(other)
    split: dict[tuple[bool, float], list[nn.Parameter]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in one.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            split.setdefault((name in taken, group["weight_decay"]), []).append(other.get_parameter(name))
    muon = Muon(split[True, 0.1], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [{"params": split[False, decay], "weight_decay": decay} for decay in (0.1, 0.0)],
        lr=1e-2, betas=BETAS, fused=True,
    )  # fmt: skip
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(other, seed)
        one.step()
        muon.step()
        adamw.step()
    for name, weight in other.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


def test_muons_updates_have_the_size_of_adamws(model: NemotronVL) -> None:
    """So that one learning rate serves both: 0.2 is what AdamW's updates measure in training (arXiv:2502.16982)."""
    before = weights(model)
    optimizer = make_optimizer(model, "muon", 1e-2, BETAS, 0.0)
    give_gradients(model, 0)
    optimizer.step()
    for name in by_muon(model):
        size = (model.get_parameter(name) - before[name]).square().mean().sqrt() / 1e-2
        assert 0.1 < size < 0.3, name  # Newton-Schulz leaves singular values between 0.7 and 1.2


def test_one_schedule_and_one_state_serve_both(model: NemotronVL) -> None:
    optimizer = make_optimizer(model, "muon", {"vision": 1e-3, "projector": 1e-2, "language": 1e-4,
                                               "audio": 1.0, "audio_projector": 1.0}, BETAS, 0.1)  # fmt: skip
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    give_gradients(model, 0)
    optimizer.step()
    schedule.step()
    assert isinstance(optimizer, MuonAdamW)
    found = {group["name"]: group["lr"] for inner in optimizer._inner.values() for group in inner.param_groups}
    assert found["language/muon"] == found["language"] == 5e-5
    assert found["projector/muon"] == 5e-3
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(optimizer.state_dict()["state"]) == len(trained)
    kinds = {tuple(sorted(state)) for state in optimizer.state.values()}
    assert kinds == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}


@pytest.mark.parametrize("frozen", [["vision", "language", "audio", "audio_projector"], []], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_a_loaded_state_goes_on_bit_by_bit(model: NemotronVL, name: str, frozen: list[str]) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    freeze(model, frozen)
    optimizer = make_optimizer(model, name, 1e-2, BETAS, 0.1)
    give_gradients(model, 0)
    optimizer.step()
    state, halfway = optimizer.state_dict(), weights(model)
    assert_plain(state)
    state = torch_roundtrip(state)
    give_gradients(model, 1)
    optimizer.step()
    expected = weights(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(halfway[key])
    other = make_optimizer(model, name, 1e-2, BETAS, 0.1)
    other.load_state_dict(state)
    other.step()
    assert all(torch.equal(weight, expected[key]) for key, weight in model.named_parameters())


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            assert_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in (torch.Tensor, int, float, bool, str, type(None)), type(value)


def torch_roundtrip(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_eight_bit_states_are_close_to_adamws_and_a_quarter_of_their_size(model: NemotronVL) -> None:
    pytest.importorskip("torchao")
    before, moved, states = weights(model), {}, {}
    for name in ("adamw", "adamw8bit"):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(before[key])
        optimizer = make_optimizer(model, name, 1e-3, BETAS, 0.0)
        for seed in range(3):
            give_gradients(model, seed)
            optimizer.step()
        weight = model.get_parameter("language_model.model.layers.3.mixer.up_proj.weight")
        moved[name] = weight.detach() - before["language_model.model.layers.3.mixer.up_proj.weight"]
        states[name] = optimizer.state_dict()["state"]
    cosine = torch.cosine_similarity(moved["adamw"].flatten(), moved["adamw8bit"].flatten(), dim=0)
    assert cosine > 0.99  # measured: 0.9996
    quantised = [value for state in states["adamw8bit"].values() for value in state.values() if isinstance(value, dict)]
    assert {value["codes"].dtype for value in quantised} == {torch.uint8}
    assert {value["signed"] for value in quantised} == {True, False}
    assert all(value["scale"].numel() * 256 == value["codes"].numel() for value in quantised)


def test_a_step_on_a_cpu_compiles_nothing(model: NemotronVL, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    optimizer = make_optimizer(model, "adamw8bit", 1e-3, BETAS, 0.1)
    give_gradients(model, 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    optimizer.step()
    assert not torch._dynamo.utils.counters["stats"]


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(model: NemotronVL, name: str, mesh: Any) -> None:
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, own, nn.Parameter(distribute_tensor(getattr(module, own).detach(), mesh)))


def test_shards_are_refused_by_eight_bits_and_fused_apart(model: NemotronVL, mesh: Any) -> None:
    shard(model, "multi_modal_projector.linear_1.weight", mesh)
    fused = {
        group["name"]: group.get("fused") for group in make_optimizer(model, "adamw", 1e-3, BETAS, 0.1).param_groups
    }
    assert fused["projector"] is None, "one kernel does not take shards and whole tensors together"
    assert fused["language"] is fused["projector/no_decay"] is True
    shard(model, "multi_modal_projector.linear_2.weight", mesh)
    groups = make_optimizer(model, "adamw", 1e-3, BETAS, 0.1).param_groups
    assert {group["name"]: group.get("fused") for group in groups}["projector"] is True
    pytest.importorskip("torchao")
    with pytest.raises(
        NotImplementedError, match=r"'adamw8bit' has 2 of \d+ parameters as shards; expected whole ones"
    ):
        make_optimizer(model, "adamw8bit", 1e-3, BETAS, 0.1)


def test_wrong_names_and_missing_packages_are_told(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    with pytest.raises(ValueError, match="optimizer is 'sgd'; expected one of adamw, adamw8bit, muon"):
        NemotronVLModule(config=config, optimizer="sgd")  # type: ignore[arg-type]
    for factor in (0.0, 1.5, -1):
        with pytest.raises(ValueError, match=f"layer_decay is {factor}; expected a factor above 0 and at most 1"):
            NemotronVLModule(config=config, layer_decay=factor)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.delitem(sys.modules, "lightning_vlm.training.adamw8bit", raising=False)
    module = NemotronVLModule(config=config, optimizer="adamw8bit")  # its checkpoint can be evaluated without
    data = VLMDataModule(train=str(make_task(2)), processor=processor)
    with pytest.raises(ImportError, match=r"needs torchao.*pip install 'lightning-vlm\[optim\]', or set optimizer to"):
        quiet_trainer(max_steps=1).fit(module, datamodule=data)
    assert module.model is None, "told before any weight is read"


def quiet_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_optimizer_trains_in_every_precision_with_clipping(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, name: Any, precision: Any
) -> None:
    """Lightning refuses to clip for an optimizer that declares itself fused."""
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    config = NemotronVLConfig.tiny(pattern="M*E", hidden_size=64, vision_hidden_size=64, vision_layers=1)
    module = NemotronVLModule(config=config, optimizer=name, lr=1e-2, no_decay=["projector.*"], layer_decay=0.9)
    data = VLMDataModule(train=str(make_task(8)), processor=processor, batch_size=4)
    trainer = quiet_trainer(max_epochs=4, precision=precision, gradient_clip_val=1.0)
    losses: list[float] = []
    trainer.callbacks.append(_Losses(losses))
    trainer.fit(module, datamodule=data)
    assert losses[-1] < 0.9 * losses[0]


class _Losses(L.Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
