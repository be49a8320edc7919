"""WeightEMA: an exponential moving average of the weights that are trained; what is frozen is not copied.

Lightning's WeightAveraging does the work: the average is validated, saved as the checkpoint's model (so an export is of
the average), and stands in the module after the fit. A resumed run continues with both.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_vlm.schema import StoppingError


class WeightEMA(WeightAveraging):
    """Averages after each optimizer step.

    Args:
        decay: Share of the average that stays; 0.999 remembers about a thousand steps.

    Raises:
        ValueError: If ``decay`` is no share.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay:g}; expected a number above 0 and below 1, e.g. 0.999")
        # Not get_ema_avg_fn: decay * w + (1 - decay) * w is not w, and weights that stay the same would drift.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._is_swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copies the weights that are trained; the others are shared.

        Raises:
            StoppingError: If the strategy shards the model, or the weights are in half precision.
        """
        if stage != "fit":
            return
        if getattr(trainer.strategy, "restore_checkpoint_after_setup", False):
            raise StoppingError(
                "trainer.callbacks",
                f"WeightEMA does not work with {type(trainer.strategy).__name__}, which shards the model",
                "leave it out, or train with ddp or on a single device",
            )
        if trainer.precision in ("bf16-true", "16-true"):
            raise StoppingError(
                "trainer.callbacks",
                f"WeightEMA does not work with trainer.precision {trainer.precision}, which would round its steps away",
                "set bf16-mixed, or leave it out",
            )
        pl_module.configure_model()
        frozen: list[Any] = [parameter for parameter in pl_module.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            parameter.__deepcopy__ = lambda memo, parameter=parameter: parameter
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*doesn't support sharding model layers.*")
                super().setup(trainer, pl_module, stage)
        finally:
            for parameter in frozen:
                del parameter.__deepcopy__

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the validation that was interrupted: a checkpoint of it would take the one for the other."""
        if self._is_swapped:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._is_swapped = not self._is_swapped

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits: the run's last checkpoint is to hold both, the average and what a longer run continues with."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the average in the module."""
        super().on_train_end(trainer, pl_module)
