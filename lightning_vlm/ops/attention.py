"""Attention inside documents, registered with transformers' attention interface under `ATTENTION`.

Given boundaries it runs FlashAttention's varlen kernel (PyTorch's own, on GPUs in half precision) or else SDPA once per
document; without boundaries it is transformers' SDPA. Either way memory grows with the row, not with its square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_vlm.ops.choice import Choice, is_installed
from lightning_vlm.segments import Documents, document_mask

ATTENTION = "document_attention"
"""Name of the implementation in ``config._attn_implementation``."""


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention layers call.

    Args:
        module: The layer; its ``is_causal`` decides the mask inside a document.
        query: ``(B, heads, T, head_dim)``; ``B`` is 1 with boundaries.
        key: ``(B, kv_heads, T, head_dim)``.
        value: ``(B, kv_heads, T, head_dim)``.
        attention_mask: Mask of a padded batch; ``None`` with boundaries.
        scaling: Scale of the scores.
        dropout: Attention dropout; the varlen kernel has none, so SDPA runs with it.
        documents: Boundaries of a packed row.
        **kwargs: Passed on to SDPA.

    Returns:
        ``(B, T, heads, head_dim)`` and ``None``.

    Raises:
        ValueError: If boundaries are given for a batch of several rows, or together with a cache's keys.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a packed row attends to itself only: expected one row with as many keys as queries, got {query.shape[0]} "
            f"row(s), {query.shape[2]} queries and {key.shape[2]} keys; pass no cache with cu_seqlens"
        )
    if attention_choice(query.device, query.dtype).name == "varlen" and not dropout:
        return _varlen(module, query, key, value, scaling, documents), None
    outputs = [
        sdpa_attention_forward(module, *parts, None, dropout, scaling)[0]
        for parts in zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query, key, value)))
        if parts[0].shape[2]
    ]
    return torch.cat(outputs, dim=1), None


def use_document_attention(config: PretrainedConfig) -> None:
    """Selects document attention where transformers chose its default; what the user chose is kept."""
    if config._attn_implementation in (None, "sdpa"):
        config._attn_implementation = ATTENTION


def naive_document_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool, scaling: float
) -> Tensor:
    """The plain truth beside `document_attention`: one softmax over the row, under a dense mask.

    Args:
        query: ``(1, heads, T, head_dim)``.
        key: ``(1, kv_heads, T, head_dim)``.
        value: ``(1, kv_heads, T, head_dim)``.
        cu_seqlens: ``(num_documents + 1,)`` boundaries.
        causal: Whether a token sees only earlier ones of its document.
        scaling: Scale of the scores.

    Returns:
        ``(1, T, heads, head_dim)``.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.masked_fill(~document_mask(cu_seqlens, causal), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def attention_choice(device: torch.device, dtype: torch.dtype) -> Choice:
    """Which implementation runs for packed rows, and why."""
    if device.type != "cuda":
        return Choice("sdpa", f"per document: no varlen kernel for {device.type}")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("sdpa", f"per document: the varlen kernel takes float16 or bfloat16, not {dtype}")
    if not is_installed("torch.nn.attention.varlen"):
        return Choice("sdpa", f"per document: torch {torch.__version__} has no torch.nn.attention.varlen")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Choice("sdpa", "per document: the varlen kernel needs an Ampere GPU or newer")
    return Choice("varlen", "FlashAttention's varlen kernel of PyTorch")


def _varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    documents: Documents,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # a CUDA build's import

    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # its enable_gqa is refused by one of the two backends
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (T, heads, head_dim)
    window = (-1, 0) if getattr(module, "is_causal", True) else (-1, -1)
    bounds, longest = documents.cu_seqlens, documents.max_length
    attended = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window)
    return attended.unsqueeze(0)  # type: ignore[union-attr]


AttentionInterface.register(ATTENTION, document_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
