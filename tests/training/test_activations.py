"""The estimate of activations beside what autograd really saves, and beside the peak of a real step, on the CPU."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_vlm import NemotronVLConfig, NemotronVLModule
from lightning_vlm.commands.describe import planned_network
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.training.activations import Activations, Load, activations

TOKENS, SIDE = 512, 16
EACH_KIND = {"Mamba2": "MMMM", "attention": "****", "MLP": "----", "MoE": "EEEE"}
KINDS_TOGETHER = "M*-EM*-E"
# Estimate over measurement, worst cases: 0.998 (nothing but scalars of the head is missing); 1.13 for attention in
# float32, whose keys and values a GPU repeats for all heads and a CPU does not; 1.05 for passes of the tower.
LOWEST, HIGHEST = 0.99, 1.15


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, those of known storages left out."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.sizes, self.now, self.peak = dict.fromkeys(known, 0), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return output

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def options(pattern: str, **more: Any) -> dict[str, Any]:
    config = NemotronVLConfig.tiny(hidden_size=256, vision_hidden_size=128, pattern=pattern)
    return {"config": config.to_dict(), **more}


def batch(config: NemotronVLConfig, num_images: int) -> dict[str, Any]:
    """Two packed documents, all labelled, and images in the first one."""
    generator = torch.Generator().manual_seed(0)
    ids: Any = torch.randint(5, 200, (1, TOKENS), generator=generator)
    per_image = SIDE**2 // config.merge_size**2
    for image in range(num_images):
        start = 8 + image * (per_image + 4)
        ids[0, start : start + per_image] = config.image_token_id
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids.clone(),
        "cu_seqlens": torch.tensor([0, 200, TOKENS], dtype=torch.int32),
    }
    if num_images:
        shape = (num_images * SIDE**2, config.vision_config.patch_dim)
        inputs["pixel_values"] = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
        inputs["image_grid_hw"] = torch.tensor([[SIDE, SIDE]] * num_images)
    return inputs


def step(network: NemotronVL, inputs: dict[str, Any]) -> Tensor:
    return network(**inputs, num_items_in_batch=1, skip_logits=True, use_cache=False).loss


def measured(network: NemotronVL, num_images: int) -> tuple[int, int, int]:
    """Bytes saved by a forward pass, at the peak of forward and backward, and of gradients."""
    inputs = batch(network.config, num_images)
    known: list[Any] = [*network.parameters(), *network.buffers(), *inputs.values()]
    own = {tensor.untyped_storage()._cdata for tensor in known}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            found[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(network, inputs)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    found.clear()
    with Live(own) as live:
        step(network, inputs).backward()
    return saved, live.peak, sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)


def compare(given: dict[str, Any], dtype: torch.dtype, num_images: int) -> tuple[float, float, Activations]:
    """Estimate over measurement: of what is saved, and of the peak."""
    network = NemotronVLModule(**given).network.to(dtype)
    saved, peak, gradients = measured(network, num_images)
    planned = planned_network(given, "bf16-true" if dtype == torch.bfloat16 else "32-true")
    estimate = activations(planned, Load(TOKENS, num_images * SIDE**2, SIDE**2))
    kept = sum(estimate.kept.values())
    return kept / saved, (kept + estimate.at_work + estimate.logits + gradients) / peak, estimate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", EACH_KIND)
def test_each_kind_of_layer(kind: str, recomputes: bool, dtype: torch.dtype) -> None:
    given = options(EACH_KIND[kind], gradient_checkpointing=recomputes)
    ratio, of_peak, estimate = compare(given, dtype, 0)
    assert list(estimate.kept) == [kind, "head"]
    # Measured: 1.000 (Mamba2, MLP, MoE), 1.13 and 1.10 (attention in float32 and bfloat16); 0.998 recomputed.
    assert LOWEST < ratio < HIGHEST
    assert of_peak > 1, "the sum bounds the peak: measured 1.12 (Mamba2, bfloat16, kept) to 2.9 (attention, recomputed)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": ["language"]},
        {"gradient_checkpointing": True, "vision_micro_batch": 1},
        {"freeze": ["vision"]},
        {"freeze": ["vision", "projector"], "gradient_checkpointing": True},
        {"freeze": ["language"]},
        {"freeze": ["language"], "gradient_checkpointing": ["language"]},
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4}, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_all_kinds_together_with_images(more: dict[str, Any], dtype: torch.dtype) -> None:
    ratio, of_peak, _ = compare(options(KINDS_TOGETHER, **more), dtype, 2)
    assert LOWEST < ratio < HIGHEST, "measured 0.999 to 1.05"
    assert 1 < of_peak < 1.6, "measured 1.09 (language frozen, bfloat16) to 1.51 (passes of the tower, float32)"


def test_it_grows_with_tokens_and_patches_alone() -> None:
    planned = planned_network(options(KINDS_TOGETHER), "32-true")
    once, twice = (activations(planned, Load(n * 1024, n * 1024, 256)).kept for n in (1, 2))
    for name in once:
        assert twice[name] == pytest.approx(2 * once[name], rel=0.02), "but for copies of weights"
    text = activations(planned, Load(1024, 0, 256)).kept
    assert not {"vision", "projector"} & set(text)


def test_stages_have_their_own() -> None:
    planned = planned_network(options("M*-E"), "32-true")
    inner = activations(planned, Load(512, 512, 256), first=False, last=False)
    assert set(inner.kept) == set(EACH_KIND)
    assert not inner.logits
    whole = activations(planned, Load(512, 512, 256))
    assert inner.kept == {name: whole.kept[name] for name in EACH_KIND}


def test_computing_in_bfloat16_keeps_less_than_the_shards_dtype() -> None:
    planned = planned_network(options(KINDS_TOGETHER), "32-true")
    halved = planned_network(options(KINDS_TOGETHER), "bf16-true")
    load = Load(512, 512, 256)
    assert activations(planned, load, torch.bfloat16).kept == activations(halved, load).kept
    assert {p.dtype for p in planned.parameters()} == {torch.float32}, "the network stays as it was"
    assert {p.device.type for p in planned.parameters()} == {"meta"}
