"""Counts the numbers that modules hold, each tensor once, without reading a value: the meta device will do.

Parameters are those that training can change. The layer scales of transformers' RADIO are not: they are 1, the released
files lack them, and a run freezes them. They are counted with the buffers, so that sums agree with the models' cards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.models.radio.modeling_radio import RadioLayerScale


@dataclass(frozen=True, slots=True)
class Count:
    """The numbers that a module holds.

    Attributes:
        parameters: Weights; tied ones once.
        trainable: Those of them that need a gradient.
        parameter_bytes: Memory of the weights, each in its own dtype.
        trainable_bytes: Memory of the trainable ones.
        fixed: Values that no training changes: buffers, and RADIO's layer scales.
        fixed_bytes: Their memory.
    """

    parameters: int = 0
    trainable: int = 0
    parameter_bytes: int = 0
    trainable_bytes: int = 0
    fixed: int = 0
    fixed_bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, name) + getattr(other, name) for name in Count.__slots__))

    @property
    def state(self) -> str:
        """``trainable``, ``frozen``, ``partly`` trainable, or ``-`` where there is nothing to train."""
        if not self.parameters:
            return "-"
        return "frozen" if not self.trainable else "trainable" if self.trainable == self.parameters else "partly"

    def to_dict(self) -> dict[str, Any]:
        """The numbers and the state, by name."""
        return {**{name: getattr(self, name) for name in Count.__slots__}, "state": self.state}


class Census:
    """Counts modules of one model one after another, each tensor where it is met first.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        scales = [module for module in model.modules() if isinstance(module, RadioLayerScale)]
        self._layer_scales = {id(parameter) for scale in scales for parameter in scale.parameters()}
        self._met: set[int] = set()
        self.dtypes: dict[str, int] = {}

    def count(self, module: nn.Module, recurse: bool = True) -> Count:
        """What a module holds that was not met before; ``dtypes`` grows by its parameters.

        Args:
            module: A module of the model.
            recurse: Whether to count what its children hold, too.
        """
        total = Count()
        for parameter in self._new(module.parameters(recurse)):
            number, size = parameter.numel(), parameter.numel() * parameter.element_size()
            if id(parameter) in self._layer_scales:
                total += Count(fixed=number, fixed_bytes=size)
                continue
            dtype = str(parameter.dtype).removeprefix("torch.")
            self.dtypes[dtype] = self.dtypes.get(dtype, 0) + number
            total += Count(number, number, size, size) if parameter.requires_grad else Count(number, 0, size)
        for buffer in self._new(module.buffers(recurse)):
            total += Count(fixed=buffer.numel(), fixed_bytes=buffer.numel() * buffer.element_size())
        return total

    def _new(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        for tensor in tensors:
            if id(tensor) not in self._met:
                self._met.add(id(tensor))
                yield tensor
