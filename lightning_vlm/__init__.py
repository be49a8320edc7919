"""lightning_vlm: train Nemotron-style vision-language models with PyTorch Lightning.

The whole way of a sample, and where to look for each thing on it:

    rows             sources/open.py         files and tables of every kind; sources/json_files.py, tables.py, shards.py
    Conversation     sources/formats.py      what a row means, whatever format it was written in (schema.py)
    bad samples      data/screening.py       found, named, left out; data/bad_samples.py keeps the list
    labels           processing/labels.py    rendered turns -> input_ids and labels; spans from processing/chat.py
    image tokens     geometry.py             width and height -> patch grid -> number of tokens
    Sample           processing/processor.py text, labels and uint8 patches of one conversation
    exact lengths    data/lengths.py         tokens and patches of every sample before training; data/overlong.py
    batches, packs   data/batching.py        fixed, by length, by budget, packed (data/packing.py); data/plan.py chooses
    order, resume    data/samplers.py        which rank takes which batch; data/loader.py continues exactly
    VLMBatch         data/collate.py         padded rows, or one packed row with cu_seqlens (schema.py)
    boundaries       segments.py             the one place that knows where a document of a packed row ends
    model            models/nemotron_vl.py   RADIO -> pixel shuffle -> projector -> fusion -> hybrid LM
    its parts        models/parts.py         the map by which they are frozen, trained and told; models/architecture.py
    packed layers    ops/ssd.py              the Mamba scan with resets; ops/causal_conv.py, attention.py, mamba.py
    loss             training/losses.py      sum of token losses, divided by the label tokens of the whole step
    many devices     strategies/             FSDP2, tensor parallel, pipeline; network.py makes, divides and fills
    step, scores     module.py               NemotronVLModule; training/optim.py, freezing.py, metrics.py
    nothing lost     data/ledger.py          every planned sample accounted for; training/isolation.py proves packing
    command line     cli.py                  lightning-vlm fit | validate | test | predict; commands/ look before a run

Names of NeMo AutoModel, for those who migrate, are in automodel/. Each file opens by saying what it is. Rooms import
only from lower steps; tests/test_house.py holds them to it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_vlm.datamodule import VLMDataModule
    from lightning_vlm.models.config import NemotronVLConfig
    from lightning_vlm.models.nemotron_vl import NemotronVL
    from lightning_vlm.module import NemotronVLModule
    from lightning_vlm.processing.processor import NemotronVLProcessor

__version__ = "0.1.0"

__all__ = ["NemotronVL", "NemotronVLConfig", "NemotronVLModule", "NemotronVLProcessor", "VLMDataModule"]

_HOMES = {
    "VLMDataModule": "lightning_vlm.datamodule",
    "NemotronVLModule": "lightning_vlm.module",
    "NemotronVL": "lightning_vlm.models.nemotron_vl",
    "NemotronVLConfig": "lightning_vlm.models.config",
    "NemotronVLProcessor": "lightning_vlm.processing.processor",
}


def __getattr__(name: str) -> Any:
    # Importing torch, transformers and lightning takes seconds: it happens at the first use of a name.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lightning_vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
