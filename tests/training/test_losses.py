"""However a step is cut into micro-batches and ranks, its loss is the one mean over all label tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.training.losses import divide_loss, step_label_tokens

CPU = torch.device("cpu")


@given(
    token_losses=st.lists(st.lists(st.floats(0.125, 8.0, width=16), max_size=5), min_size=1, max_size=12).filter(any),
    world_size=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_accumulation_and_averaging_over_ranks_are_undone(token_losses, world_size):
    # Lightning divides each micro-batch's loss by their number; data-parallel strategies average over ranks.
    ranks = [token_losses[rank::world_size] for rank in range(world_size)]
    accumulate = max(len(micro_batches) for micro_batches in ranks)
    label_tokens = torch.tensor(float(sum(map(len, token_losses))), dtype=torch.float64)

    total = 0.0
    for micro_batches in ranks:
        losses = [
            divide_loss(torch.tensor(sum(batch), dtype=torch.float64), label_tokens, accumulate, world_size)
            for batch in micro_batches
        ]
        total += sum(loss / accumulate for loss in losses) / world_size

    flat = [loss for micro_batch in token_losses for loss in micro_batch]
    torch.testing.assert_close(float(total), sum(flat) / len(flat))


def test_the_loss_keeps_its_dtype_and_its_graph():
    loss_sum = torch.tensor(6.0, requires_grad=True)
    loss = divide_loss(loss_sum, torch.tensor(4.0, dtype=torch.float64), 2, 3)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 9.0
    assert loss_sum.grad.item() == 1.5


@pytest.mark.parametrize(("local", "expected"), [(0, 1.0), (1, 1.0), (7, 7.0)])
def test_a_step_without_labels_divides_by_one(local, expected):
    tokens = step_label_tokens(local, CPU)
    assert tokens.item() == expected
    assert tokens.dtype == torch.float64
    assert divide_loss(torch.tensor(0.0), tokens, 4, 2) == 0


def test_counts_are_exact_beyond_what_float32_holds():
    assert int(step_label_tokens(2**24 + 1, CPU)) == 2**24 + 1


def test_label_tokens_are_summed_over_ranks(two_ranks):
    reports = two_ranks("""
from lightning_vlm.training.losses import step_label_tokens
device = torch.device("cpu")
from lightning.fabric.utilities.distributed import _sync_ddp_if_available as reduce
report([step_label_tokens(count, device, reduce).item() for count in ([5, 0, 0] if rank == 0 else [8, 3, 0])])
""")
    assert reports == [[13.0, 3.0, 1.0]] * 2
