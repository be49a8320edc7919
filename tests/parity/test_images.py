"""Our model against transformers' own class of the family, with equal weights: logits, loss, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

# Rows: two images of different grids and text behind them; text only; one image. All of different lengths.
MIXED = [[5, (2, 6), 3, (4, 4), 9], [8], [2, (4, 10), 6]]
ONE_IMAGE = [[3, (2, 2), 4]]
TEXT_ONLY = [[12], [7]]

# Our Mamba layers add in another order, and keep step sizes in float32 where transformers' torch path rounds them.
# Worst differences measured over all cases below: float32 2.1e-6 (a gradient of dt_bias), bfloat16 3.4e-2 (another one)
# and 8.7e-3 (logits). Without Mamba layers both networks run the same kernels in the same order: 0.0.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-4}
EXACT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # room for a machine whose kernels add in another order


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outputs.logits.detach(), outputs.loss.detach(), gradients


def assert_same(actual: Tensor, expected: Tensor, tolerance: float, what: str, scale: Tensor | None = None) -> None:
    difference = (actual.double() - expected.double()).norm() / (expected if scale is None else scale).double().norm()
    assert difference <= tolerance, f"{what} differs by {difference:.2e}, relative"


def assert_parity(ours: nn.Module, theirs: nn.Module, batch, reference_batch, dtype: torch.dtype) -> None:
    logits, loss, gradients = run(ours.train(), batch)
    their_logits, their_loss, their_gradients = run(theirs.train(), reference_batch)
    real = batch["attention_mask"].bool()
    has_mamba = "M" in ours.config.text_config.hybrid_override_pattern
    tolerance = (RELATIVE_TOLERANCE if has_mamba else EXACT_TOLERANCE)[dtype]
    assert_same(logits[real], their_logits[real], tolerance, "logits")
    assert_same(loss, their_loss, tolerance, "loss")
    assert gradients.keys() == their_gradients.keys()
    compared = 0
    for name, expected in their_gradients.items():
        if expected is None or not expected.any():
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            # A bias of keys shifts every score alike: its gradient is rounding alone, judged by its weight's.
            weight = their_gradients[name.replace("bias", "weight")] if name.endswith("k_proj.bias") else None
            assert_same(gradients[name], expected, tolerance, name, weight)
            compared += 1
    # All but the tower's video embedding, which no image reaches (and the tower, without images).
    assert compared == len(gradients) - 1 or "pixel_values" not in batch


@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("rows", [MIXED, ONE_IMAGE], ids=["mixed", "one_image"])
@pytest.mark.parametrize("pattern", ["M*-", "MEM*E", "MM", "*-*", "E"])
def test_image_batches_equal_transformers(make_twins, make_batch, as_floats, pattern, rows, pixels):
    ours, theirs = make_twins(pattern)
    batch = make_batch(rows)
    floats = as_floats(batch, ours)
    assert_parity(ours, theirs, batch if pixels == "uint8" else floats, floats, torch.float32)


@pytest.mark.parametrize("pattern", ["M*-", "MEM*E"])
def test_image_batches_equal_transformers_in_bfloat16(make_twins, make_batch, as_floats, pattern):
    ours, theirs = (model.to(torch.bfloat16) for model in make_twins(pattern))
    batch = make_batch(MIXED)
    assert_parity(ours, theirs, batch, as_floats(batch, ours, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("pattern", ["M*-", "MEM*E"])
def test_text_only_batches_equal_transformers(make_twins, make_batch, pattern):
    ours, theirs = make_twins(pattern)
    batch = make_batch(TEXT_ONLY)
    assert_parity(ours, theirs, batch, batch, torch.float32)


def test_sequences_longer_than_a_mamba_chunk_equal_transformers(make_twins, make_batch, as_floats):
    ours, theirs = make_twins("MEM*", chunk_size=8)
    batch = make_batch(MIXED)
    assert batch["input_ids"].shape[1] > 2 * 8
    assert_parity(ours, theirs, batch, as_floats(batch, ours), torch.float32)


def test_padding_does_not_change_a_row(make_twins, make_batch):
    ours, _ = make_twins("MEM*")
    alone, long = make_batch([[4, (2, 2), 3]]), make_batch([[40]], seed=1)
    padding = 40 - alone["input_ids"].shape[1]
    padded = {
        **alone,
        "input_ids": torch.cat([nn.functional.pad(alone["input_ids"], (0, padding)), long["input_ids"]]),
        "attention_mask": torch.cat([nn.functional.pad(alone["attention_mask"], (0, padding)), long["attention_mask"]]),
        "labels": None,
    }
    with torch.no_grad():
        expected = ours(**alone).logits[0]
        actual = ours(**padded).logits[0, : expected.shape[0]]
    # Worst difference measured over twenty seeds: 7.2e-7 at logits up to 2.6 (longer attention sums).
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)
