"""Gradient checkpointing by part: the parts that were named recompute, no number changes."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLModule
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.models.parts import parts_of
from lightning_vlm.schema import AudioRef, Conversation, ImageRef, Text, Turn
from lightning_vlm.training.recomputation import check_recomputed, recompute_activations
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, picture, sound


def make_model() -> NemotronVL:
    torch.manual_seed(0)
    config = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=2, **ALL_MEDIA)
    return NemotronVL(config).train()


def recomputes(model: NemotronVL) -> set[str]:
    return {
        name
        for name, part in parts_of(model).items()
        if any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    }


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (False, set()),
        (True, {"vision", "audio", "language"}),
        (["vision"], {"vision"}),
        (["language", "audio"], {"language", "audio"}),
    ],
    ids=["none", "all", "one", "two"],
)
def test_the_parts_that_were_named_recompute_and_nothing_changes(wanted, expected):
    turns = (Turn("user", (ImageRef(0), AudioRef(0), Text("a?"))), Turn("assistant", (Text("b"),)))
    sample = media_processor().encode(Conversation(turns, "f:1"), [picture(32, 32), sound()])
    batch = PaddedCollate(0)([sample])
    gradients = []
    for parts in (False, wanted):
        model = make_model()
        recompute_activations(model, parts)
        assert recomputes(model) == (expected if parts is wanted else set())
        model(**batch.model_inputs(), labels=batch.labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name  # the same kernels in the same order


def test_a_model_without_ears_is_recomputed_where_it_can_be():
    model = NemotronVL(NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1))
    recompute_activations(model, ["vision", "audio"])
    assert recomputes(model) == {"vision"}


def test_unknown_parts_are_refused_before_a_model_is_made():
    with pytest.raises(ValueError, match="gradient_checkpointing names 'projector'; expected true, false or a list of"):
        check_recomputed(["vision", "projector"])
    with pytest.raises(ValueError, match="gradient_checkpointing names 'tower'"):
        NemotronVLModule(config=NemotronVLConfig.tiny(), gradient_checkpointing=["tower"])
    with pytest.raises(ValueError, match="vision_micro_batch is 0; expected at least one frame"):
        NemotronVLModule(config=NemotronVLConfig.tiny(), vision_micro_batch=0)


def test_the_module_passes_both_on():
    module = NemotronVLModule(config=NemotronVLConfig.tiny(), gradient_checkpointing=["vision"], vision_micro_batch=3)
    module.configure_model()
    assert recomputes(module.network) == {"vision"}
    assert module.network.vision_model.micro_batch == 3
