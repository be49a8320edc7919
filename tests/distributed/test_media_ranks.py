"""Two CPU processes with different kinds of media: DDP and FSDP2 end, with the numbers of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.models.parts import parts_of
from lightning_vlm.schema import VLMBatch
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.generation import left_padded_prompts
from tests.distributed.test_text_only_ranks import Wrap, ddp, named_gradients, run_ranks
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, picture, sample, sound, video

# Of each step, what the two ranks have: every kind alone on one of them, all at once beside nothing.
STEPS: list[tuple[str, str]] = [("image", "video"), ("sound", ""), ("", "image video sound"), ("video", "sound image")]


def make_model(tubelets: bool, frozen: list[str]) -> NemotronVL:
    torch.manual_seed(0)
    media = {**ALL_MEDIA, "video": tubelets}
    config = NemotronVLConfig.tiny(pattern="M*E-", hidden_size=32, vision_hidden_size=32, vision_layers=2, **media)
    model = NemotronVL(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    freeze(model, frozen)
    return model


def make_batch(kinds: str, seed: int, tubelets: bool, packed: bool) -> VLMBatch:
    """Two samples, the first with a medium of each of these kinds."""
    processor = media_processor(0.5, video={"temporal_patch_size": 2 if tubelets else 1})
    made: dict[str, Any] = {
        "image": picture(seed=seed),
        "video": video(processor, 4, seed=seed),
        "sound": sound(3000, seed),
    }
    samples = [
        sample(processor, "a", *(made[kind] for kind in kinds.split()), f"{seed}?"),
        sample(processor, "text", answer="a longer answer"),
    ]
    return (PackedCollate() if packed else PaddedCollate(0))(samples)


def fsdp2(model: NemotronVL) -> Any:
    """Shards each block, each part and the rest."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    assert model.audio_tower is not None
    blocks = [
        *model.vision_model.encoder.layer, *model.audio_tower.layers, *model.language_model.model.layers
    ]  # fmt: skip
    towers = [module for name, module in parts_of(model).items() if name != "language"]
    for module in (*blocks, *towers, model):
        fully_shard(module, mesh=mesh)
    return model


def fsdp2_tower_as_one(model: NemotronVL) -> Any:
    """Shards the tower as one unit: it is gathered once, however many passes it makes."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (model.vision_model, model):
        fully_shard(module, mesh=mesh)
    return model


def fsdp2_parts(model: NemotronVL) -> Any:
    """Shards the tower as one unit, and the projector, which a rank calls once then, as another."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (model.vision_model, model.multi_modal_projector, model):
        fully_shard(module, mesh=mesh)
    return model


def plain(model: NemotronVL) -> Any:
    return model


def train(tubelets: bool, frozen: list[str], wrap: Wrap, packed: bool, rank: int | None) -> dict[str, Any]:
    """A step of each kind, then generation; ``rank`` is ``None`` for one process with the batches of both."""
    model = make_model(tubelets, frozen)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ranks = [0, 1] if rank is None else [rank]
    gradients = []
    for step, kinds in enumerate(STEPS):
        batches = [make_batch(own, 2 * step + number, tubelets, packed) for number, own in enumerate(kinds)]
        items = sum(batch.num_label_tokens for batch in batches) * len(ranks) / 2
        for own in ranks:
            inputs = batches[own].model_inputs()
            wrapped(**inputs, labels=batches[own].labels, num_items_in_batch=items, use_cache=False).loss.backward()
        gradients.append(named_gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    answers = []
    for own in ranks:
        batch = make_batch(STEPS[-1][own], own, tubelets, packed=False)
        answers.append(
            model.generate(
                **left_padded_prompts(batch, 0), **batch.media_inputs(), max_new_tokens=4, do_sample=False,
                pad_token_id=0, eos_token_id=3, synced_gpus=rank is not None,
            )
        )  # fmt: skip
    return {"gradients": gradients, "answers": answers}


@pytest.mark.parametrize("wrap", [ddp, fsdp2], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize(
    ("tubelets", "frozen", "packed"),
    [(True, [], False), (True, [], True), (False, [], False), (True, ["vision", "audio"], False)],
    ids=["trained", "packed", "single_frames", "frozen_towers"],
)
def test_ranks_with_different_media_keep_step(
    tmp_path: Path, wrap: Wrap, tubelets: bool, frozen: list[str], packed: bool
) -> None:
    one = train(tubelets, frozen, plain, packed, None)
    two = run_ranks(partial(train, tubelets, frozen, wrap, packed), tmp_path)
    for rank, found in enumerate(two):
        for step, expected in enumerate(one["gradients"]):
            gradients = found["gradients"][step]
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6, msg=f"{name} in step {step}")
        assert torch.equal(found["answers"][0], one["answers"][rank])


def long_and_short(wrap: Wrap, frozen: list[str], recompute: bool, rank: int) -> str | dict[str, Any]:
    """A video of four passes beside one of a single pass."""
    model = make_model(True, frozen)
    model.vision_model.micro_batch = 2
    if recompute:
        model.vision_model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped, processor = wrap(model), media_processor(0.5)
    batch = PaddedCollate(0)([sample(processor, "a", video(processor, 2 if rank else 8, seed=1), "?")])
    try:
        loss = wrapped(**batch.model_inputs(), labels=batch.labels, use_cache=False).loss
        loss.backward()
    except ValueError as error:
        return str(error)
    return {"loss": loss.detach(), "gradients": named_gradients(model)}


@pytest.mark.parametrize("wrap", [ddp, fsdp2_tower_as_one, fsdp2_parts], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize(
    ("frozen", "recompute"),
    [([], False), ([], True), (["vision"], True)],
    ids=["kept", "recomputed", "behind_a_frozen_tower"],
)
def test_ranks_may_make_different_numbers_of_passes(
    tmp_path: Path, wrap: Wrap, frozen: list[str], recompute: bool
) -> None:
    one: list[Any] = [long_and_short(plain, frozen, False, rank) for rank in range(2)]
    two = run_ranks(partial(long_and_short, wrap, frozen, recompute), tmp_path)
    for rank, found in enumerate(two):
        torch.testing.assert_close(found["loss"], one[rank]["loss"], rtol=0, atol=1e-6)
        for name, gradient in found["gradients"].items():
            both = [alone["gradients"].get(name, torch.zeros_like(gradient)) for alone in one]
            torch.testing.assert_close(gradient, sum(both) / 2, rtol=0, atol=1e-6, msg=name)


def test_passes_that_gather_each_layer_anew_are_refused_on_every_rank(tmp_path: Path) -> None:
    for found in run_ranks(partial(long_and_short, fsdp2, [], False), tmp_path):
        assert "vision_micro_batch is 2 and the layers of the vision tower are sharded one by one" in str(found)
