"""The convolution against PyTorch's own, one document at a time: outputs, every gradient, no bit across a boundary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_vlm.ops.causal_conv import causal_conv, naive_causal_conv
from lightning_vlm.segments import cu_seqlens_from_lengths, seq_idx_from_cu_seqlens

any_lengths = st.lists(st.integers(0, 7), max_size=6)


def boundaries(lengths: list[int]) -> tuple[Tensor, Tensor]:
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    return cu_seqlens, seq_idx_from_cu_seqlens(cu_seqlens)


def random_inputs(tokens: int, channels: int = 5, taps: int = 4, bias: bool = True) -> list[Tensor | None]:
    shapes = [(tokens, channels), (channels, taps), (channels,) if bias else None]
    return [None if shape is None else torch.randn(shape, dtype=torch.float64) for shape in shapes]


def output_and_gradients(function, inputs, document_form: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [None if value is None else value.detach().clone().requires_grad_() for value in inputs]
    y = function(*leaves, document_form)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.to(y.dtype))]


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@settings(max_examples=80, deadline=None)
@given(
    lengths=any_lengths,
    channels=st.integers(1, 4),
    taps=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_outputs_and_gradients_equal_the_plain_convolution(lengths, channels, taps, bias, seed):
    torch.manual_seed(seed)
    cu_seqlens, seq_idx = boundaries(lengths)
    inputs, dy = random_inputs(sum(lengths), channels, taps, bias), torch.randn(sum(lengths), channels).double()
    actual = output_and_gradients(causal_conv, inputs, seq_idx, dy)
    if not sum(lengths):  # a convolution of nothing has no plain truth to differentiate
        assert all(not gradient.any() for gradient in actual)
        return
    expected = output_and_gradients(naive_causal_conv, inputs, cu_seqlens, dy)
    # Worst difference measured over 2000 examples, in float64: 3.6e-15, absolute, at values up to 20.
    for found, truth in zip(actual, expected):
        torch.testing.assert_close(found, truth, atol=1e-13, rtol=0)


@pytest.mark.parametrize("lengths", [[1], [3], [4], [1, 1, 1], [2, 0, 5, 1], [9, 4]], ids=str)
def test_gradients_are_those_of_finite_differences(lengths):
    _, seq_idx = boundaries(lengths)
    leaves = [value.requires_grad_() for value in random_inputs(sum(lengths), 3)]
    assert torch.autograd.gradcheck(lambda *values: causal_conv(*values, seq_idx), leaves)


# Worst relative error measured over fifty seeds. float32: 2.6e-7 (the bias's gradient). bfloat16: 3.5e-3 (outputs).
# Under autocast the weight is float32 and so is the output: 1.8e-3 (the input's gradient, which is bfloat16).
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 2**-6),
        (torch.bfloat16, torch.float32, 2**-7),
    ],
    ids=["float32", "bfloat16", "autocast"],
)
def test_narrow_types_are_as_good_as_their_rounding(x_dtype, weight_dtype, tolerance):
    cu_seqlens, seq_idx = boundaries([1, 37, 0, 64, 2])
    dtypes = (x_dtype, weight_dtype, weight_dtype)
    inputs = [value.to(dtype) for value, dtype in zip(random_inputs(104), dtypes)]
    dy = torch.randn(104, 5).to(torch.promote_types(x_dtype, weight_dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x_dtype != weight_dtype):
        actual = output_and_gradients(causal_conv, inputs, seq_idx, dy)
    expected = output_and_gradients(naive_causal_conv, [value.double() for value in inputs], cu_seqlens, dy)
    assert [value.dtype for value in actual[1:]] == list(dtypes)
    for found, truth in zip(actual, expected):
        assert relative(found, truth) <= tolerance


def test_a_slice_of_a_wider_tensor_is_convolved_as_its_copy():
    _, seq_idx = boundaries([6, 5])
    x, weight, bias = random_inputs(11)
    wide = torch.cat([torch.randn(11, 3).double(), x, torch.randn(11, 2).double()], dim=1)
    assert torch.equal(causal_conv(wide[:, 3:8], weight, bias, seq_idx), causal_conv(x, weight, bias, seq_idx))


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["x", "weight", "bias"])
def test_each_gradient_may_be_asked_for_alone(wanted):
    _, seq_idx = boundaries([3, 4])
    inputs = random_inputs(7)
    dy = torch.randn(7, 5).double()
    every = output_and_gradients(causal_conv, inputs, seq_idx, dy)
    inputs[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(causal_conv(*inputs, seq_idx), inputs[wanted], dy)
    assert torch.equal(alone, every[1 + wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[5, 9], [1, 1], [2, 3], [70, 1], [1, 70]], ids=str)
def test_a_document_does_not_change_a_bit_of_another(lengths, dtype):
    _, seq_idx = boundaries(lengths)
    first, tokens = lengths[0], sum(lengths)
    x, weight, bias = (value.to(dtype) for value in random_inputs(tokens))
    dy = torch.randn(tokens, 5).to(dtype)

    def run(x: Tensor, dy: Tensor) -> list[Tensor]:
        return output_and_gradients(causal_conv, (x, weight, bias), seq_idx, dy)[:2]

    def other(values: Tensor, part: slice) -> Tensor:
        values = values.clone()
        values[part] = 1e4 * torch.randn(values[part].shape).to(dtype)
        return values

    y, dx = run(x, dy)
    for changed, kept in [(slice(first), slice(first, None)), (slice(first, None), slice(first))]:
        new_y, new_dx = run(other(x, changed), other(dy, changed))
        assert not torch.equal(new_y[changed], y[changed])
        assert torch.equal(new_y[kept], y[kept])
        assert torch.equal(new_dx[kept], dx[kept])
