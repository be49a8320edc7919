"""Which implementation of the Mamba2 operations runs, why, what is refused; and that the chosen one is the truth."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from lightning_vlm.ops import mamba
from lightning_vlm.ops.causal_conv import naive_causal_conv
from lightning_vlm.ops.choice import Choice
from lightning_vlm.ops.mamba import VARIABLE, conv_and_silu, mamba_choice, scan
from lightning_vlm.ops.ssd import naive_ssd
from lightning_vlm.segments import cu_seqlens_from_seq_idx, documents_from_lengths

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_on_a_cpu_torch_runs_and_says_why_the_others_do_not():
    choice = mamba_choice(CPU)
    assert choice.name == "torch"
    for name in ("mamba_ssm", "fla"):
        assert f"{name}: runs on NVIDIA GPUs only, this is cpu" in choice.reason


def test_absent_packages_are_named(monkeypatch):
    monkeypatch.setattr(mamba, "_PACKAGES", {"mamba_ssm": ("absent_a", "absent_b"), "fla": ("absent_c",), "torch": ()})
    choice = mamba_choice(GPU)
    assert choice.name == "torch"
    assert choice.reason == "mamba_ssm: absent_a and absent_b not installed; fla: absent_c not installed"


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ({"mamba_ssm": ("torch",), "fla": ("torch",), "torch": ()}, "mamba_ssm"),
        ({"mamba_ssm": ("torch", "absent"), "fla": ("torch",), "torch": ()}, "fla"),
    ],
    ids=["both", "one_of_two"],
)
def test_on_a_gpu_the_first_that_is_installed_runs(monkeypatch, packages, expected):
    monkeypatch.setattr(mamba, "_PACKAGES", packages)
    assert mamba_choice(GPU).name == expected
    assert mamba_choice(CPU).name == "torch"


def test_torch_may_be_named(monkeypatch):
    monkeypatch.setattr(mamba, "_PACKAGES", {"mamba_ssm": ("torch",), "fla": ("torch",), "torch": ()})
    monkeypatch.setenv(VARIABLE, "torch")
    for device in (CPU, GPU):
        choice = mamba_choice(device)
        assert choice.name == "torch"
        assert VARIABLE in choice.reason


@pytest.mark.parametrize("name", ["mamba_ssm", "fla"])
def test_what_cannot_run_is_refused_not_replaced(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(RuntimeError, match=f"{VARIABLE}={name} cannot run: runs on NVIDIA GPUs only, this is cpu"):
        mamba_choice(CPU)
    monkeypatch.setattr(mamba, "_PACKAGES", {"mamba_ssm": ("absent",), "fla": ("absent",), "torch": ()})
    with pytest.raises(RuntimeError, match=f"{name} cannot run: absent not installed; install it or unset {VARIABLE}"):
        mamba_choice(GPU)


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=f"{VARIABLE} is 'triton'; expected one of mamba_ssm, fla, torch"):
        mamba_choice(CPU)


@pytest.mark.parametrize("lengths", [[30, 1, 39], [0, 5, 0, 65]], ids=str)
def test_the_choice_of_a_cpu_computes_the_truth(lengths):
    documents, tokens = documents_from_lengths(lengths), sum(lengths)
    x, weight, bias = torch.randn(tokens, 6), torch.randn(6, 4), torch.randn(6)
    expected = torch.nn.functional.silu(naive_causal_conv(x, weight, bias, documents.cu_seqlens))
    # Worst differences measured over fifty seeds: 1.4e-6 (convolution), 1.0e-5 (scan, at values up to 100).
    torch.testing.assert_close(
        conv_and_silu(x, weight, bias, documents, mamba_choice(CPU)), expected, atol=1e-5, rtol=0
    )
    x, B, C = torch.randn(tokens, 4, 3), torch.randn(tokens, 2, 5), torch.randn(tokens, 2, 5)
    dt, A, D = torch.rand(tokens, 4), -torch.rand(4), torch.randn(4)
    expected = naive_ssd(x, dt, A, B, C, D, documents.cu_seqlens)
    actual = scan(x, dt, A, B, C, D, documents, mamba_choice(CPU))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.fixture
def stand_in_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba_ssm 2.3.2 and causal_conv1d 1.7.0 as modules that refuse what theirs cannot take, and compute the truth."""

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        rows, channels, tokens = x.shape
        assert (rows, channels % 8, activation) == (1, 0, "silu")
        assert tokens > 1, "backward refuses one token"
        assert x.stride(1) == 1, "channels last"
        assert x.stride(2) % 8 == 0
        assert x.stride(0) % 8 == 0
        assert x.storage_offset() % 8 == 0, "16 bytes are loaded at a time"
        assert seq_idx.shape == (1, tokens)
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        y = naive_causal_conv(x[0].T, weight, bias, cu_seqlens_from_seq_idx(seq_idx[0]))
        return torch.nn.functional.silu(y).T[None]

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, seq_idx=None):
        assert x.shape[1] > 0, "an empty row is written out of bounds"
        assert seq_idx.shape == x.shape[:2] == dt.shape[:2]
        assert bool((seq_idx.diff() >= 0).all()), "equal numbers are joined"
        return naive_ssd(x[0], dt[0], A, B[0], C[0], D, cu_seqlens_from_seq_idx(seq_idx[0]))[None]

    modules = {"causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn}, "mamba_ssm": {}, "mamba_ssm.ops": {}}
    modules |= {"mamba_ssm.ops.triton": {}}
    modules |= {"mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined}}
    for name, functions in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("lengths", [[30, 1, 39], [0, 5, 0, 65], [1], [0]], ids=str)
@pytest.mark.parametrize("columns", [21, 20, 24], ids=["odd_stride", "odd_offset", "aligned"])
def test_the_packages_get_what_they_can_take_from_stand_ins_by_their_contract(stand_in_packages, lengths, columns):
    documents, tokens, kernel = documents_from_lengths(lengths), sum(lengths), Choice("mamba_ssm", "installed")
    projected = torch.randn(tokens, columns, requires_grad=True)  # a view of it, as in_proj's output is cut
    start = 4 if columns == 20 else 8
    weight, bias = torch.randn(8, 4), torch.randn(8)
    for choice in (kernel, mamba_choice(CPU)):
        y = conv_and_silu(projected[:, start : start + 8], weight, bias, documents, choice)
        (gradient,) = torch.autograd.grad(y.square().sum(), projected)
        if choice is kernel:
            expected, expected_gradient = y, gradient
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=0)
    x, B, C = torch.randn(tokens, 4, 3), torch.randn(tokens, 2, 5), torch.randn(tokens, 2, 5)
    dt, A, D = torch.rand(tokens, 4), -torch.rand(4), torch.randn(4)
    found = [scan(x, dt, A, B, C, D, documents, choice) for choice in (kernel, mamba_choice(CPU))]
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)
