"""The language model: transformers' NemotronH whose token mixers keep packed documents apart.

Mamba layers become `PackedMamba2Mixer`, with the limits of time steps that the config has: transformers puts
``time_step_min``, which is meant for initial values, in place of the lower one, where the released code and vLLM have 0
(transformers #48989). Attention layers run `lightning_vlm.ops.attention`; expert routing stays in float32. MLP and
norms work token by token and need nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer, NemotronHTopkRouter

from lightning_vlm.models.packed_mamba import PackedMamba2Mixer
from lightning_vlm.ops.attention import ATTENTION, use_document_attention
from lightning_vlm.segments import Documents, document_mask


class Float32Router(NemotronHTopkRouter):
    """transformers' router, in float32 whatever the precision of the model and of autocast.

    The released files keep its bias in float32: experts are chosen by differences that half precision would round away.
    """

    e_score_correction_bias: Tensor

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(..., hidden_size)`` -> logits, and weights and numbers of the chosen experts."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if (moved := self.e_score_correction_bias).dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


def make_language_model(config: NemotronHConfig) -> NemotronHForCausalLM:
    """A NemotronH language model that takes packed rows."""
    model = NemotronHForCausalLM(config)
    for module in model.modules():
        if type(module) is NemotronHMamba2Mixer:
            module.__class__ = PackedMamba2Mixer  # adds no state: weights, hooks and names stay
            module.time_step_limit = tuple(config.time_step_limit)
        elif type(module) is NemotronHTopkRouter:
            module.__class__ = Float32Router
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    use_document_attention(model.config)
    return model


def packed_inputs(config: NemotronHConfig, documents: Documents, dtype: torch.dtype) -> dict[str, Any]:
    """What the layers of the language model take instead of an attention mask.

    Args:
        config: The language model's.
        documents: Boundaries of the row.
        dtype: Of the hidden states.

    Raises:
        ValueError: If the attention implementation that the user chose takes no packed row.
    """
    chosen = config._attn_implementation
    inputs: dict[str, Any] = {"documents": documents, "use_cache": False}
    mask: Tensor | None = None
    if chosen in ("eager", "sdpa"):  # chosen by the user: these two know masks only, in the square of the row
        mask = document_mask(documents.cu_seqlens)[None, None]
        if chosen == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    elif chosen.startswith("flash_attention"):
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), documents.cu_seqlens)
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), documents.max_length)
    elif chosen != ATTENTION:
        raise ValueError(
            f"attn_implementation is {chosen!r}, which takes no packed rows here; expected {ATTENTION!r} "
            "(the default), 'flash_attention_2', or 'sdpa' and 'eager' at the cost of a mask in the square of the row"
        )
    return {**inputs, "attention_mask": {"full_attention": mask, "linear_attention": None}}
