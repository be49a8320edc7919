"""Load balancing: routers that spread tokens over their experts, each by a gradient of its own.

The loss of a layer is that of the Switch Transformer (arXiv:2101.03961, eq. 4 to 6) for several experts per token and
sigmoid scores, as DeepSeek-V3 (arXiv:2412.19437) and Megatron-LM's ``moe_aux_loss_coeff`` have it. It never meets the
loss of the tokens: a router adds its gradient where it is, so no stage of a pipeline has to send it to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHMoE

from lightning_vlm.models.language import Float32Router
from lightning_vlm.models.nemotron_vl import NemotronVL


@dataclass(frozen=True, slots=True)
class Balancing:
    """What routers are told of a micro-batch; not a tensor, and nothing that PyTorch would look into for tensors.

    Attributes:
        tokens: ``(B, T)`` bool, false for padding, which no expert is chosen for.
        scale: Float32 scalar, what the loss of each layer is multiplied by.
        losses: ``(num_layers,)`` float32; a router writes its loss, not scaled, at the place of its layer. One that
            runs once more to recompute writes the same.
    """

    tokens: Tensor
    scale: Tensor
    losses: Tensor


def load_balancing_loss(logits: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
    """``sum_i f_i P_i`` over experts; 1 when all are chosen alike.

    ``P_i`` is the mean over tokens of the sigmoid scores, divided by their sum over experts. ``f_i`` is ``E / (k T)``
    times the number of tokens that expert ``i`` computes, a constant to the gradient: those that the router's bias
    brings it are among them, since it is this load that is to be balanced.

    Args:
        logits: ``(N, E)`` of the router.
        chosen: ``(N, k)`` numbers of experts.
        tokens: ``(N,)`` bool: which count.

    Returns:
        Float32 scalar; 0 where no token counts.
    """
    kept = tokens.to(logits.dtype)
    count = kept.sum().clamp(min=1.0)
    scores = logits.sigmoid()
    probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    mean = (probabilities * kept[:, None]).sum(0) / count
    experts_per_token = chosen.shape[-1]
    load = logits.new_zeros(logits.shape[-1])
    load = load.scatter_add(0, chosen.flatten(), kept.repeat_interleave(experts_per_token))
    return (load * (logits.shape[-1] / (experts_per_token * count)) * mean).sum()


class BalancedRouter(Float32Router):
    """A router that balances its load; an instance of its base becomes one by its class, see `balance_load`."""

    layer_idx: int
    balancing: Balancing | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As its base; the weights carry the gradient of the load-balancing loss into the backward pass."""
        logits, weights, chosen = super().forward(hidden_states)
        told = self.balancing
        if told is not None and self.training and torch.is_grad_enabled():
            loss = load_balancing_loss(logits, chosen, told.tokens.flatten())
            told.losses[self.layer_idx] = loss.detach()
            weights = _AddGradient.apply(weights, loss, told.scale)
        return logits, weights, chosen


class BalancedBlock(NemotronHBlock):
    """A layer of experts that tells its router of the micro-batch.

    The argument is the layer's, because that is what is kept for a recomputation in the backward pass, before which
    other micro-batches of a pipeline may have been here.
    """

    def forward(self, hidden_states: Tensor, balancing: Balancing | None = None, **kwargs: Any) -> Tensor:
        """``(B, T, D)`` -> ``(B, T, D)``.

        Args:
            hidden_states: ``(B, T, D)``.
            balancing: Without it nothing is balanced.
            **kwargs: As of transformers' block.
        """
        router = self.mixer.gate
        router.balancing = balancing
        try:
            return super().forward(hidden_states, **kwargs)
        finally:
            router.balancing = None


class _AddGradient(torch.autograd.Function):
    """The weights as they are; in the backward pass the loss gets its scale as gradient, wherever it comes from."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale, None


def balance_load(model: NemotronVL) -> None:
    """Makes routers balance their load, in place, where the forward pass is given a ``balancing``.

    Args:
        model: Whole, on the meta device or not, frozen as wanted.

    Raises:
        ValueError: If no layer has experts, or no router is trained: the gradient would then only bend what is trained
            below it towards routers that cannot follow.
    """
    blocks = [block for block in model.language_model.model.layers if isinstance(block.mixer, NemotronHMoE)]
    if not blocks:
        raise ValueError("load_balancing is above 0, but no layer of the language model has experts; set it to 0")
    if not any(block.mixer.gate.weight.requires_grad for block in blocks):
        raise ValueError(
            "load_balancing is above 0, but freeze or lora leaves the routers as they are, so there is nothing to "
            "balance; set it to 0, or train the language model in full"
        )
    for block in blocks:
        block.__class__ = BalancedBlock  # as the router's: adds no weights; hooks and names stay
        block.mixer.gate.__class__ = BalancedRouter
        block.mixer.gate.layer_idx = block.layer_idx
