"""torchao's AdamW with 8-bit states (arXiv:2110.02861), whose checkpoints are plain tensors.

A quarter of AdamW's memory in float32. torchao saves a tensor subclass that nobody can read without it; here a state is
its codes and scales. Importing this file needs torchao. It is compiled on a GPU, one kernel per shape; on a CPU it runs
as it is written, where compiling would take longer than most tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(TorchaoAdamW8bit):
    """torchao's optimizer; states of tensors below 4096 elements stay as they are.

    Args:
        groups: Parameters with their options.
        betas: As of AdamW.

    Raises:
        NotImplementedError: If parameters are shards.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, betas=betas)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if sharded := sum(isinstance(parameter, DTensor) for parameter in parameters):
            raise NotImplementedError(
                f"optimizer 'adamw8bit' has {sharded} of {len(parameters)} parameters as shards; expected whole ones, "
                "for the scales of its blocks do not shard with them: set optimizer to adamw, or use another strategy"
            )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Computes the loss and its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():  # outside of the stance: a compiled model stays compiled
                loss = closure()
        devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
        with torch.compiler.set_stance("force_eager" if devices == {"cpu"} else "default"):
            super().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state, each 8-bit tensor as a dict of its codes, its scales and whether it has a sign."""
        saved = super().state_dict()
        state = {key: {name: _plain(value) for name, value in values.items()} for key, values in saved["state"].items()}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state.

        Args:
            state_dict: From `state_dict`.
        """
        state = {
            key: {name: _restored(value) for name, value in values.items()}
            for key, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})


def _plain(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    return {"codes": value.codes, "scale": value.scale, "signed": value.signed}


def _restored(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    codes, scale = value["codes"], value["scale"]
    zeros = OptimState8bit.zeros(codes.shape, value["signed"], codes.numel() // scale.numel(), codes.device)
    return OptimState8bit(codes, scale, zeros.qmap, value["signed"])
