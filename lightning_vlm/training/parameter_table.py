"""The parameter table: for each group of parameters, its part, its size, and with what it is trained.

Taken from the optimizer that a run has made, not from its config: what stands there is what steps are taken with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_vlm.models.architecture import aligned
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import PARTS, parts_of
from lightning_vlm.training.freezing import never_trained

_LABELS = {"muon": "Muon", "adamw": "AdamW"}


@dataclass(frozen=True, slots=True)
class Row:
    """One group of the optimizer, or what is in none.

    Attributes:
        part: Of the model.
        group: Its name in the optimizer; ``<part>/frozen``, or ``<part>/left out`` for what is trainable all the same.
        parameters: Numbers in it.
        trainable: Those of them that need a gradient.
        lr: Peak learning rate, before warm-up and decay.
        weight_decay: Factor.
        optimizer: By which it is trained.
    """

    part: str
    group: str
    parameters: int
    trainable: int
    lr: float | None = None
    weight_decay: float | None = None
    optimizer: str | None = None


def parameter_table(
    model: NemotronVL, parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]
) -> list[Row]:
    """The rows, part by part.

    Args:
        model: The model.
        parameters: Its parameters by name, as the optimizers have them.
        optimizers: Those of the run.
    """
    parts = _parts(model, parameters)
    rows = []
    grouped: set[int] = set()
    for number, (optimizer, group) in enumerate(groups_of(optimizers)):
        own = group["params"]
        grouped |= set(map(id, own))
        rate = group.get("initial_lr", group["lr"])
        label = _LABELS.get(group.get("algorithm", ""), type(optimizer).__name__)
        part = next((parts[id(parameter)] for parameter in own if id(parameter) in parts), "")
        rows.append(Row(part, name_of(group, number), *_sizes(own), float(rate), float(group["weight_decay"]), label))
    for part in parts_of(model):
        rest = [
            parameter
            for name, parameter in parameters.items()
            if parts.get(id(parameter)) == part and id(parameter) not in grouped and not never_trained(name)
        ]
        for label, own in (
            ("left out", [parameter for parameter in rest if parameter.requires_grad]),
            ("frozen", [parameter for parameter in rest if not parameter.requires_grad]),
        ):
            if own:
                rows.append(Row(part, f"{part}/{label}", *_sizes(own)))
    return _in_order(rows)


def join_rows(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """One table of those of a pipeline's stages: what a group has on each is added up.

    Args:
        tables: One for each stage.
    """
    joined: dict[str, Row] = {}
    for row in (row for table in tables for row in table if row.parameters):
        if (there := joined.get(row.group)) is not None:
            parameters, trainable = there.parameters + row.parameters, there.trainable + row.trainable
            row = replace(there, parameters=parameters, trainable=trainable)
        joined[row.group] = row
    return _in_order(list(joined.values()))


def table_text(rows: Sequence[Row]) -> str:
    """The table for people.

    Args:
        rows: Of `parameter_table`.
    """

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    lines = [("part", "group", "parameters", "trainable", "lr", "weight decay", "optimizer")]
    for row in rows:
        numbers = (cell(row.parameters), cell(row.trainable), number(row.lr), number(row.weight_decay))
        lines.append((row.part, row.group, *numbers, cell(row.optimizer)))
    total, trainable = (sum(getattr(row, name) for row in rows) for name in ("parameters", "trainable"))
    lines.append(("total", "", cell(total), cell(trainable), "", "", ""))
    return aligned(lines, left=(0, 1, 6))


def table_values(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The table for loggers: plain values by the names of groups.

    Args:
        rows: Of `parameter_table`.
    """
    return {row.group: {name: value for name, value in asdict(row).items() if name != "group"} for row in rows}


def groups_of(optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, dict[str, Any]]]:
    """All groups, each with its optimizer.

    Args:
        optimizers: Those of the run.
    """
    return [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]


def name_of(group: Mapping[str, Any], number: int) -> str:
    """A group's name; another's optimizer may have none.

    Args:
        group: The group.
        number: Its place among all groups.
    """
    return str(group.get("name", f"group {number}"))


def _in_order(rows: list[Row]) -> list[Row]:
    order = list(PARTS)
    return sorted(rows, key=lambda row: order.index(row.part) if row.part else len(order))


def _sizes(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Numbers, and trainable numbers; whole parameters are counted, not the shards of a rank."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return sum(parameter.numel() for parameter in parameters), sum(parameter.numel() for parameter in trainable)


def _parts(model: NemotronVL, parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    modules = {id(module): part for part, module in parts_of(model).items()}
    attributes = {name: modules[id(child)] for name, child in model.named_children() if id(child) in modules}
    return {id(parameter): attributes.get(name.partition(".")[0], "") for name, parameter in parameters.items()}
