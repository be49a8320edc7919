"""Two CPU processes, one with images and one with text only: DDP and FSDP2 end, with the numbers of one process."""

from __future__ import annotations

import faulthandler
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.models import absent_media
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.segments import cu_seqlens_from_lengths
from lightning_vlm.training.freezing import freeze

IMAGE = 4
TIMEOUT_S = 120  # of a test; ranks need 2 s
COLLECTIVE_TIMEOUT_S = 60

Batch = dict[str, Tensor]
Wrap = Callable[[NemotronVL], Any]


def make_model(frozen: list[str], checkpointing: bool = False) -> NemotronVL:
    """Random weights that all matter, the same in every process."""
    torch.manual_seed(0)
    config = NemotronVLConfig.tiny(pattern="M*E-", hidden_size=32, vision_hidden_size=32, vision_layers=2)
    model = NemotronVL(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    freeze(model, frozen)
    return model


def make_batch(images: bool, seed: int) -> Batch:
    """Three documents, padded; the first two with an image each, or all of text."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, 263, (length,), generator=generator) for length in (12, 5, 9)]
    batch: Batch = {}
    if images:
        rows[0][2:8], rows[1][:1] = IMAGE, IMAGE
        batch["pixel_values"] = torch.randint(0, 256, (28, 192), dtype=torch.uint8, generator=generator)
        batch["image_grid_hw"] = torch.tensor([[4, 6], [2, 2]])
    batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    batch["labels"] = batch["input_ids"].where((batch["input_ids"] != 0) & (batch["input_ids"] != IMAGE), -100)
    return batch


def packed(batch: Batch) -> Batch:
    """The same documents as one packed row."""
    real = batch.pop("attention_mask").bool()
    row = {name: batch[name][real][None] for name in ("input_ids", "labels")}
    return {**batch, **row, "cu_seqlens": cu_seqlens_from_lengths(real.sum(-1).tolist())}


def ddp(model: NemotronVL) -> Any:
    return DistributedDataParallel(model)


def fsdp2(model: NemotronVL, reshard: bool = True) -> Any:
    """Shards each block of the tower and of the language model, the tower, the projector and the rest."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    blocks = [*model.vision_model.encoder.layer, *model.language_model.model.layers]
    for module in (*blocks, model.vision_model, model.multi_modal_projector, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return model


def fsdp2_gathered(model: NemotronVL) -> Any:
    """Shards that stay gathered from the first forward to the end of the backward pass."""
    return fsdp2(model, reshard=False)


def run_ranks(
    work: Callable[[int], Any], folder: Path, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S, ranks: int = 2
) -> list[Any]:
    """``work(rank)`` in processes forked from this one; a hang is a failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (work, folder, port, collective_timeout_s, ranks)
    context = torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, join=False, start_method="fork")
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, work: Callable[[int], Any], folder: Path, port: int, timeout_s: float, ranks: int) -> None:
    faulthandler.disable()  # an abort is a result for the test, not the end of the test run
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=timeout_s), world_size=ranks, rank=rank
    )
    torch.save(work(rank), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def named_gradients(model: NemotronVL) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def batches_of(step: int, layout: Callable[[Batch], Batch]) -> list[Batch]:
    """One batch for each rank; the rank with images changes from step to step."""
    return [layout(make_batch(images=(step + rank) % 2 == 0, seed=2 * step + rank)) for rank in range(2)]


def count_labels(batches: list[Batch]) -> int:
    """No batch of this file trains on its first token, and boundaries are shifted out like it."""
    return sum(int((batch["labels"] >= 0).sum()) for batch in batches)


def prompt_of(batch: Batch) -> Batch:
    """The first document, to be continued."""
    prompt = {"input_ids": batch["input_ids"][:1, :12]}
    if "pixel_values" in batch:
        prompt |= {"pixel_values": batch["pixel_values"][:24], "image_grid_hw": batch["image_grid_hw"][:1]}
    return prompt


def train(
    make: Callable[[], NemotronVL], wrap: Wrap, layout: Callable[[Batch], Batch], rank: int | None
) -> dict[str, Any]:
    """Three steps, then validation and generation; ``rank`` is ``None`` for one process with the batches of both."""
    model = make()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ranks = [0, 1] if rank is None else [rank]
    gradients = []
    for step in range(3):
        batches = batches_of(step, layout)
        items = count_labels(batches) * len(ranks) / 2  # data-parallel gradients are the mean over ranks
        for own in ranks:
            wrapped(**batches[own], num_items_in_batch=items).loss.backward()
        gradients.append(named_gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    batches = batches_of(0, layout)
    with torch.no_grad():
        losses = [model(**batches[own], use_cache=False).loss for own in ranks]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 3}
    prompts = [prompt_of(batch) for batch in batches_of(0, dict)]
    answers = [model.generate(**prompts[own], **options, synced_gpus=rank is not None) for own in ranks]
    return {"gradients": gradients, "losses": losses, "answers": answers}


def plain(model: NemotronVL) -> Any:
    return model


@pytest.mark.parametrize(
    ("frozen", "checkpointing", "layout"),
    [
        ([], False, dict),
        ([], True, dict),
        ([], False, packed),
        (["vision"], False, dict),
        (["projector"], False, dict),
        (["vision", "projector"], False, dict),
        (["language"], True, packed),
    ],
    ids=["trained", "checkpointing", "packed", "frozen_vision", "frozen_projector", "frozen_both", "frozen_language"],
)
@pytest.mark.parametrize("wrap", [ddp, fsdp2, fsdp2_gathered], ids=lambda wrap: wrap.__name__)
def test_a_rank_without_images_keeps_step(
    tmp_path: Path, wrap: Wrap, frozen: list[str], checkpointing: bool, layout: Callable[[Batch], Batch]
) -> None:
    """Measured over ten seeds and four of these layouts: gradients, losses and answers equal, bit by bit."""
    make = partial(make_model, frozen, checkpointing)
    one = train(make, plain, layout, None)
    two = run_ranks(partial(train, make, wrap, layout), tmp_path)
    for rank, found in enumerate(two):
        for step, expected in enumerate(one["gradients"]):
            gradients = found["gradients"][step]
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(found["losses"][0], one["losses"][rank], rtol=0, atol=1e-6)
        assert torch.equal(found["answers"][0], one["answers"][rank])


def count_passes(frozen: list[str], reshard: bool, rank: int) -> list[int]:
    """How often the tower has run: after four forwards of text, a generation, and one without a cache."""
    model, batch = fsdp2(make_model(frozen), reshard), make_batch(images=False, seed=rank)
    passes: list[int] = []
    model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for training, gradients in ((True, True), (True, False), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(gradients):
            model(**batch)
    counts.append(len(passes))
    for use_cache in (True, False):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        model.generate(**prompt_of(batch), **options, use_cache=use_cache, synced_gpus=True)
        counts.append(len(passes))
    return counts


@pytest.mark.parametrize(
    ("frozen", "reshard", "expected"),
    [
        (
            [],
            True,
            [4, 5, 9],
        ),  # a step that continues a cache has no images on any rank; without a cache all are prompts
        (["vision", "projector"], True, [4, 5, 9]),
        (["vision", "projector"], False, [1, 1, 1]),  # ranks with images gather nothing the second time either
    ],
    ids=["trained", "frozen", "frozen_gathered"],
)
def test_shards_need_the_pass_in_every_forward_of_a_prompt(
    tmp_path: Path, frozen: list[str], reshard: bool, expected: list[int]
) -> None:
    assert run_ranks(partial(count_passes, frozen, reshard), tmp_path) == [expected, expected]


@pytest.mark.parametrize(
    ("wrap", "frozen", "message"),
    [
        (ddp, [], "Expected to have finished reduction in the prior iteration"),
        (fsdp2, ["vision", "projector"], None),  # gloo aborts at sizes that do not match; NCCL would wait
    ],
    ids=["ddp", "fsdp2_frozen"],
)
def test_without_the_pass_ranks_fall_out_of_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Wrap, frozen: list[str], message: str | None
) -> None:
    """So that the test above is known to test something."""
    monkeypatch.setattr(absent_media, "needs_absent_medium", lambda *_: False)
    with pytest.raises(ProcessException, match=message):
        run_ranks(partial(train, partial(make_model, frozen), wrap, dict), tmp_path, collective_timeout_s=10)


class Sharded(NemotronVLModule):
    """A module whose model is sharded where the strategy has ranks."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            if torch.distributed.is_initialized():
                fsdp2(self.network)


def fit(file: Path, folder: Path, frozen: list[str], rank: int | None) -> dict[str, float]:
    """One epoch under Lightning, validated with generated answers."""
    if rank is not None:
        os.environ.update({"LOCAL_RANK": str(rank), "NODE_RANK": "0"})
    L.seed_everything(3, verbose=False)
    config = NemotronVLConfig.tiny(pattern="M*", hidden_size=32, vision_hidden_size=32, vision_layers=1)
    module = Sharded(config=config, lr=1e-3, freeze=frozen, max_new_tokens=3)
    data = VLMDataModule(
        train=str(file),
        val=str(file),
        processor=tiny_processor(),
        batch_size=4 if rank is None else 2,
        sampler="sequential",
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if rank is None else 2,
        strategy="auto" if rank is None else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [[], ["vision", "projector"]], ids=["trained", "frozen"])
def test_lightning_shards_train_validate_and_answer(
    write_rows: Callable[..., Path], write_image: Callable[..., str], tmp_path: Path, frozen: list[str]
) -> None:
    """Of each four rows one rank gets the first two, with images, and the other one the rest."""
    rows = []
    for index in range(8):
        images = [write_image(f"{index}.png", 16 + 8 * index, 16, index)] if index % 4 < 2 else []
        turns = [
            {"role": "user", "content": "<image>" * len(images) + f"question {index}"},
            {"role": "assistant", "content": "word " * (index % 3) + str(index)},
        ]
        rows.append({"images": images, "messages": turns})
    work = partial(fit, write_rows(rows), tmp_path, frozen)
    one = work(None)
    for found in run_ranks(work, tmp_path):
        for name in ("train/loss", "train/grad_norm", "val/loss", "val/gen/anls"):
            assert found[name] == pytest.approx(one[name], abs=1e-5), name
