"""Which implementation of the Mamba2 operations runs, why, what is refused; and that the chosen one is the truth."""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.ops import mamba
from lightning_vlm.ops.causal_conv import naive_causal_conv
from lightning_vlm.ops.mamba import VARIABLE, conv_and_silu, mamba_choice, scan
from lightning_vlm.ops.ssd import naive_ssd
from lightning_vlm.segments import documents_from_lengths

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
