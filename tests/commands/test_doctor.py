"""What ``doctor`` says about this machine, and that it notices what is wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_vlm.commands.doctor import examine
from lightning_vlm.models import packed_mamba
from lightning_vlm.segments import documents_from_lengths


def cpu_lines(printed: str) -> list[str]:
    """What is said of the CPU, whatever else is here."""
    return re.split(r"\n(?=\S)", printed.partition("\ncpu (")[2])[0].rstrip("\n").splitlines()[1:]


def test_it_names_packages_implementations_and_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine()
    printed = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", printed, re.M)
    assert re.search(r"^mamba-ssm +(not installed|[\d.]+.*) \(Mamba kernels\)$", printed, re.M)
    ssd, first, second, single, half = cpu_lines(printed)
    reason = "mamba_ssm: runs on NVIDIA GPUs only, this is cpu; fla: runs on NVIDIA GPUs only, this is cpu"
    assert ssd == f"  ssd       torch     {reason} (LIGHTNING_VLM_SSD selects another)"
    assert first == "  attention sdpa      float32: per document: no varlen kernel for cpu"
    assert second == "  attention sdpa      bfloat16: per document: no varlen kernel for cpu"
    pattern = r"  {:<10}packing isolation: max\|d\| = \d\.\de[+-]\d\d OK \(ssd=torch, attn=sdpa\)"
    assert re.fullmatch(pattern.format("float32"), single)
    assert re.fullmatch(pattern.format("bfloat16"), half)


def test_a_named_implementation_is_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_VLM_SSD", "torch")
    assert examine()
    assert cpu_lines(capsys.readouterr().out)[0].startswith("  ssd       torch     named by LIGHTNING_VLM_SSD (")


def test_what_cannot_run_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_VLM_SSD", "fla")
    assert not examine()
    (line,) = cpu_lines(capsys.readouterr().out)
    assert line.startswith("  ssd       ERROR     LIGHTNING_VLM_SSD=fla cannot run: runs on NVIDIA GPUs only, this is ")


def test_a_leak_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sound = packed_mamba.scan

    def leaks(*args: Any) -> torch.Tensor:
        *tensors, documents, choice = args
        return sound(*tensors, documents_from_lengths([sum(documents.lengths)]), choice)

    monkeypatch.setattr(packed_mamba, "scan", leaks)
    assert not examine()
    assert capsys.readouterr().out.count(" LEAK (ssd=torch, attn=sdpa); another document's text changes this one") >= 1
