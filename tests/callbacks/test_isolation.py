"""IsolationProbe: speaks once, stops a run that would leak, and leaves a run's numbers as they were."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.models import packed_mamba
from lightning_vlm.segments import documents_from_lengths
from lightning_vlm.training.isolation import TOLERANCE, IsolationError

TINY = {"pattern": "M*", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


def fit(
    file: Path,
    processor: NemotronVLProcessor,
    data: dict[str, Any],
    module: type[NemotronVLModule] = NemotronVLModule,
    **options: Any,
) -> NemotronVLModule:
    L.seed_everything(1, verbose=False)
    network = module(config=NemotronVLConfig.tiny(**TINY), lr=1e-2, generate_on_validation=False)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(network, datamodule=VLMDataModule(train=str(file), processor=processor, **{"batch_size": 2, **data}))
    return network


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Lines about packing."""
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return lambda: [message for message in caplog.messages if message.startswith("packing")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_fit_with_packed_rows_says_what_it_found(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, said: Callable[[], list[str]], precision: str
) -> None:
    fit(make_task(8), processor, {"packing": True}, max_epochs=2, precision=precision)
    headline, isolation = said()
    assert headline.startswith("packing: 8 samples, 499 tokens in 5 packs of at most 125 tokens, 79.8 % full; ")
    difference = float(isolation.removeprefix("packing isolation: max|d| = ").split()[0])
    # Measured: 0 in all three; the least visible leak makes it 7e-5, and changes what may not change.
    assert difference <= (1e-5 if precision == "32-true" else 5e-2)
    assert isolation.endswith(" OK (ssd=torch, attn=sdpa)")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_probe_computes_in_the_precision_of_the_run(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setitem(TOLERANCE, torch.float32, -1.0)  # refused, however good
    with pytest.raises(IsolationError) if precision == "32-true" else contextlib.nullcontext():
        fit(make_task(8), processor, {"packing": True}, precision=precision, max_steps=1)


def test_rows_packed_by_a_sampler_are_probed_too(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, said: Callable[[], list[str]]
) -> None:
    fit(make_task(8), processor, {"collate": "packed"})
    (isolation,) = said()  # no headline: its numbers need lengths, which nothing has measured
    assert isolation.endswith(" OK (ssd=torch, attn=sdpa)")


def test_padded_rows_and_other_data_are_not_probed(
    make_task: Callable[..., Path],
    processor: NemotronVLProcessor,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = make_task(8)
    monkeypatch.setattr(packed_mamba, "conv_and_silu", without_boundaries(packed_mamba.conv_and_silu))
    for sampler in ("shuffle", "token_budget"):
        fit(file, processor, {"sampler": sampler}, max_steps=1)
    data = VLMDataModule(train=str(file), processor=processor, packing=True)
    data.setup("fit")
    batches: Any = DataLoader([next(iter(data.train_dataloader()))], batch_size=None)  # type: ignore[arg-type]
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(NemotronVLModule(config=NemotronVLConfig.tiny(**TINY)), batches)
    assert said() == []


def test_a_single_sample_cannot_be_probed(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, said: Callable[[], list[str]]
) -> None:
    fit(make_task(1), processor, {"packing": True})
    assert said()[1:] == ["packing isolation: not probed, there is a single sample"]


def without_boundaries(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The operation as it would be for a row of one document: a fault, not a double."""

    def run(*args: Any) -> torch.Tensor:
        *tensors, documents, choice = args
        return operation(*tensors, documents_from_lengths([sum(documents.lengths)]), choice)

    return run


@pytest.mark.parametrize("operation", ["conv_and_silu", "scan"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_leak_stops_the_run_before_its_first_step(
    make_task: Callable[..., Path],
    processor: NemotronVLProcessor,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    precision: str,
) -> None:
    started = []

    class Notes(NemotronVLModule):
        def on_train_start(self) -> None:
            started.append(True)

    monkeypatch.setattr(packed_mamba, operation, without_boundaries(getattr(packed_mamba, operation)))
    message = (
        r"packing isolation: .* LEAK \(ssd=torch, attn=sdpa\); another .*; documents of a pack would be trained on"
    )
    with pytest.raises(IsolationError, match=message):
        fit(make_task(8), processor, {"packing": True}, module=Notes, precision=precision)
    assert not started


def test_an_implementation_that_cannot_run_stops_the_run_with_the_reason(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_VLM_SSD", "mamba_ssm")
    message = r"LIGHTNING_VLM_SSD=mamba_ssm cannot run: runs on NVIDIA GPUs only, this is cpu"
    with pytest.raises(IsolationError, match=message):
        fit(make_task(8), processor, {"packing": True})


class Unwatched(NemotronVLModule):
    """Without probe and ledger."""

    def configure_callbacks(self) -> list[L.Callback]:
        return []


class Modes(L.Callback):
    """How a run starts: modes, gradients, random state."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        network = pl_module.network
        self.training = {name: module.training for name, module in network.named_modules()}
        self.gradients = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
        self.random = torch.get_rng_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_probe_leaves_no_trace(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, precision: str
) -> None:
    file = make_task(8)
    probed, unprobed = Modes(), Modes()
    options: dict[str, Any] = {"data": {"packing": True}, "precision": precision}
    left = fit(file, processor, callbacks=[probed], **options)
    right = fit(file, processor, callbacks=[unprobed], module=Unwatched, **options)
    assert probed.training == unprobed.training
    assert all(probed.training.values())
    assert probed.gradients == []
    assert torch.equal(probed.random, unprobed.random)
    for (name, a), b in zip(left.network.state_dict().items(), right.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
