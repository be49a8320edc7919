"""AdapterCheck: every adapter gets a gradient in the first steps that reach it, or the run stops and names it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.callbacks.adapter_check import AdapterError

LORA = {"language": ["attention", "mamba", "mlp", "experts"], "vision": "lora", "projector": "lora", "rank": 2}


@pytest.fixture
def fit(processor: NemotronVLProcessor, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    def run(file: Path, bypassed: bool = False, **options: Any) -> list[str]:
        config = NemotronVLConfig.tiny(pattern="ME*-", hidden_size=32, vision_hidden_size=32, vision_layers=1)
        module = NemotronVLModule(config=config, lora=LORA, generate_on_validation=False, **options)
        if bypassed:
            projection: Any = module.network.language_model.model.layers[0].mixer.out_proj
            weight = projection.base_layer.weight
            projection.forward = lambda x: torch.nn.functional.linear(x, weight)  # as a fused kernel reads it
        trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                            enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            trainer.fit(module, datamodule=VLMDataModule(train=str(file), processor=processor, batch_size=2))
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("lora: ")]

    return run


def test_all_adapters_are_seen(fit: Callable[..., list[str]], make_task: Callable[..., Path]) -> None:
    told = fit(make_task(12))
    assert told[-1].startswith("lora: 20 of 20 adapters got a gradient by step ")
    assert told[-1].endswith(": all are trained")


def test_an_adapter_that_a_kernel_reads_past_stops_the_run(
    fit: Callable[..., Any], make_task: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterError) as raised:
        fit(make_task(12), bypassed=True)
    assert str(raised.value) == (
        "1 of 20 adapters got no gradient in 3 steps that reached them: "
        "language_model.model.layers.0.mixer.out_proj.base_layer.weight; leave their kind of layers out of lora, or "
        "look for a kernel that reads the weight past its module"
    )


def test_adapters_of_parts_that_no_image_reaches_are_waited_for(
    fit: Callable[..., list[str]], write_rows: Callable[..., Path]
) -> None:
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    assert fit(write_rows([row] * 10))[-1] == "lora: 12 of 20 adapters got a gradient by step 1"
