"""StopSignals: what asks a run to stop is answered between two batches, by all ranks after the same one.

Lightning answers a SIGTERM inside of the signal's handler: with several ranks it starts a collective there, and where
SLURM asks to requeue it saves there. A signal reaches each rank at another moment, in the middle of a step and of its
collectives. Here the handler takes note, ranks compare notes after each batch, and if any of them was asked to stop all
of them do. With several ranks Ctrl-C is a signal of that kind too; pressed twice, it stops at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed as dist

from lightning_vlm.datamodule import VLMDataModule


class StoppedTogether(KeyboardInterrupt):
    """Ctrl-C, raised by all ranks after the same batch."""


class StopSignals(L.Callback):
    """Stops runs as they are asked to, where their state is whole.

    Every `NemotronVLModule` brings one. What it leads to is Lightning's: after the batch a ``SIGTERMException`` or a
    ``KeyboardInterrupt`` is raised, at which `RunCheckpoint` saves; before SLURM requeues a run it is saved in
    ``default_root_dir``.
    """

    def __init__(self) -> None:
        self._noted: set[int] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets signals of an earlier run."""
        self._noted.clear()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens instead of Lightning."""
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens instead of Lightning."""
        self._listen(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Answers."""
        self._answer(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Answers, in the validation of a fit whose ranks have equal numbers of batches: those of a `VLMDataModule`."""
        equal = trainer.world_size == 1 or isinstance(trainer.datamodule, VLMDataModule)
        if equal and trainer.state.fn == TrainerFn.FITTING:
            self._answer(trainer)

    def _listen(self, trainer: L.Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python has signals answered by the main thread alone
        earlier = trainer._signal_connector._original_handlers  # the Trainer puts them back in the end

        def note(number: int, frame: FrameType | None) -> None:
            self._noted.add(number)
            if callable(handler := earlier.get(number)):  # of whoever runs the Trainer, as Lightning does
                handler(number, frame)

        def interrupt(number: int, frame: FrameType | None) -> None:
            if number in self._noted:
                signal.default_int_handler(number, frame)
            self._noted.add(number)
            rank_zero_info("stopping after this batch, all ranks together; Ctrl-C once more stops at once")

        for number in _signals(trainer):
            signal.signal(number, interrupt if number == signal.SIGINT else note)

    def _answer(self, trainer: L.Trainer) -> None:
        connector = trainer._signal_connector
        signals = _signals(trainer)
        noted = torch.tensor([number in self._noted for number in signals], dtype=torch.int32)
        if trainer.world_size > 1:
            noted = noted.to(trainer.strategy.root_device)
            dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        self._noted.clear()
        for number, asked in zip(signals, noted.tolist()):
            if not asked:
                continue
            if number == signal.SIGINT:
                raise StoppedTogether
            if number == signal.SIGTERM:
                connector.received_sigterm = True  # Lightning looks at it after the batch
            else:
                connector._slurm_sigusr_handler_fn(number, None)


def _signals(trainer: L.Trainer) -> list[signal.Signals]:
    environment = trainer._accelerator_connector.cluster_environment
    signals = [signal.SIGTERM, signal.SIGINT] if trainer.world_size > 1 else [signal.SIGTERM]
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        signals.insert(0, environment.requeue_signal or signal.SIGUSR1)
    return signals
