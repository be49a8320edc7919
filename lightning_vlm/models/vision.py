"""The vision tower: transformers' RADIO, with the images of a batch kept apart by `lightning_vlm.ops.attention`.

transformers attends to one image after the other unless its own FlashAttention integration is installed; ours takes
PyTorch's varlen kernel where there is one. What is computed is the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import RadioConfig, RadioModel
from transformers.models.radio.modeling_radio import RadioAttention

from lightning_vlm.ops.attention import ATTENTION, use_document_attention
from lightning_vlm.segments import Documents


class PackedRadioAttention(RadioAttention):
    """transformers' attention; instances of it become ours by their class, which adds no state."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within each image.

        Args:
            hidden_states: ``(1, T, D)``, images one after another.
            attention_mask: As in transformers.
            cu_seqlens: ``(num_images + 1,)``, from transformers; ``None`` for a single image.
            documents: The same boundaries, from `NemotronVL`.
            **kwargs: As in transformers.
        """
        if self.config._attn_implementation != ATTENTION or cu_seqlens is None or documents is None:
            return super().forward(hidden_states, attention_mask, cu_seqlens, **kwargs)
        return super().forward(hidden_states, attention_mask, None, documents=documents, **kwargs)


def make_vision_model(config: RadioConfig) -> RadioModel:
    """A RADIO tower that takes patches which are already cut and normalised."""
    model = RadioModel(config)
    model.make_preprocessor_external()
    for module in model.modules():
        if type(module) is RadioAttention:
            module.__class__ = PackedRadioAttention
    use_document_attention(model.config)
    return model
