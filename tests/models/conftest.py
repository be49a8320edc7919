"""A twin in transformers for our model, weights that exercise every parameter, batches of text and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.ops.pixels import normalize_patches
from lightning_vlm.schema import IGNORE_INDEX

IMAGE = 4
PAD = 0


@pytest.fixture
def shake() -> Callable[..., nn.Module]:
    """Moves every parameter away from its initial value, so small that many errors would not show."""

    def shake(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += std * torch.randn(parameter.shape, generator=generator)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # decides the routing beside the scores
                    buffer += std * torch.randn(buffer.shape, generator=generator)
        return model

    return shake


@pytest.fixture
def make_theirs(shake: Callable[..., nn.Module]) -> Callable[..., NemotronH_Omni_Reasoning_V3]:
    """transformers' own class of the family, with random weights."""

    def make(pattern: str = "M*-", seed: int = 0, **text_options: Any) -> NemotronH_Omni_Reasoning_V3:
        torch.manual_seed(seed)
        tiny = NemotronVLConfig.tiny(
            pattern=pattern, hidden_size=32, vision_hidden_size=32, vision_layers=2, **text_options
        )
        config = NemotronH_Omni_Reasoning_V3_Config(
            vision_config={**tiny.vision_config.to_dict(), "video_temporal_patch_size": 2},
            text_config=tiny.text_config.to_dict(),
            vision_hidden_size=tiny.vision_hidden_size,
            projector_hidden_size=tiny.projector_hidden_size,
            image_token_id=IMAGE,
        )
        return shake(NemotronH_Omni_Reasoning_V3(config), seed).eval()

    return make


@pytest.fixture
def make_twins(
    make_theirs: Callable[..., Any],
) -> Callable[..., tuple[NemotronVL, NemotronH_Omni_Reasoning_V3]]:
    """Our model and transformers', with the same weights."""

    def make(*args: Any, **options: Any) -> tuple[NemotronVL, NemotronH_Omni_Reasoning_V3]:
        theirs = make_theirs(*args, **options)
        ours = NemotronVL(NemotronVLConfig(**theirs.config.to_dict())).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return ours, theirs

    return make


Row = Sequence[int | tuple[int, int]]
"""Parts of a row in order: a number of text tokens, or the patch grid of an image."""


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """Right-padded inputs with uint8 patches; a row ``[5, (2, 6), 3]`` is 5 tokens, an image, 3 tokens."""

    def make(rows: Sequence[Row], seed: int = 0, patch_dim: int = 3 * 8 * 8) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        grids = [part for row in rows for part in row if isinstance(part, tuple)]
        tokens = [
            torch.cat(
                [
                    torch.full((part[0] * part[1] // 4,), IMAGE)
                    if isinstance(part, tuple)
                    else torch.randint(7, 263, (part,), generator=generator)
                    for part in row
                ]
            )
            for row in rows
        ]
        input_ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
        lengths = torch.tensor([len(row) for row in tokens])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        batch = {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "labels": input_ids.where(mask & (input_ids != IMAGE), IGNORE_INDEX),
        }
        if grids:
            shape = (sum(rows * columns for rows, columns in grids), patch_dim)
            batch["pixel_values"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            batch["image_grid_hw"] = torch.tensor(grids)
        return batch

    return make


@pytest.fixture
def as_floats() -> Callable[..., dict[str, Tensor]]:
    """The same batch as transformers takes it: pixels normalised in float32, then in the model's dtype."""

    def convert(batch: dict[str, Tensor], model: NemotronVL, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        if "pixel_values" not in batch:
            return batch
        mean, std = torch.tensor(model.config.norm_mean), torch.tensor(model.config.norm_std)
        return {**batch, "pixel_values": normalize_patches(batch["pixel_values"], mean, std).to(dtype)}

    return convert
