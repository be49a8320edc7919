"""Attention inside documents against one dense mask: outputs, gradients, no bit across a boundary, what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import NemotronHConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_vlm.ops.attention import (
    ATTENTION,
    _varlen,
    attention_choice,
    document_attention,
    naive_document_attention,
    use_document_attention,
)
from lightning_vlm.segments import document_mask, documents_from_lengths

SCALING = 0.4


class Layer(nn.Module):
    """What transformers' attention functions read of the layer that calls them."""

    def __init__(self, causal: bool, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, heads // kv_heads


def random_inputs(tokens: int, heads: int = 4, kv_heads: int = 2, width: int = 8) -> list[Tensor]:
    return [torch.randn(1, count, tokens, width) for count in (heads, kv_heads, kv_heads)]


def fast(layer: nn.Module, inputs, lengths) -> Tensor:
    return document_attention(layer, *inputs, None, scaling=SCALING, documents=documents_from_lengths(lengths))[0]


def output_and_gradients(function, inputs, dy: Tensor) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = function(leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_equals_the_truth(layer: nn.Module, inputs, lengths, tolerance: float) -> float:
    dy = torch.randn(1, sum(lengths), inputs[0].shape[1], inputs[0].shape[3])
    cu_seqlens = documents_from_lengths(lengths).cu_seqlens
    actual = output_and_gradients(lambda values: fast(layer, values, lengths), inputs, dy)
    expected = output_and_gradients(
        lambda values: naive_document_attention(*values, cu_seqlens, layer.is_causal, SCALING),
        [value.double() for value in inputs],
        dy,
    )
    worst = 0.0
    # A key's gradient may cancel (it does for a document of one token): judged by the largest of the four.
    scale = max(float(value.norm()) for value in expected)
    for name, found, wanted in zip(("output", "query", "key", "value"), actual, expected, strict=True):
        assert found.shape == wanted.shape, name
        difference = float((found.double() - wanted).norm()) / scale
        assert difference <= tolerance, f"{name} differs by {difference:.2e}, relative"
        worst = max(worst, difference)
    return worst


# Worst measured over 1000 random cases: 4.9e-7 in float32; over fifty seeds of the bfloat16 case: 3.5e-3.
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("lengths", [[1], [33], [5, 1, 8], [0, 3, 0, 0, 4, 0], [1, 1, 1], [64, 65]], ids=str)
def test_outputs_and_gradients_equal_one_softmax_under_a_dense_mask(lengths, heads, kv_heads, causal):
    assert_equals_the_truth(Layer(causal, heads, kv_heads), random_inputs(sum(lengths), heads, kv_heads), lengths, 4e-6)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=7).filter(any), causal=st.booleans(), seed=st.integers(0, 2**32))
def test_any_documents(lengths, causal, seed):
    torch.manual_seed(seed)
    assert_equals_the_truth(Layer(causal), random_inputs(sum(lengths)), lengths, 4e-6)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_bfloat16_is_as_good_as_its_rounding(causal):
    inputs = [value.bfloat16() for value in random_inputs(70)]
    assert_equals_the_truth(Layer(causal), inputs, [30, 1, 39], 2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("lengths", [[1, 1], [5, 9], [70, 1], [1, 70], [64, 64]], ids=str)
def test_a_document_does_not_change_a_bit_of_another(lengths, causal, dtype):
    first, tokens = lengths[0], sum(lengths)
    inputs = [value.to(dtype) for value in random_inputs(tokens)]
    dy = torch.randn(1, tokens, 4, 8)

    def run(inputs, dy: Tensor) -> list[Tensor]:
        y, *gradients = output_and_gradients(lambda values: fast(Layer(causal), values, lengths), inputs, dy)
        return [y[0], *(gradient[0].transpose(0, 1) for gradient in gradients)]  # tokens first

    before = run(inputs, dy)
    for changed, kept in [(slice(first), slice(first, None)), (slice(first, None), slice(first))]:
        others, other_dy = [value.clone() for value in inputs], dy.clone()
        for value in others:
            value[:, :, changed] = 30 * torch.randn(value[:, :, changed].shape).to(dtype)
        other_dy[:, changed] = torch.randn(other_dy[:, changed].shape)
        for old, new in zip(before, run(others, other_dy)):
            assert torch.equal(new[kept], old[kept])
        assert not torch.equal(run(others, other_dy)[0][changed], before[0][changed])


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["query", "key", "value"])
def test_each_gradient_may_be_asked_for_alone(wanted):
    inputs, dy = random_inputs(12), torch.randn(1, 12, 4, 8)
    every = output_and_gradients(lambda values: fast(Layer(True), values, [5, 7]), inputs, dy)
    inputs[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(fast(Layer(True), inputs, [5, 7]), inputs[wanted], dy)
    torch.testing.assert_close(alone, every[1 + wanted])


def test_without_boundaries_it_is_transformers_sdpa():
    layer, inputs = Layer(True), [torch.randn(2, heads, 9, 8) for heads in (4, 2, 2)]
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[0, ..., 7:] = False
    for given_mask in (None, mask):
        expected, _ = sdpa_attention_forward(layer, *inputs, given_mask, 0.0, SCALING)
        actual, weights = ALL_ATTENTION_FUNCTIONS[ATTENTION](layer, *inputs, given_mask, scaling=SCALING)
        assert torch.equal(actual, expected)
        assert weights is None


def test_a_cache_is_refused():
    query, key, value = random_inputs(12)
    with pytest.raises(ValueError, match=r"got 1 row\(s\), 4 queries and 12 keys; pass no cache with cu_seqlens"):
        fast(Layer(True), (query[:, :, -4:], key, value), [5, 7])


def test_a_batch_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"expected one row with as many keys as queries, got 2 row\(s\)"):
        fast(Layer(True), [value.repeat(2, 1, 1, 1) for value in random_inputs(12)], [5, 7])


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "no varlen kernel for cpu"),
        ("meta", torch.float16, "no varlen kernel for meta"),
        ("cuda", torch.float32, "takes float16 or bfloat16, not torch.float32"),
    ],
)
def test_without_the_kernel_each_document_goes_through_sdpa_and_the_reason_is_named(device, dtype, reason):
    choice = attention_choice(torch.device(device), dtype)
    assert choice.name == "sdpa"
    assert choice.reason.startswith("per document: ")
    assert choice.reason.endswith(reason)


@pytest.fixture
def stand_in_kernel() -> Iterator[list[tuple[int, int]]]:
    """Gives a CPU the two kernels below PyTorch's varlen function, by their contract; tells the windows asked for."""
    windows: list[tuple[int, int]] = []

    def probabilities(query, key, cu_q, cu_k, causal, scale):
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return scores.masked_fill(~document_mask(cu_q, causal), -torch.inf).softmax(-1)

    def forward(
        query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *,
        scale=None, window_size_left=None, window_size_right=None, **others,
    ):  # fmt: skip
        assert all(tensor.is_contiguous() and tensor.dim() == 3 for tensor in (query, key, value))
        assert (max_q, max_k) == (int(cu_q.diff().max()),) * 2
        windows.append((window_size_left, window_size_right))
        lse = query.new_zeros(query.shape[1], query.shape[0])
        output = torch.einsum("hqk,khd->qhd", probabilities(query, key, cu_q, cu_k, causal, scale), value)
        return output, lse, torch.zeros(2, dtype=torch.uint64), query.new_zeros(0), query.new_zeros(0)

    def backward(
        dy, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *,
        scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        p = probabilities(query, key, cu_q, cu_k, causal, scale)  # by hand: below a kernel there is no autograd
        dp = torch.einsum("qhd,khd->hqk", dy, value)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        pairs = ("hqk,khd->qhd", ds, key), ("hqk,qhd->khd", ds, query), ("hqk,qhd->khd", p, dy)
        return tuple(torch.einsum(*pair) for pair in pairs)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield windows
    library._destroy()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)], ids=str)
def test_torchs_varlen_function_over_a_stand_in_for_its_kernel(stand_in_kernel, heads, kv_heads, causal):
    layer, documents = Layer(causal, heads, kv_heads), documents_from_lengths([5, 1, 0, 33])
    inputs, dy = random_inputs(39, heads, kv_heads), torch.randn(1, 39, heads, 8)
    actual = output_and_gradients(lambda values: _varlen(layer, *values, SCALING, documents), inputs, dy)
    expected = output_and_gradients(lambda values: fast(layer, values, [5, 1, 0, 33]), inputs, dy)
    assert stand_in_kernel == [(-1, 0) if causal else (-1, -1)]
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)  # measured: 2e-6


@pytest.mark.parametrize(("chosen", "kept"), [(None, ATTENTION), ("sdpa", ATTENTION), ("eager", "eager")])
def test_only_the_default_is_replaced(chosen, kept):
    config = NemotronHConfig()
    config._attn_implementation = chosen
    use_document_attention(config)
    assert config._attn_implementation == kept
