"""TrainableCheck: says what a run trains and with what, and after the first step whether that, and only that, moved.

Every `NemotronVLModule` brings one. The table of parameters is printed and goes to the loggers when training starts.
The check stops the run where it contradicts the config: a frozen parameter that moved, or a group of trainable ones
that gets no gradient although its media were there. It waits for the first step whose learning rate is above 0, and for
each part until a medium has reached it. It reads every weight twice, and then no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_vlm.models.architecture import few
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies.ranks import from_stages, parameter_group
from lightning_vlm.training.movement import Effect, effects_of_step, fingerprints, parameters_at_rest
from lightning_vlm.training.parameter_table import (
    groups_of,
    join_rows,
    name_of,
    parameter_table,
    table_text,
    table_values,
)
from lightning_vlm.training.reached import ReachedMedia

_PATIENCE = 3  # steps: the media of one may all stand after its labels, which gives them a gradient of zero


class TrainableError(RuntimeError):
    """What moved is not what the config says."""


@dataclass(slots=True)
class _Watched:
    """A parameter, its group (none if it is frozen), and its fingerprint before the first step."""

    name: str
    parameter: nn.Parameter
    group: str | None
    before: Tensor


class TrainableCheck(L.Callback):
    """Prints and logs the table of parameters, then watches steps until everything has been seen to move or to rest."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._watched: list[_Watched] = []
        self._watching = False  # here, or on another stage of a pipeline
        self._rates: dict[str, float] = {}
        self._scale: float | None = None
        self._undriven: dict[str, int] = {}  # group -> steps that reached it and gave it no gradient
        self._any_driven = False
        self._waiting: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the table, and remembers the weights. A checkpoint has been restored by now."""
        self._forget()
        network = getattr(pl_module, "network", None)
        if not isinstance(network, NemotronVL):
            return
        parameters = parameters_at_rest(network)
        tables = from_stages(trainer, parameter_table(network, parameters, trainer.optimizers))
        rows = tables[0] if len(tables) == 1 else join_rows(tables)
        rank_zero_info(table_text(rows))
        for logger in trainer.loggers:
            logger.log_hyperparams({"parameters": table_values(rows)})
        groups = {
            id(parameter): name_of(group, number)
            for number, (_, group) in enumerate(groups_of(trainer.optimizers))
            for parameter in group["params"]
        }
        # What is trainable and in no group is for the table to say: somebody's own optimizer may leave it out.
        watched = {name: p for name, p in parameters.items() if id(p) in groups or not p.requires_grad}
        before = fingerprints(list(watched.values()), pl_module.device)
        self._watched = [
            _Watched(name, parameter, groups[id(parameter)] if parameter.requires_grad else None, number)
            for (name, parameter), number in zip(watched.items(), before)
        ]
        self._watching = any(from_stages(trainer, bool(self._watched)))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Notes the learning rates of the step: the schedule has moved on when it can be looked at."""
        if self._watching:
            all_groups = groups_of(trainer.optimizers)
            self._rates = {name_of(group, number): float(group["lr"]) for number, (_, group) in enumerate(all_groups)}
            self._scale = _loss_scale(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compares after a step.

        Raises:
            TrainableError: If what moved contradicts the config, on all ranks alike.
        """
        rates, self._rates = self._rates, {}
        if not any(rates.values()):
            return  # no step, or one that was not to move anything
        if self._scale is not None and (_loss_scale(trainer) or 0.0) < self._scale:
            return  # gradients have overflowed, and the step was left out
        reached = getattr(pl_module, "reached", None)
        unreached = reached.unreached if isinstance(reached, ReachedMedia) else frozenset()
        self._compare(trainer, rates, unreached)

    def _compare(self, trainer: L.Trainer, rates: dict[str, float], unreached: frozenset[int]) -> None:
        # Parameters that no medium has reached yet have not moved since: one look at the weights before is enough.
        now = [
            one
            for one in self._watched
            if one.group is None or (rates.get(one.group) and id(one.parameter) not in unreached)
        ]
        before = torch.stack([one.before for one in now]) if now else torch.zeros(0)
        effects = effects_of_step([one.parameter for one in now], before, parameter_group(trainer))
        peaks = {
            name_of(group, number): float(group.get("initial_lr", group["lr"]))
            for number, (_, group) in enumerate(groups_of(trainer.optimizers))
        }
        own = [_Seen(one.name, one.group, str(one.parameter.dtype), effect) for one, effect in zip(now, effects)]
        seen: list[_Seen] = []
        for theirs, their_rates, their_peaks in from_stages(trainer, (own, rates, peaks)):
            seen, rates, peaks = [*seen, *theirs], rates | their_rates, peaks | their_peaks
        if seen:
            self._judge(trainer.global_step, seen, rates, peaks)
        self._watching = any(from_stages(trainer, bool(self._watched)))

    def _judge(self, step: int, seen: Sequence[_Seen], rates: dict[str, float], peaks: dict[str, float]) -> None:
        if wrong := [one.name for one in seen if one.group is None and one.effect.moved]:
            raise TrainableError(
                f"step {step} moved {few(wrong)}, which {'is' if len(wrong) == 1 else 'are'} frozen; expected "
                "frozen parameters to stay as they were: look for a callback or an optimizer that writes to them, or "
                "take their part out of freeze"
            )
        tallies: dict[str, _Tally] = {}
        for one in seen:
            if one.group is not None:
                tallies.setdefault(one.group, _Tally()).add(one)
        self._any_driven |= any(tally.driven for tally in tallies.values())
        if not self._any_driven:
            return  # a step without a label, or a strategy that keeps gradients elsewhere
        self._refuse_undriven(step, tallies)
        done = []
        for name, tally in tallies.items():
            if tally.moved and tally.driven:
                done.append(name)
            elif tally.driven and rates[name] >= peaks[name] * (1 - 1e-6):  # it will not get larger
                done.append(name)
                rank_zero_warn(
                    f"group {name!r} did not move in step {step}: its learning rate, {rates[name]:.4g}, is too small "
                    f"for {tally.dtypes}, and its updates are rounded away; set a larger one, or keep the weights in "
                    "float32 (trainer.precision: bf16-mixed)"
                )
        self._report(step, tallies, done, sum(one.group is None for one in seen))
        self._watched = [one for one in self._watched if one.group is not None and one.group not in done]

    def _refuse_undriven(self, step: int, tallies: dict[str, _Tally]) -> None:
        wrong = []
        for name, tally in tallies.items():
            if not tally.driven:
                self._undriven[name] = self._undriven.get(name, 0) + 1
                if not tally.in_graph or self._undriven[name] >= _PATIENCE:
                    wrong.append(name)
        if wrong:
            names = [name for group in wrong for name in tallies[group].names]
            raise TrainableError(
                f"{few([repr(name) for name in wrong])} got no gradient by step {step}, in none of its tensors "
                f"({few(names)}), although the step reached it; expected every trainable group to move: look for "
                "what detaches it from the loss, or freeze it"
            )

    def _report(self, step: int, tallies: dict[str, _Tally], done: Sequence[str], resting: int) -> None:
        waiting = sorted({one.group for one in self._watched if one.group is not None} - set(done))
        if not done and waiting == self._waiting:
            return
        self._waiting = waiting
        counts: dict[str, list[int]] = {}
        for name in done:
            count = counts.setdefault(name.partition("/")[0], [0, 0])
            count[0] += tallies[name].moved
            count[1] += len(tallies[name].names)
        parts = [f"{moved} of {number} tensors of {part}" for part, (moved, number) in counts.items()]
        text = f"step {step} moved {', '.join(parts) or 'nothing that it had not moved before'}"
        text += f"; all {resting} frozen ones stayed" if resting else ""
        text += f"; not reached yet or not seen to move: {', '.join(waiting)}" if waiting else ""
        still = [name for group in done for name in tallies[group].undriven]
        text += f"; without a gradient: {few(still)}" if still else ""
        rank_zero_info(text)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is told of a watched parameter."""

    name: str
    group: str | None
    dtype: str
    effect: Effect


class _Tally:
    """What a step did to a group."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.undriven: list[str] = []
        self.moved = self.driven = 0
        self.in_graph = False
        self._dtypes: set[str] = set()

    @property
    def dtypes(self) -> str:
        return " and ".join(sorted(self._dtypes))

    def add(self, one: _Seen) -> None:
        effect = one.effect
        self.names.append(one.name)
        self.moved += effect.moved
        self.driven += effect.driven
        self.in_graph |= effect.in_graph
        self._dtypes.add(one.dtype.removeprefix("torch."))
        if not effect.driven and ".lora_A." not in one.name:  # theirs is zero until lora_B has moved
            self.undriven.append(one.name)


def _loss_scale(trainer: L.Trainer) -> float | None:
    """Of float16 training: a step whose gradients overflow is left out, and the scale lowered."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
