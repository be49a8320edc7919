"""Fixtures of all rooms: tiny real objects, nothing mocked, nothing downloaded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from lightning_vlm import NemotronVL, NemotronVLConfig, NemotronVLProcessor
from lightning_vlm.processing.tiny import tiny_processor

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.set_num_threads(1)  # tensors are tiny: on two busy cores threads made the same tests thirty times slower


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: no process waits for one that began with them last."""
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LIGHTNING_VLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def processor() -> NemotronVLProcessor:
    """Byte-level tokenizer, ChatML, 8-pixel patches, 4 to 256 of them per image."""
    return tiny_processor()


@pytest.fixture
def make_model() -> Callable[..., NemotronVL]:
    """Makes a very small model in eval mode; options go to `NemotronVLConfig.tiny`."""

    def make(seed: int = 0, **options: Any) -> NemotronVL:
        torch.manual_seed(seed)
        small = {"pattern": "M*-", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1, **options}
        return NemotronVL(NemotronVLConfig.tiny(**small)).eval()

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (or raw lines) to a JSONL file below ``tmp_path``."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[..., str]:
    """Writes a random RGB image below ``tmp_path`` and returns its relative name."""

    def write(name: str, width: int = 32, height: int = 32, seed: int = 0) -> str:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
        return name

    return write


@pytest.fixture
def make_task(write_rows: Callable[..., Path], write_image: Callable[..., str]) -> Callable[..., Path]:
    """Writes a small mixed file: images of several sizes, text-only rows, answers of very different lengths."""

    def make(count: int = 12, name: str = "rows.jsonl", answers: bool = True) -> Path:
        rows: list[dict[str, Any]] = []
        for index in range(count):
            images = [write_image(f"{name}-{index}-{k}.png", 16 + 8 * (index % 4), 16, index) for k in range(index % 3)]
            turns = [{"role": "user", "content": "<image>" * len(images) + f"question {index}"}]
            if answers:
                turns.append({"role": "assistant", "content": "word " * (1 + 5 * (index % 3)) + str(index)})
            rows.append({"messages": turns, "images": images})
        return write_rows(rows, name)

    return make
