"""The chunked scan against the recurrence itself: outputs, every gradient, no bit across a boundary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_vlm.ops import ssd
from lightning_vlm.ops.ssd import chunked_ssd, naive_ssd
from lightning_vlm.segments import cu_seqlens_from_lengths, seq_idx_from_cu_seqlens

NAMES = ("y", "x", "dt", "A", "B", "C", "D")

# Worst relative error (see `differences`) measured over 1500 random cases: 9.0e-6 (dt), 5.1e-6 (A), 1.5e-6 (others).
TOLERANCE = 5e-5


def boundaries(lengths: list[int]) -> tuple[Tensor, Tensor]:
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    return cu_seqlens, seq_idx_from_cu_seqlens(cu_seqlens)


def random_inputs(
    tokens: int, heads: int = 4, groups: int = 2, width: int = 3, states: int = 5, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    x, B, C = (torch.randn(tokens, *shape) for shape in ((heads, width), (groups, states), (groups, states)))
    dt = torch.nn.functional.softplus(torch.randn(tokens, heads) - 1)
    A, D = -torch.exp(torch.randn(heads)), torch.randn(heads)
    return [x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D]


def output_and_gradients(function, inputs, document_form: Tensor, dy: Tensor, **options) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = function(*leaves, document_form, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def truth(inputs, cu_seqlens: Tensor, dy: Tensor) -> list[Tensor]:
    return output_and_gradients(naive_ssd, [value.double() for value in inputs], cu_seqlens, dy)


def differences(inputs, actual: list[Tensor], cu_seqlens: Tensor, dy: Tensor) -> dict[str, float]:
    """Of outputs and gradients, relative to the truth; where its terms cancel, to a tenth of their absolute values."""
    positive = [value if name == "A" else value.abs() for name, value in zip(NAMES[1:], inputs)]
    expected, magnitudes = truth(inputs, cu_seqlens, dy), truth(positive, cu_seqlens, dy.abs())
    found = {}
    for name, value, wanted, magnitude in zip(NAMES, actual, expected, magnitudes, strict=True):
        assert value.shape == wanted.shape, name
        assert value.isfinite().all(), name
        scale = max(wanted.norm(), 0.1 * magnitude.norm())
        found[name] = float((value.double() - wanted).norm() / scale.clamp(min=1e-30))
    return found


def assert_equals_the_truth(lengths: list[int], chunk_size: int = 64, **shapes: int) -> None:
    cu_seqlens, seq_idx = boundaries(lengths)
    inputs = random_inputs(sum(lengths), **shapes)
    dy = torch.randn(inputs[0].shape)
    actual = output_and_gradients(chunked_ssd, inputs, seq_idx, dy, chunk_size=chunk_size)
    found = differences(inputs, actual, cu_seqlens, dy)
    assert max(found.values()) <= TOLERANCE, found


LENGTHS = [
    [1],
    [2],
    [63],
    [64],
    [65],
    [30, 1, 39],
    [1, 1, 1, 1],
    [0, 5, 0, 0, 7, 0],
    [64, 64],
    [16, 48, 1],
    [15, 17, 32],
    [131, 2],
]


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_outputs_and_gradients_equal_the_recurrence(lengths, chunk_size):
    assert_equals_the_truth(lengths, chunk_size=chunk_size)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=6).filter(any),
    chunk_size=st.integers(1, 24),
    block_chunks=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 3), (6, 2)]),
    width=st.integers(1, 4),
    states=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_any_shape_any_chunk_any_block(lengths, chunk_size, block_chunks, heads, width, states, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd, "_BLOCK_ELEMENTS", block_chunks * chunk_size**2 * heads[0])
        assert_equals_the_truth(
            lengths, chunk_size=chunk_size, heads=heads[0], groups=heads[1], width=width, states=states
        )


@pytest.mark.parametrize("chunks_per_block", [1, 2, 3])
def test_state_is_carried_from_block_to_block(monkeypatch, chunks_per_block):
    monkeypatch.setattr(ssd, "_BLOCK_ELEMENTS", chunks_per_block * 8 * 8 * 4)
    assert len(ssd._blocks(torch.empty(101, 4, 1), chunk_size=8)) == -(-101 // (8 * chunks_per_block)) > 4
    assert_equals_the_truth([50, 1, 0, 43, 7], chunk_size=8)


def test_blocks_and_chunks_do_not_change_what_is_computed(monkeypatch):
    _, seq_idx = boundaries([70, 1, 0, 40, 19])
    inputs, dy = random_inputs(130), torch.randn(130, 4, 3)
    one = output_and_gradients(chunked_ssd, inputs, seq_idx, dy, chunk_size=16)
    monkeypatch.setattr(ssd, "_BLOCK_ELEMENTS", 1)
    many = output_and_gradients(chunked_ssd, inputs, seq_idx, dy, chunk_size=16)
    for name, found, expected in zip(NAMES, many, one):
        # Worst relative difference measured over fifty seeds: 2.3e-7, of A, a sum over blocks; 0 elsewhere.
        assert (found - expected).norm() <= 2e-6 * expected.norm(), name


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_row_without_tokens(lengths):
    _, seq_idx = boundaries(lengths)
    y, *gradients = output_and_gradients(chunked_ssd, random_inputs(0), seq_idx, torch.randn(0, 4, 3))
    assert y.shape == (0, 4, 3)
    assert all(not gradient.any() for gradient in gradients)


def test_the_recurrence_by_hand():
    # One head, one state: 0.5, then half of it and 3, times C = 2, and D = 10 times the input; then from zero again.
    x, dt = torch.tensor([1.0, 3.0, 4.0]).view(3, 1, 1), torch.tensor([[0.5], [1.0], [2.0]])
    A, B, C, D = torch.tensor([-0.6931472]), torch.ones(3, 1, 1), torch.full((3, 1, 1), 2.0), torch.tensor([10.0])
    cu_seqlens, seq_idx = boundaries([2, 1])
    expected = torch.tensor([0.5 * 2 + 10, (0.25 + 3) * 2 + 30, 8 * 2 + 40]).view(3, 1, 1)
    torch.testing.assert_close(naive_ssd(x, dt, A, B, C, D, cu_seqlens), expected)
    torch.testing.assert_close(chunked_ssd(x, dt, A, B, C, D, seq_idx), expected)


@pytest.mark.parametrize("rate", [-1e-6, -1.0, -20.0, -500.0])
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_any_decay_is_finite_and_right(rate, chunk_size):
    cu_seqlens, seq_idx = boundaries([40, 1, 60, 29])
    inputs = random_inputs(130)
    inputs[1], inputs[2] = torch.rand(130, 4) + 1e-3, torch.full((4,), rate)
    dy = torch.randn(130, 4, 3)
    actual = output_and_gradients(chunked_ssd, inputs, seq_idx, dy, chunk_size=chunk_size)
    # The sum of A dt over a chunk is rounded, so the error grows with it. Worst measured over thirty seeds, at rates
    # -1, -20, -500: 6.4e-7, 3.9e-5, 3.4e-4 (A), 5.3e-7, 8.8e-6, 2.1e-4 (dt), 3.6e-7, 1.3e-6, 8.9e-6 (others).
    # With the diagonal left in the gradient of the decays, where it cancels: 9.5e-2 (A at -500).
    found = differences(inputs, actual, cu_seqlens, dy)
    assert max(found.values()) <= 1e-6 + 3e-6 * abs(rate), found


def test_strong_decay_in_one_document_costs_the_next_no_precision():
    cu_seqlens, seq_idx = boundaries([33, 50])
    inputs, dy = random_inputs(83), torch.randn(83, 4, 3)
    inputs[1][:33] *= 1000
    actual = output_and_gradients(chunked_ssd, inputs, seq_idx, dy)
    expected = truth(inputs, cu_seqlens, dy)
    for index in (0, 1, 2, 4, 5):  # per token: judged in the second document alone
        found, wanted = actual[index][33:], expected[index][33:]
        # Worst relative error measured over fifty seeds: 8.9e-7 (dt).
        assert (found - wanted).norm() <= TOLERANCE * wanted.norm(), NAMES[index]


def test_bfloat16_inputs_are_computed_in_float32():
    cu_seqlens, seq_idx = boundaries([30, 1, 39, 64])
    inputs, dy = random_inputs(134, dtype=torch.bfloat16), torch.randn(134, 4, 3)
    actual = output_and_gradients(chunked_ssd, inputs, seq_idx, dy)
    assert [value.dtype for value in actual] == [torch.float32, *(value.dtype for value in inputs)]
    found = differences(inputs, actual, cu_seqlens, dy)
    # Worst relative errors measured over fifty seeds: 2.1e-3, the rounding of the gradients of x, B and C to bfloat16;
    # all others 1.1e-6.
    assert max(found[name] for name in "xBC") <= 2**-8
    assert max(found[name] for name in ("y", "dt", "A", "D")) <= TOLERANCE, found


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_autocast_does_not_narrow_it(backward_inside):
    _, seq_idx = boundaries([30, 1, 39])
    inputs, dy = random_inputs(70), torch.randn(70, 4, 3)
    expected = output_and_gradients(chunked_ssd, inputs, seq_idx, dy)
    leaves = [value.clone().requires_grad_() for value in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = chunked_ssd(*leaves, seq_idx)
        gradients = torch.autograd.grad(y, leaves, dy) if backward_inside else None
    gradients = gradients or torch.autograd.grad(y, leaves, dy)
    for name, found, wanted in zip(NAMES, [y, *gradients], expected):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("wanted", range(6), ids=NAMES[1:])
def test_each_gradient_may_be_asked_for_alone(wanted):
    _, seq_idx = boundaries([30, 1, 39])
    inputs, dy = random_inputs(70), torch.randn(70, 4, 3)
    every = output_and_gradients(chunked_ssd, inputs, seq_idx, dy)
    inputs[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(chunked_ssd(*inputs, seq_idx), inputs[wanted], dy)
    assert torch.equal(alone, every[1 + wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [4, 16, 64])
@pytest.mark.parametrize("lengths", [[1, 1], [5, 9], [16, 16], [70, 1], [1, 70], [33, 95], [64, 64]], ids=str)
def test_a_document_does_not_change_a_bit_of_another(monkeypatch, lengths, chunk_size, dtype):
    monkeypatch.setattr(ssd, "_BLOCK_ELEMENTS", 2 * 16 * 16 * 4)
    _, seq_idx = boundaries(lengths)
    first, tokens = lengths[0], sum(lengths)
    inputs, dy = random_inputs(tokens, dtype=dtype), torch.randn(tokens, 4, 3)
    per_token = [0, 1, 3, 4]  # x, dt, B, C

    def run(inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        y, *gradients = output_and_gradients(chunked_ssd, inputs, seq_idx, dy, chunk_size=chunk_size)
        return [y, *(gradients[index] for index in per_token)]

    def other(values: Tensor, part: slice) -> Tensor:
        values = values.clone()
        values[part] *= 100 * torch.rand(values[part].shape).to(values.dtype)
        return values

    before = run(inputs, dy)
    for changed, kept in [(slice(first), slice(first, None)), (slice(first, None), slice(first))]:
        others = [other(values, changed) if index in per_token else values for index, values in enumerate(inputs)]
        for name, old, new in zip(("y", "x", "dt", "B", "C"), before, run(others, other(dy, changed))):
            assert not torch.equal(new[changed], old[changed]), name
            assert torch.equal(new[kept], old[kept]), name


def test_the_quadratic_part_is_made_again_instead_of_kept():
    _, seq_idx = boundaries([256])
    leaves = [value.requires_grad_() for value in random_inputs(256)]
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_ssd(*leaves, seq_idx)
    states = 4 * 2 * 5 * 2 * 3  # chunks, groups, states, heads per group, width
    assert sorted(kept) == sorted([*(leaf.numel() for leaf in leaves), seq_idx.numel(), states])
