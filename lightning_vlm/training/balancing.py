"""How much load balancing of experts a step has: what its routers are told, and what is logged of them.

The gradient of a step is that of

    sum of token losses / label tokens
        + coefficient * sum over micro-batches of (their share of the label tokens * sum over layers of their loss)

so a micro-batch has the weight in both terms that its label tokens give it, and one without labels, such as those that
fill a pipeline up, has none. Layers are summed up as in Megatron-LM: the coefficient means the same there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_vlm.models.load_balancing import Balancing
from lightning_vlm.schema import VLMBatch


class StepBalance:
    """The load balancing of the optimizer step that is under way.

    Args:
        coefficient: Of the load-balancing loss; 0 for none.

    Raises:
        ValueError: If it is negative.
    """

    def __init__(self, coefficient: float) -> None:
        if coefficient < 0:
            raise ValueError(f"load_balancing is {coefficient:g}; expected 0 for none, or a small number such as 1e-4")
        self.coefficient = coefficient
        self._micro_batches: list[tuple[Tensor, Tensor]] = []  # losses of layers, and the micro-batch's share
        self._num_layers = 1

    def check_precision(self, precision_plugin: Any) -> None:
        """Refuses a gradient scaler, which would enlarge the gradient of the token losses alone.

        Args:
            precision_plugin: The Trainer's.

        Raises:
            ValueError: If it has one.
        """
        if self.coefficient and getattr(precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"load_balancing does not work with trainer.precision {precision_plugin.precision}, whose gradient "
                "scaler does not reach the routers; set it to bf16-mixed, or load_balancing to 0"
            )

    def begin(self, batch: VLMBatch, text_config: Any, label_tokens: Tensor, data_ranks: int) -> dict[str, Balancing]:
        """Enters a micro-batch.

        Args:
            batch: As the model gets it.
            text_config: Of the language model.
            label_tokens: Of the whole step over all ranks.
            data_ranks: Number of data-parallel ranks, over which gradients are averaged. (Lightning's division by
                ``accumulate_grad_batches`` is of the loss it is given, and does not touch what routers add.)

        Returns:
            What the model's forward pass takes besides; nothing where nothing is balanced.
        """
        if not self.coefficient:
            return {}
        device = batch.input_ids.device
        share = (batch.num_label_tokens / label_tokens).to(torch.float32).to(device)  # MPS has no float64
        tokens = batch.input_ids != (text_config.pad_token_id or 0)
        if batch.attention_mask is not None:  # the data's padding may be another token
            tokens &= batch.attention_mask.bool()
        losses = torch.zeros(text_config.num_hidden_layers, dtype=torch.float32, device=device)
        self._micro_batches.append((losses, share))
        self._num_layers = text_config.layers_block_type.count("moe")
        return {"balancing": Balancing(tokens, self.coefficient * data_ranks * share, losses)}

    def take(self, reduce: Callable[..., Tensor], stages: dist.ProcessGroup | None = None) -> Tensor | None:
        """Ends the step, after its last backward pass.

        Args:
            reduce: Of the strategy: sums up over the ranks with different samples.
            stages: The ranks that hold other layers of the same model.

        Returns:
            The load-balancing loss of the step, a mean over layers and over micro-batches by their label tokens: 1 when
            all experts are chosen alike. The same on all ranks; ``None`` where nothing is balanced.
        """
        taken, self._micro_batches = self._micro_batches, []
        if not taken:
            return None
        total = torch.stack([losses.sum() * share for losses, share in taken]).sum() / self._num_layers
        if stages is not None:
            dist.all_reduce(total, group=stages)
        return reduce(total, reduce_op="sum")
