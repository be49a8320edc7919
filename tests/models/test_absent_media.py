"""The pass over an absent image: when it runs, and that it changes nothing but which gradients are there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.models import absent_media
from lightning_vlm.models.parts import PARTS
from lightning_vlm.segments import cu_seqlens_from_lengths
from lightning_vlm.training.freezing import freeze
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, varied_samples

ROWS = [[12], [5], [70]]


def text_batch(make_batch: Callable[..., dict[str, Tensor]], packed: bool = False) -> dict[str, Tensor]:
    batch = make_batch(ROWS)
    if not packed:
        return batch
    real = batch["attention_mask"].bool()
    row = {name: batch[name][real][None] for name in ("input_ids", "labels")}
    return {**row, "cu_seqlens": cu_seqlens_from_lengths([row[0] for row in ROWS])}


def count_passes(model: NemotronVL) -> list[int]:
    """One entry for each time that the tower has run."""
    passes: list[int] = []
    model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def tower(model: NemotronVL) -> dict[str, torch.nn.Parameter]:
    """Trained parameters of the tower and the projector."""
    parts = (PARTS["vision"].attribute, PARTS["projector"].attribute)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts)}


def assert_gradients_are_zero(model: NemotronVL) -> None:
    for name, parameter in tower(model).items():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def bits(tensor: Tensor) -> Tensor:
    """Tells 0.0 from -0.0."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


# The numbers


def with_adapters(model: NemotronVL, parts: str, dropout: float = 0.0) -> NemotronVL:
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    adapters = peft.LoraConfig(target_modules=rf".*({parts}).*\.(q_proj|o_proj|linear_1)", lora_dropout=dropout)
    return peft.inject_adapter_in_model(adapters, model)


def checkpointed(model: NemotronVL) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})


def drops_out(model: NemotronVL) -> None:
    model.config.vision_config.attention_probs_dropout_prob = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5


CHANGES: dict[str, Callable[[NemotronVL], Any]] = {
    "as_it_is": lambda model: model,
    "checkpointing": checkpointed,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "dropout": drops_out,
    "adapters": lambda model: with_adapters(model, "language_model|vision_model|projector", 0.5),
    "frozen_language": lambda model: freeze(model, ["language"]),
    "frozen_vision": lambda model: freeze(model, ["vision"]),
    "frozen_projector": lambda model: freeze(model, ["projector"]),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_bit_is_that_of_a_forward_without_the_pass(
    make_model, make_batch, shake, monkeypatch, change, packed, autocast
):
    batch, results = text_batch(make_batch, packed), []
    for runs in (True, False):
        model = shake(make_model(pattern="M*E-", vision_layers=2))
        CHANGES[change](model)
        model.train()
        passes = count_passes(model)
        if not runs:
            monkeypatch.setattr(absent_media, "needs_absent_medium", lambda *_: False)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output = model(**batch)
        if output.loss.requires_grad:  # not without the pass and with a frozen language model
            output.loss.backward()
        assert len(passes) == runs
        if runs:
            assert tower(model)
            assert_gradients_are_zero(model)
        language = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        language = {name: gradient for name, gradient in language.items() if "language_model" in name}
        results.append({"loss": output.loss, "logits": output.logits, "random": torch.rand(4), **language})
    assert results[0].keys() == results[1].keys()
    assert (len(results[0]) == 3) == (change == "frozen_language")
    for name, expected in results[1].items():
        assert torch.equal(bits(results[0][name]), bits(expected)), name


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
def test_any_pixel_shuffle_has_a_smallest_image(make_batch, ratio, version):
    tiny = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    config = NemotronVLConfig(
        tiny.vision_config,
        tiny.text_config,
        downsample_ratio=ratio,
        ps_version=version,
        projector_hidden_size=32,
        image_token_id=4,
    )
    model = NemotronVL(config).train()
    model(**text_batch(make_batch)).loss.backward()
    assert_gradients_are_zero(model)


def test_embeddings_instead_of_tokens_are_text_only_too(make_model):
    model, embeds = make_model().train(), torch.randn(1, 5, 32, requires_grad=True)
    model(inputs_embeds=embeds, labels=torch.tensor([[7, 8, 9, 7, 8]])).loss.backward()
    assert embeds.grad.any()
    assert_gradients_are_zero(model)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("change", ["as_it_is", "checkpointing", "adapters"])
@pytest.mark.parametrize(
    "where",
    [
        "patch_projection.weight",
        "layer.0.norm1.weight",
        "layer.0.attention.k_proj.",  # with an adapter its weight is within
        "layer.1.mlp.fc2.bias",
        "layer_norm.weight",
        "linear_2.weight",
    ],
)
def test_a_tower_that_is_not_finite_reaches_nothing(make_model, make_batch, shake, where, change, value):
    model = shake(make_model(pattern="M*", vision_layers=2))
    CHANGES[change](model)
    model.train()
    parameter = next(p for name, p in model.named_parameters() if where in name)
    with torch.no_grad():
        parameter.view(-1)[0] = value
    loss = model(**text_batch(make_batch)).loss
    loss.backward()
    assert loss.isfinite()
    assert_gradients_are_zero(model)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradient_checkpointing_is_as_it_was_afterwards(make_model, make_batch):
    model = make_model(vision_layers=2).train()
    checkpointed(model)
    before = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
    assert before["vision_model.encoder.layer.1"] is True
    model(**text_batch(make_batch))
    model.multi_modal_projector.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**text_batch(make_batch))
    after = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
    assert after == before


# The rule


@pytest.mark.parametrize(
    ("frozen", "training", "gradients", "expected"),
    [
        ([], True, True, 1),
        (["vision"], True, True, 1),  # the projector's gradients
        (["projector"], True, True, 1),
        (["language"], True, True, 1),
        (["vision", "projector"], True, True, 0),
        ([], True, False, 0),
        ([], False, True, 0),
        ([], False, False, 0),
    ],
)
def test_whole_parameters_need_the_pass_where_they_are_trained(
    make_model, make_batch, frozen, training, gradients, expected
):
    model = make_model().train(training)
    freeze(model, frozen)
    passes = count_passes(model)
    with torch.set_grad_enabled(gradients):
        model(**text_batch(make_batch))
    assert len(passes) == expected


@pytest.mark.parametrize(
    ("parts", "expected"), [("language_model", 0), ("vision_model", 1), ("multi_modal_projector", 1)]
)
def test_adapters_are_trained_parameters_of_their_part(make_model, make_batch, parts, expected):
    model = with_adapters(make_model(), parts).train()
    passes = count_passes(model)
    output = model(**text_batch(make_batch))
    assert len(passes) == expected
    output.loss.backward()
    assert len(tower(model)) == {"language_model": 0, "vision_model": 4, "multi_modal_projector": 2}[parts]
    assert_gradients_are_zero(model)


def test_a_batch_with_images_runs_the_tower_once(make_model, make_batch):
    model = make_model().train()
    passes = count_passes(model)
    model(**make_batch([[5, (2, 6)], [8]]))
    assert len(passes) == 1


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_generation_with_whole_parameters_leaves_the_tower_alone(make_model, make_batch, training):
    model, prompt = make_model().train(training), text_batch(make_batch)["input_ids"][:1, :12]
    passes = count_passes(model)
    model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert not passes


# Videos and sounds


@pytest.fixture
def all_media(make_model, shake):
    return shake(make_model(pattern="M*-", **ALL_MEDIA)).train()


def own_parts(model: NemotronVL) -> dict[str, torch.nn.Module]:
    """What only one kind of media reaches."""
    embeddings = model.vision_model.embeddings
    return {
        "image": embeddings.patch_projection,
        "video": embeddings.video_patch_projection,
        "sound": torch.nn.ModuleList([model.audio_tower, model.embed_audio]),
    }


KINDS_OF = [{"image", "video", "sound"}, set(), {"video"}, {"image"}, {"sound"}]  # of `varied_samples`


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("row", range(5))
def test_absent_kinds_get_zero_gradients_and_change_no_bit(all_media, monkeypatch, row, packed):
    model, item = all_media, varied_samples(media_processor(0.5))[row]
    batch = (PackedCollate() if packed else PaddedCollate(0))([item])
    results = []
    for runs in (True, False):
        if not runs:
            monkeypatch.setattr(absent_media, "needs_absent_medium", lambda *_: False)
        torch.manual_seed(1)
        output = model(**batch.model_inputs(), labels=batch.labels)
        output.loss.backward()
        for kind, part in own_parts(model).items():
            found = [parameter.grad for parameter in part.parameters()]
            if kind in KINDS_OF[row]:
                assert any(gradient is not None and gradient.any() for gradient in found), kind
            elif runs:
                assert all(gradient is not None and not gradient.any() for gradient in found), kind
            else:
                assert all(gradient is None for gradient in found), kind
        reached = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        results.append({"loss": output.loss, "logits": output.logits, "random": torch.rand(4), **reached})
        model.zero_grad()
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        # The towers' own passes add zeros to what other media gave: 0.0 and -0.0 are equal here.
        assert torch.equal(results[0][name], expected), name


@pytest.mark.parametrize("rows", [[0], [1], [2], [3], [4], [1, 2], [2, 4]], ids=str)
def test_passes_are_the_same_in_every_batch(all_media, rows):
    # Ranks must call the same collectives in the same order, whatever their batches hold.
    model, seen = all_media, []
    model.vision_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    model.audio_tower.register_forward_pre_hook(lambda *_: seen.append("sound"))
    items = varied_samples(media_processor(0.5))
    model(**PaddedCollate(0)([items[row] for row in rows]).model_inputs())
    assert seen == [192, 384, "sound"]


def test_frozen_parts_of_one_kind_are_left_alone(all_media):
    model, seen = all_media, []
    model.vision_model.embeddings.video_patch_projection.requires_grad_(False)
    model.audio_tower.requires_grad_(False)
    model.embed_audio.requires_grad_(False)
    model.vision_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    model.audio_tower.register_forward_pre_hook(lambda *_: seen.append("sound"))
    model(**PaddedCollate(0)(varied_samples(media_processor())[1:2]).model_inputs())
    assert seen == [192]


def test_a_sound_tower_that_is_not_finite_reaches_nothing(all_media):
    with torch.no_grad():
        all_media.audio_tower.layers[0].feed_forward1.linear1.weight[0, 0] = torch.nan
        all_media.vision_model.embeddings.video_patch_projection.weight[0, 0] = torch.inf
    batch = PaddedCollate(0)(varied_samples(media_processor())[3:4])
    loss = all_media(**batch.model_inputs(), labels=batch.labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in all_media.parameters() if p.grad is not None)
    assert all(p.grad is not None for part in own_parts(all_media).values() for p in part.parameters())
