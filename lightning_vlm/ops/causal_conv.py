"""Depthwise causal convolution over packed documents: no tap reaches into the document before.

The convolution in front of every Mamba2 scan is short (4 taps), so it is a few shifted multiply-adds rather than a
convolution call: on a CPU about a third of the time, and a document boundary is one comparison per tap. The price is a
hand-written backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlm.segments import lengths_from_cu_seqlens


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor) -> Tensor:
    """Convolves each document by itself.

    Args:
        x: ``(T, C)``, documents one after another.
        weight: ``(C, K)`` taps per channel, the last one on the token itself.
        bias: ``(C,)`` or ``None``.
        seq_idx: ``(T,)`` index of each token's document, see `lightning_vlm.segments`.

    Returns:
        ``(T, C)``, no activation applied.
    """
    return _CausalConv.apply(x, weight, bias, seq_idx)


def naive_causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """The plain truth beside `causal_conv`: PyTorch's convolution, one document at a time.

    Args:
        x: As for `causal_conv`.
        weight: As for `causal_conv`.
        bias: As for `causal_conv`.
        cu_seqlens: ``(num_documents + 1,)`` boundaries.
    """
    channels, taps = weight.shape
    outputs = []
    for document in x.split(lengths_from_cu_seqlens(cu_seqlens).tolist()):
        if len(document):
            padded = torch.nn.functional.pad(document.T, (taps - 1, 0))
            outputs.append(torch.nn.functional.conv1d(padded[None], weight[:, None], bias, groups=channels)[0].T)
    return torch.cat(outputs) if outputs else x


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor) -> Tensor:
        taps = weight.T.contiguous().flip(0)  # taps[k] is on the token k places before
        y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
        for distance in range(1, min(len(taps), len(x))):
            y[distance:].addcmul_(x[:-distance] * _same(seq_idx, distance, x), taps[distance])
        ctx.save_for_backward(x, weight, seq_idx)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seq_idx = ctx.saved_tensors
        taps = weight.T.contiguous().flip(0)
        dx, dtaps = dy * taps[0], torch.zeros_like(taps)
        dtaps[0] = (dy * x).sum(0)
        for distance in range(1, min(len(taps), len(x))):
            reaching = dy[distance:] * _same(seq_idx, distance, x)
            dx[:-distance].addcmul_(reaching, taps[distance])
            dtaps[distance] = (reaching * x[:-distance]).sum(0)
        return dx, dtaps.flip(0).T, dy.sum(0) if ctx.has_bias else None, None


def _same(seq_idx: Tensor, distance: int, like: Tensor) -> Tensor:
    """``(T - distance, 1)``: 1 where a token and the one ``distance`` before it belong to one document, else 0."""
    return (seq_idx[distance:] == seq_idx[:-distance]).to(like.dtype)[:, None]
