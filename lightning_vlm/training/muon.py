"""Muon for hidden matrices and AdamW for everything else, as the one optimizer that Lightning's automatic loop takes.

PyTorch's two optimizers do the work; here they share one list of groups and one state, so that schedules, checkpoints
and gradient scaling see a single optimizer. Muon's updates are scaled to the size of AdamW's (Moonlight,
arXiv:2502.16982), so one learning rate and one weight decay serve both.

Muon orthogonalises the update of a matrix that maps hidden states to hidden states. AdamW keeps what is none: the
token embeddings, the head and the patch embedders (their rows are a vocabulary's or pixels'), the router (each row is
one expert's score), adapters (their product is the matrix, not a factor), convolutions, vectors. It also keeps the
experts of a mixture: they are one tensor of three dimensions, which ``torch.optim.Muon`` refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from lightning_vlm.models.nemotron_vl import NemotronVL


def hidden_matrices(model: NemotronVL) -> set[int]:
    """``id`` of the parameters that Muon takes.

    Args:
        model: The model.
    """
    tower = None if model.vision_model is None else model.vision_model.embeddings
    outer = (model.get_input_embeddings(), model.get_output_embeddings(), tower)  # a pipeline's stage may lack them
    spared = {id(parameter) for module in outer if module is not None for parameter in module.parameters()}
    linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name]
    return {id(module.weight) for module in linear} - spared


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` as one optimizer.

    Args:
        groups: With ``algorithm``: ``muon`` or ``adamw``.
        betas: Of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        self._inner: dict[str, Optimizer] = {}
        by_muon = [group for group in groups if group["algorithm"] == "muon"]
        if by_muon:
            self._inner["muon"] = Muon(by_muon, adjust_lr_fn="match_rms_adamw")
        if len(by_muon) < len(groups):
            self._inner["adamw"] = AdamW([group for group in groups if group["algorithm"] != "muon"], betas=betas)
        super().__init__(groups, {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: Computes the loss and its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._inner.values():
            optimizer.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # a loaded state brings new groups

    def _share(self) -> None:
        for algorithm, optimizer in self._inner.items():
            optimizer.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            optimizer.state = self.state
