"""Whether an exported folder says what the trained model says: the logits of one sample, before and after.

Before: the checkpoint's weights, rounded to the precision of the folder. After: the folder, read by transformers' own
loading code, which shares nothing with what wrote it. Both run through the same network, so not a bit may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_vlm.checkpoint.hf_import import mark_loaded
from lightning_vlm.checkpoint.opening import planned_model
from lightning_vlm.checkpoint.weight_files import WeightFiles
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.schema import DataError

_TEXT_TOKENS = 32


@torch.no_grad()
def verify(trained: Mapping[str, Tensor], folder: Path, sample: Mapping[str, Tensor] | None) -> float:
    """Compares logits.

    Args:
        trained: Weights by our names.
        folder: The export.
        sample: Arguments of `NemotronVL.forward`; a few tokens of text by default.

    Returns:
        The largest logit, to see that something was compared.

    Raises:
        DataError: If any logit differs.
    """
    files = WeightFiles(folder)
    dtype = max(files.values(), key=lambda tensor: tensor.num_bytes).dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = planned_model(folder, files).to_empty(device="cpu").eval()
    finally:
        torch.set_default_dtype(default)
    state = model.state_dict()
    for name, value in trained.items():
        state[name].copy_(value)
    mark_loaded(model, trained)
    if sample is None:
        placeholders = (model.config.image_token_id, model.config.audio_token_id)
        text = [token for token in range(model.config.text_config.vocab_size) if token not in placeholders]
        sample = {"input_ids": torch.tensor([text[:_TEXT_TOKENS]])}
    before = model(**sample, use_cache=False).logits
    config = model.config
    del model, state
    after = NemotronVL.from_pretrained(folder, config=config, dtype=dtype).eval()(**sample, use_cache=False).logits
    difference = float((before - after).abs().max())
    if not difference == 0:  # a NaN is no 0 either
        raise DataError(
            str(folder),
            f"its logits differ from the trained model's by {difference:.3g}, expected 0 "
            f"(largest logit {float(before.abs().max()):.3g})",
            "keep the checkpoint: the export was not kept, and this is a defect to report",
        )
    return float(before.abs().max())
