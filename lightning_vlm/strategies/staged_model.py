"""What a pipeline's rank has of a `NemotronVL`, called as if it were whole: for validation and generation.

All ranks of the pipeline call it together, on the same rows; hidden states travel from stage to stage, and each rank
gets the result. Generation keeps no cache: every token is a forward pass over the whole row.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.ops.cross_entropy import shift_labels
from lightning_vlm.strategies.schedules import Pipeline
from lightning_vlm.strategies.stages import StageInputs


class StagedNemotronVL(NemotronVL):
    """A cut `NemotronVL`; an instance of it becomes one by its class."""

    pipeline: Pipeline

    @wraps(NemotronVL.forward)  # transformers looks at its arguments
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Loss or logits, as `NemotronVL.forward`; not both, no cache, and no gradient (see `Pipeline.step`).

        Args:
            input_ids: ``(B, T)``.
            labels: ``(B, T)``.
            logits_to_keep: Of the last so many positions; of all when 0.
            num_items_in_batch: Divide the summed loss by this instead of by the batch's own label tokens.
            **inputs: Masks, boundaries and media.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a pipeline's forward pass outside of training has no gradient; call it under torch.no_grad()"
            )
        rows, length = input_ids.shape
        kept = min(logits_to_keep or length, length)
        if labels is None:
            shape = (rows, kept, self.config.text_config.vocab_size)
            return CausalLMOutputWithPast(logits=self.pipeline.relay(input_ids, StageInputs.of(inputs), None, shape))
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels(labels, inputs.get("cu_seqlens")) >= 0).sum().clamp(min=1)
        scale = 1 / torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=input_ids.device)
        return CausalLMOutputWithPast(loss=self.pipeline.relay(input_ids, StageInputs.of(inputs, labels), scale, ()))

    def states_before_head(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """``(B, T, D)`` hidden states behind the last norm.

        Args:
            input_ids: ``(B, T)``.
            **inputs: As of `forward`.
        """
        shape = (*input_ids.shape, self.config.text_config.hidden_size)
        return self.pipeline.relay(input_ids, StageInputs.of(inputs), None, shape, "states")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; ranks of the pipeline draw the same random numbers."""
        seed = torch.randint(2**31, (1,)).to(self.pipeline.device)
        seed = self.pipeline.from_last(seed)
        with torch.random.fork_rng():
            torch.manual_seed(int(seed))
            return super().generate(*args, **{**kwargs, "use_cache": False})

    def get_input_embeddings(self) -> Any:
        """The token embedding, where this rank has it."""
        return self.language_model.model.embeddings

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.pipeline.device
