"""The two operations of a Mamba2 layer over packed documents, by the fastest implementation that is installed.

``torch`` runs anywhere (`lightning_vlm.ops.causal_conv`, `lightning_vlm.ops.ssd`). ``mamba_ssm`` (with its companion
``causal_conv1d``) and ``fla`` (flash-linear-attention, pure Triton) run on NVIDIA GPUs. Which one runs is
`mamba_choice`; the environment variable ``LIGHTNING_VLM_SSD`` names one explicitly.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lightning_vlm.ops.causal_conv import causal_conv
from lightning_vlm.ops.choice import Choice, is_installed
from lightning_vlm.ops.ssd import chunked_ssd
from lightning_vlm.segments import Documents

VARIABLE = "LIGHTNING_VLM_SSD"
_PACKAGES = {"mamba_ssm": ("mamba_ssm", "causal_conv1d"), "fla": ("fla",), "torch": ()}


def mamba_choice(device: torch.device) -> Choice:
    """Which implementation runs on a device, and why.

    Raises:
        RuntimeError: If ``LIGHTNING_VLM_SSD`` names one that is unknown or cannot run here.
    """
    missing = {name: obstacle(name, device) for name in _PACKAGES}
    if wanted := os.environ.get(VARIABLE):
        if wanted not in _PACKAGES:
            raise RuntimeError(f"{VARIABLE} is {wanted!r}; expected one of {', '.join(_PACKAGES)}")
        if missing[wanted]:
            raise RuntimeError(f"{VARIABLE}={wanted} cannot run: {missing[wanted]}; install it or unset {VARIABLE}")
        return Choice(wanted, f"named by {VARIABLE}")
    for name in ("mamba_ssm", "fla"):
        if not missing[name]:
            return Choice(name, "installed")
    return Choice("torch", "; ".join(f"{name}: {missing[name]}" for name in ("mamba_ssm", "fla")))


def conv_and_silu(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents, choice: Choice) -> Tensor:
    """Causal depthwise convolution and SiLU, each document by itself.

    Args:
        x: ``(T, C)``.
        weight: ``(C, K)``.
        bias: ``(C,)`` or ``None``.
        documents: Boundaries.
        choice: From `mamba_choice`.

    Returns:
        ``(T, C)``.
    """
    if choice.name == "mamba_ssm" and len(x) > 1:  # its backward refuses a row of one token
        from causal_conv1d import causal_conv1d_fn

        if x.stride(0) % 8 or x.storage_offset() % 8:  # a view of in_proj's output; the kernel loads 16 bytes at a time
            x = x.clone(memory_format=torch.contiguous_format)
        # (1, C, T) with neighbouring channels side by side in memory, which the kernel needs to take seq_idx
        rows = x[None].transpose(1, 2)
        y = causal_conv1d_fn(rows, weight, bias, activation="silu", seq_idx=documents.seq_idx[None])
        return y.squeeze(0).T  # an index would have its gradient filled with zeros, and copied
    return torch.nn.functional.silu(causal_conv(x, weight, bias, documents.seq_idx))


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: Documents, choice: Choice
) -> Tensor:
    """The Mamba2 recurrence, see `lightning_vlm.ops.ssd.naive_ssd` for arguments and result.

    Args:
        x: ``(T, heads, head_dim)``.
        dt: ``(T, heads)`` float32, after softplus.
        A: ``(heads,)`` float32, negative.
        B: ``(T, groups, state_size)``.
        C: ``(T, groups, state_size)``.
        D: ``(heads,)``.
        documents: Boundaries.
        choice: From `mamba_choice`.
    """
    if choice.name == "mamba_ssm" and len(x):  # an empty row is written out of bounds
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        seq_idx = documents.seq_idx[None]
        y = mamba_chunk_scan_combined(x[None], dt[None], A, B[None], C[None], 256, D=D, seq_idx=seq_idx)
        return y.squeeze(0)
    if choice.name == "fla":
        from fla.ops.simple_gla import chunk_simple_gla

        # Gated linear attention with one decay per head and step is this recurrence: q = C, k = B, v = dt x.
        repeats = x.shape[1] // B.shape[1]
        q, k = (matrix.repeat_interleave(repeats, dim=1)[None] for matrix in (C, B))
        v = (x * dt[..., None]).to(x.dtype)[None]
        y, _ = chunk_simple_gla(q, k, v, g=(dt * A)[None], scale=1.0, cu_seqlens=documents.cu_seqlens.long())
        return y[0].float() + D.float()[:, None] * x.float()
    return chunked_ssd(x, dt, A, B, C, D, documents.seq_idx)


def obstacle(name: str, device: torch.device) -> str:
    """Why an implementation cannot run on a device; empty if it can.

    Args:
        name: ``torch``, ``mamba_ssm`` or ``fla``.
        device: The device.
    """
    if name == "torch":
        return ""
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs only, this is {device.type}"
    absent = [package for package in _PACKAGES[name] if not is_installed(package)]
    return f"{' and '.join(absent)} not installed" if absent else ""
