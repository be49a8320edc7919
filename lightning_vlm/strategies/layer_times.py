"""How long the pieces of a model take, measured on this device: for stages that are equally busy.

One layer of each kind is made with random weights and run forward and backward, then the tower with its projector, and
the head. So much is built at a time, never the model. How much of a batch is media and how much is learned is not known
here: half of the tokens is taken for each.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vlm.models.language import packed_inputs
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.ops.cross_entropy import linear_cross_entropy
from lightning_vlm.segments import documents_from_lengths

_REPEATS = 3
_SHARE = 0.5  # of a batch's tokens that stand for media, and that are learned


def measure_layers(model: NemotronVL, device: torch.device, tokens: int = 1024) -> tuple[list[float], float, float]:
    """Seconds that a micro-batch takes, forward and backward.

    Args:
        model: Whole, on the meta device or not.
        device: Where to measure.
        tokens: Of the micro-batch: one packed row of a single document.

    Returns:
        Of each layer of the language model; of the towers, the projector and the embedding; of the norm and the head.
    """
    body, dtype = model.language_model.model, model.dtype
    states = torch.randn(1, tokens, model.config.text_config.hidden_size, device=device, dtype=dtype)
    documents = documents_from_lengths([tokens], device)
    inputs = packed_inputs(model.config.text_config, documents, dtype)
    masks = inputs.pop("attention_mask")
    by_kind: dict[str, float] = {}
    for layer in body.layers:
        kind = layer.block_type
        if kind not in by_kind:
            run = partial(_made(layer, device), attention_mask=masks.get(kind), **inputs)
            by_kind[kind] = _seconds(run, states)
    merge = model.config.merge_size
    side = merge * max(1, round((tokens * _SHARE) ** 0.5))
    grids = [(side, side)]
    tower, projector = _made(model.vision_model, device), _made(model.multi_modal_projector, device)
    patches = torch.randn(side * side, model.config.vision_config.patch_dim, device=device, dtype=dtype)
    shuffled = torch.randn(
        side * side // merge**2, model.config.vision_hidden_size * merge**2, device=device, dtype=dtype
    )
    first = _seconds(lambda x: tower(x, grids).features, patches) + _seconds(projector, shuffled)
    head = _made(model.language_model.lm_head, device)
    labels = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    labels[:, int(tokens * _SHARE) :] = -100
    last = _seconds(lambda x: linear_cross_entropy(x, head, labels), states)
    return [by_kind[layer.block_type] for layer in body.layers], first, last


def _made(module: nn.Module, device: torch.device) -> Any:
    """A copy with small random weights, on a device."""
    made = copy.deepcopy(module).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    return made


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The quickest of some forward and backward passes."""
    found = []
    for _ in range(_REPEATS + 1):  # the first one makes kernels and buffers
        inputs = x.detach().requires_grad_()
        _wait(x.device)
        begun = time.perf_counter()
        run(inputs).float().sum().backward()
        _wait(x.device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
