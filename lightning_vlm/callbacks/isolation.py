"""IsolationProbe: before a run with packed rows starts, two of its own samples prove that documents are kept apart.

Every `NemotronVLModule` brings one. It prints one line, or stops the run.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.training.isolation import IsolationError, measure_isolation


class IsolationProbe(L.Callback):
    """Measures isolation when a fit with packed rows starts; nothing else is probed."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probes.

        Raises:
            IsolationError: If documents see each other, or an implementation cannot run.
        """
        datamodule, network = trainer.datamodule, getattr(pl_module, "network", None)
        if (
            not isinstance(datamodule, VLMDataModule)
            or not isinstance(network, NemotronVL)
            or not datamodule.packs_rows
        ):
            return
        if datamodule.packing:  # lengths are known
            rank_zero_info(f"packing: {datamodule.summary().headline()}")
        samples = datamodule.probe_samples()
        if len(samples) < 2:
            rank_zero_info("packing isolation: not probed, there is a single sample")
            return
        with trainer.precision_plugin.forward_context():
            isolation = measure_isolation(network, samples, pl_module.device)
        if not isolation.holds:
            raise IsolationError(f"{isolation}; documents of a pack would be trained on each other")
        rank_zero_info(str(isolation))
