"""AdapterCheck: after the first step, each LoRA adapter has got a gradient, or the run stops and names those without.

An adapter that nothing reaches trains nothing and says nothing: a fused kernel that reads a weight past its module is
enough. Of the two factors the second is asked, which is where an adapter begins: the first has a gradient of zero until
the second has moved. Every `NemotronVLModule` brings one; without adapters it has nothing to do.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_vlm.models.architecture import few
from lightning_vlm.models.lora import adapters_of, has_adapters
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies.ranks import from_stages, parameter_group
from lightning_vlm.training.movement import have_gradients
from lightning_vlm.training.reached import ReachedMedia

_PATIENCE = 3  # steps: the media of one may all stand after its labels, which gives them a gradient of zero


class AdapterError(RuntimeError):
    """An adapter is not trained."""


class AdapterCheck(L.Callback):
    """Watches optimizer steps until every adapter has got a gradient."""

    def __init__(self) -> None:
        self._adapters: dict[str, nn.Parameter] = {}  # by the name of the weight it is on
        self._patience: dict[str, int] = {}  # of those that wait
        self._step = self._seen = self._total = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lists the adapters."""
        network = getattr(pl_module, "network", None)
        self._adapters, self._step, self._seen = {}, trainer.global_step, 0
        if isinstance(network, NemotronVL) and has_adapters(network):
            self._adapters = {adapter.base: network.get_parameter(adapter.b) for adapter in adapters_of(network)}
        names = [name for stage in from_stages(trainer, list(self._adapters)) for name in stage]
        self._patience = dict.fromkeys(names, _PATIENCE)
        self._total = len(names)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the gradients of a step that is over.

        Raises:
            AdapterError: If one that was reached has none, on all ranks alike.
        """
        if not self._patience or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        reached = getattr(pl_module, "reached", None)
        unreached = reached.unreached if isinstance(reached, ReachedMedia) else frozenset()
        now = {name: factor for name, factor in self._adapters.items() if id(factor) not in unreached}
        flags = have_gradients(list(now.values()), pl_module.device, parameter_group(trainer))
        found = {name: flag for stage in from_stages(trainer, dict(zip(now, flags))) for name, flag in stage.items()}
        if not any(found.values()):
            return  # a step without a label
        for name in found.keys() & self._patience.keys():
            self._patience[name] -= 1
            if found[name]:
                del self._patience[name]
        total = self._total
        if idle := [name for name, left in self._patience.items() if left == 0]:
            raise AdapterError(
                f"{len(idle)} of {total} adapters got no gradient in {_PATIENCE} steps that reached them: {few(idle)}; "
                "leave their kind of layers out of lora, or look for a kernel that reads the weight past its module"
            )
        if (seen := total - len(self._patience)) != self._seen:
            self._seen = seen
            text = f"lora: {seen} of {total} adapters got a gradient by step {self._step}"
            rank_zero_info(text if self._patience else f"{text}: all are trained")
