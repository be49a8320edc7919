"""What autograd keeps of a layer for its backward pass, counted on the layer itself; nothing is computed or allocated.

A layer runs on PyTorch's fake tensors (shapes without values), and the tensors that it saves are added up, each storage
once. So the number follows the code: a frozen weight that saves no input, a norm in float32, a scan that keeps a state
for each chunk. What it costs: the count is of what runs on a CPU. Attention is counted as FlashAttention, with keys and
values repeated for all heads, as the GPU's varlen kernel takes them; Mamba2 as the PyTorch path (a GPU's kernels keep
less).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_vlm.models.whole_passes import without_recomputation
from lightning_vlm.segments import Documents

_FEW = 128  # tokens of the two counts that a line is drawn through: whole chunks of the scan

Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
"""Makes the arguments of a module for so many tokens."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that a module saves, as a line: a fixed part, and so much for each token.

    Attributes:
        fixed: Copies of weights in another precision, and the like.
        per_token: For each token, or row of features.
        passes_gradients: Whether its output needs a gradient; else nothing is kept at all.
    """

    fixed: int
    per_token: float
    passes_gradients: bool

    def of(self, tokens: int) -> int:
        """Bytes for so many tokens.

        Args:
            tokens: Of a pass.
        """
        return self.fixed + round(self.per_token * tokens) if tokens else 0


class SavedCounts:
    """Counts modules of one network; alike ones once.

    Args:
        dtype: That parameters are computed in, where it is not their own (FSDP2's ``param_dtype``).
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._known: dict[Any, Saved] = {}

    def count(self, module: nn.Module, inputs: Inputs, needs_gradient: bool, few: int = _FEW) -> Saved:
        """What a module saves, without recomputation.

        Args:
            module: On the meta device, frozen as in the run.
            inputs: Makes its arguments on the CPU, fake ones; the first floating-point one needs the gradient.
            needs_gradient: Whether gradients go on to what is before the module.
            few: Tokens of the smaller count; the other one has twice as many.
        """
        parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()]
        key = (type(module), getattr(module, "block_type", None), tuple(parameters), needs_gradient, module.training)
        if key not in self._known:
            (less, passes), (more, _) = (self._run(module, inputs, size, needs_gradient) for size in (few, 2 * few))
            self._known[key] = Saved(2 * less - more, (more - less) / few, passes)
        return self._known[key]

    def _run(self, module: nn.Module, inputs: Inputs, tokens: int, needs_gradient: bool) -> tuple[int, bool]:
        found: dict[Any, Tensor] = {}  # keeps the tensors, so that no storage is met twice under one number

        def pack(tensor: Tensor) -> Tensor:
            if (number := tensor.untyped_storage()._cdata) not in own:
                found[number] = tensor
            return tensor

        with FakeTensorMode(), torch.device("cpu"), without_recomputation(module), torch.enable_grad():
            values = {name: self._fake(parameter) for name, parameter in module.named_parameters()}
            values |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in module.named_buffers()}
            own = {value.untyped_storage()._cdata for value in values.values()}
            args, kwargs = inputs(tokens)
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.requires_grad_(needs_gradient)
                    break
            with saved_tensors_hooks(pack, lambda tensor: tensor), _AnyShape():
                output = functional_call(module, values, args, kwargs)
            output = output if isinstance(output, Tensor) else output[0]
            return sum(tensor.untyped_storage().nbytes() for tensor in found.values()), output.requires_grad

    def _fake(self, parameter: Tensor) -> Tensor:
        value = torch.empty(parameter.shape, dtype=self.dtype or parameter.dtype)
        return value.requires_grad_(parameter.requires_grad)


def document(tokens: int) -> Documents:
    """One document, of fake tensors.

    Args:
        tokens: Of it.
    """
    return Documents(torch.empty(2, dtype=torch.int32), torch.empty(tokens, dtype=torch.int32), (tokens,))


class _AnyShape(TorchFunctionMode):
    """Names kernels that take fake tensors, and save what the ones that run do.

    Which attention kernel runs follows from what fake tensors are not. The grouped product of a mixture refuses fake
    ones in float32: all rows through one expert save as much.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._grouped_mm:
            return args[0] @ args[1][0]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, False, scale=kwargs.get("scale"))[0]
