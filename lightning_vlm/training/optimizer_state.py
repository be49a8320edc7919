"""States of optimizers by the names of parameters, so that a checkpoint fits however its parameters are spread.

PyTorch numbers parameters in the order in which an optimizer has them. A rank of a pipeline has some of them, shards
have their own, so every checkpoint says which names its numbers are (`layout`), and what a checkpoint holds can be
given to any other optimizer over the same parameters (`adopt_state`). Learning rates and schedules follow by the names
of groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_OF_THE_MACHINE = ("fused", "foreach")
_STATES, _LAYOUT = "states_by_name", "layout"

Layout = list[dict[str, Any]]
"""Groups: ``name``, ``options`` (plain values) and ``parameters`` (names, in the optimizer's order)."""


def layout(optimizer: Optimizer, names: Mapping[int, str]) -> Layout:
    """What an optimizer's numbers mean.

    Args:
        optimizer: The optimizer.
        names: Of parameters, by their ``id``.
    """
    return [
        {
            "name": str(group.get("name", f"group {number}")),
            "options": {key: value for key, value in group.items() if key != "params"},
            "parameters": [names[id(parameter)] for parameter in group["params"] if id(parameter) in names],
        }
        for number, group in enumerate(optimizer.param_groups)
    ]


def join_layouts(layouts: Iterable[Layout]) -> Layout:
    """One of those of a pipeline's stages: a group has the parameters that it has on each.

    Args:
        layouts: One for each stage.
    """
    joined: dict[str, dict[str, Any]] = {}
    for group in (group for one in layouts for group in one if group["parameters"]):
        if group["name"] in joined:
            joined[group["name"]]["parameters"] += group["parameters"]
        else:
            joined[group["name"]] = {**group, "parameters": list(group["parameters"])}
    return list(joined.values())


def names_of(module: nn.Module) -> dict[int, str]:
    """Names of a module's parameters, by their ``id``.

    Args:
        module: The module.
    """
    return {id(parameter): name for name, parameter in module.named_parameters()}


def state_by_name(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps for each parameter.

    Args:
        optimizer: The optimizer.
        names: Of parameters, by their ``id``.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {names[id(p)]: dict(optimizer.state[p]) for p in parameters if id(p) in names and p in optimizer.state}


def renamed(saved: Mapping[str, Any], groups: Layout) -> dict[str, dict[str, Any]]:
    """What a saved state keeps for each parameter.

    Args:
        saved: ``state_dict()`` of an optimizer.
        groups: Its `layout`.
    """
    numbers = (number for group in saved["param_groups"] for number in group["params"])
    names = [name for group in groups for name in group["parameters"]]
    return {name: saved["state"][number] for name, number in zip(names, numbers) if number in saved["state"]}


def by_name(states: Mapping[str, Mapping[str, Any]], groups: Layout) -> dict[str, Any]:
    """A state that an optimizer with `take_names` loads as if it were its own ``state_dict()``.

    Args:
        states: By the names of parameters.
        groups: The saved `layout`.
    """
    return {"state": {}, "param_groups": [], _STATES: states, _LAYOUT: groups}


def take_names(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Lets an optimizer load what `by_name` makes, besides what it saves.

    Args:
        optimizer: The optimizer.
        names: Of its parameters, by their ``id``.
    """

    def translate(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        return _numbered(saved[_STATES], saved[_LAYOUT], optimizer, names) if _STATES in saved else None

    optimizer.register_load_state_dict_pre_hook(translate)


def _numbered(
    states: Mapping[str, Mapping[str, Any]], groups: Layout, optimizer: Optimizer, names: Mapping[int, str]
) -> dict[str, Any]:
    plain = optimizer.state_dict()
    numbers: dict[str, int] = {}
    _adopt(plain["param_groups"], groups)
    for group, live in zip(plain["param_groups"], optimizer.param_groups):
        numbers |= {names[id(parameter)]: number for parameter, number in zip(live["params"], group["params"])}
    state = {number: dict(states[name]) for name, number in numbers.items() if name in states}
    return {"state": state, "param_groups": plain["param_groups"]}


def adopt_options(optimizer: Optimizer, groups: Layout) -> None:
    """Gives groups the options (learning rates) that those of their names have in a checkpoint, in place.

    Args:
        optimizer: The optimizer.
        groups: The saved `layout`.
    """
    _adopt(optimizer.param_groups, groups)


def _adopt(own: Iterable[dict[str, Any]], groups: Layout) -> None:
    options = {group["name"]: group["options"] for group in groups}
    for group in own:
        kept: dict[str, Any] = {key: group[key] for key in _OF_THE_MACHINE if key in group}
        group.update({**options.get(str(group.get("name")), {}), **kept})


def flat(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Tensors of a state by ``<parameter>.<key>``, as a distributed checkpoint keeps them.

    Args:
        states: By the names of parameters.

    Raises:
        NotImplementedError: If there is anything but tensors.
    """
    found = {}
    for name, values in states.items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise NotImplementedError(
                    f"the optimizer's {key} of {name} is a {type(value).__name__}, and checkpoints of divided models "
                    "hold tensors only; set optimizer to adamw or muon"
                )
            found[f"{name}.{key}"] = value
    return found
