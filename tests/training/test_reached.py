"""What no medium of a step reached keeps its value, its momentum, and has no state in the optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.processing.tiny import TINY_VIDEO, tiny_processor
from lightning_vlm.schema import AudioRef, Conversation, ImageRef, Sample, Text, Turn, VideoRef
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.reached import ReachedMedia
from tests.fixtures.media_samples import media_processor, picture, sound, video

PROCESSOR = media_processor()
CPU = torch.device("cpu")

TOWER = "vision_model.encoder.layer.0.mlp.fc1.weight"
IMAGE = "vision_model.embeddings.patch_projection.weight"
VIDEO = "vision_model.embeddings.video_patch_projection.weight"
SOUND = "audio_tower.layers.0.feed_forward1.linear1.weight"
SOUND_PROJECTOR = "embed_audio.linear_1.weight"
PROJECTOR = "multi_modal_projector.linear_1.weight"
TEXT = "language_model.lm_head.weight"


def make_sample(*kinds: str) -> Sample:
    refs = {"image": ImageRef(0), "video": VideoRef(0), "sound": AudioRef(0)}
    media = {"image": picture(16, 16), "video": video(PROCESSOR, 3, 16, 16), "sound": sound()}
    turns = (Turn("user", (*(refs[kind] for kind in kinds), Text("a?"))), Turn("assistant", (Text("b"),)))
    return PROCESSOR.encode(Conversation(turns, "f:1"), [media[kind] for kind in kinds])


def train(model: NemotronVL, *micro_batches: tuple[str, ...]) -> tuple[dict[str, Tensor], set[str]]:
    """One AdamW step over micro-batches of these media; how far each parameter moved, and which have a state."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reached = ReachedMedia()
    for kinds in micro_batches:
        batch = PaddedCollate(0)([make_sample(*kinds)])
        reached.add(batch)
        model(**batch.model_inputs(), labels=batch.labels).loss.backward()
    reached.leave_unreached_alone(model, CPU)
    optimizer.step()
    moved = {name: (parameter - before[name]).abs().max() for name, parameter in model.named_parameters()}
    return moved, {name for name, parameter in model.named_parameters() if optimizer.state.get(parameter)}


@pytest.fixture
def model() -> NemotronVL:
    torch.manual_seed(0)
    config = NemotronVLConfig.tiny(
        vocab_size=266, pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1, video=True,
        audio_token_id=263,
    )  # fmt: skip
    model = NemotronVL(config).train()
    freeze(model, [])
    return model


@pytest.mark.parametrize(
    ("micro_batches", "alone"),
    [
        ([()], [TOWER, IMAGE, VIDEO, PROJECTOR, SOUND, SOUND_PROJECTOR]),
        ([("image",)], [VIDEO, SOUND, SOUND_PROJECTOR]),
        ([("video",)], [IMAGE, SOUND, SOUND_PROJECTOR]),
        ([("sound",)], [TOWER, IMAGE, VIDEO, PROJECTOR]),
        ([("image", "video", "sound")], []),
        ([("image",), (), ("sound",)], [VIDEO]),
    ],
    ids=lambda value: str(value),
)
def test_only_what_was_reached_moves(model: NemotronVL, micro_batches: list[tuple[str, ...]], alone: list[str]) -> None:
    moved, states = train(model, *micro_batches)
    for name in (TOWER, IMAGE, VIDEO, PROJECTOR, SOUND, SOUND_PROJECTOR, TEXT):
        assert (moved[name] == 0) == (name in alone), name
        assert (name not in states) == (name in alone), name


def test_without_it_weight_decay_moves_what_nothing_reached(model: NemotronVL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReachedMedia, "leave_unreached_alone", lambda *_: None)
    moved, _ = train(model, ())
    assert all(moved[name] > 0 for name in (TOWER, IMAGE, VIDEO, PROJECTOR, SOUND, SOUND_PROJECTOR))


def test_each_step_begins_anew(model: NemotronVL) -> None:
    reached = ReachedMedia()
    for kinds, left in ((("sound",), True), ((), False)):
        batch = PaddedCollate(0)([make_sample(*kinds)])
        reached.add(batch)
        model.zero_grad()
        model(**batch.model_inputs(), labels=batch.labels).loss.backward()
        reached.leave_unreached_alone(model, CPU)
        assert (dict(model.named_parameters())[SOUND].grad is not None) is left


def test_where_frames_are_images_to_the_tower_its_embedder_is_reached_by_them() -> None:
    processor = tiny_processor(video={**TINY_VIDEO, "temporal_patch_size": 1})
    turns = (Turn("user", (VideoRef(0), Text("a?"))), Turn("assistant", (Text("b"),)))
    sample = processor.encode(Conversation(turns, "f:1"), [video(processor, 3, 16, 16)])
    model = NemotronVL(NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1))
    batch, reached = PaddedCollate(0)([sample]), ReachedMedia()
    reached.add(batch)
    model.train()(**batch.model_inputs(), labels=batch.labels).loss.backward()
    reached.leave_unreached_alone(model, CPU)
    assert model.vision_model.embeddings.patch_projection.weight.grad.any()
