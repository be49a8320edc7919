"""From the options of a run to its network: planned, adapted, frozen, divided over ranks, and only then filled.

Whatever is wrong with the options is told before a byte of the weights is read, and each rank reads what it holds. A
model of random weights is made whole on every rank, and divided as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_vlm.checkpoint.hf_import import ImportPlan
from lightning_vlm.checkpoint.opening import local_folder, make_config, open_random, plan_pretrained
from lightning_vlm.checkpoint.source import pretrained_source
from lightning_vlm.models.load_balancing import balance_load
from lightning_vlm.models.lora import Coverage, Lora, add_adapters, fresh_adapters
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.strategies.parallelize import Parallelizes
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.optim import check_no_decay, check_rates
from lightning_vlm.training.recomputation import recompute_activations


def build_network(options: Mapping[str, Any], strategy: Any = None) -> tuple[NemotronVL, Coverage | None]:
    """Makes a network in training mode and PyTorch's default dtype.

    Args:
        options: Of `NemotronVLModule`.
        strategy: Of the Trainer, where there is one.

    Returns:
        The network, or what this rank has of it; and what adapters cover.

    Raises:
        DataError: If there is no such model, or its weights do not fit.
        NotImplementedError: If the optimizer does not work with the strategy.
        ValueError: If nothing would be left to train, or to balance, or a trainable part has no learning rate.
    """
    if isinstance(strategy, Parallelizes) and options["optimizer"] == "adamw8bit":
        raise NotImplementedError(
            f"optimizer 'adamw8bit' does not work with {type(strategy).__name__}: its 8-bit states do not divide, nor "
            "do checkpoints of shards hold them; set optimizer to adamw, or use another strategy"
        )
    model, weights = _plan(options)
    model.train()
    recompute_activations(model, options["gradient_checkpointing"])
    model.vision_model.micro_batch = options["vision_micro_batch"]
    coverage = None
    if options["lora"] is not None:
        coverage = add_adapters(model, Lora(**options["lora"]))
        rank_zero_info(str(coverage))
        for warning in coverage.warnings():
            rank_zero_warn(warning)
        if weights is not None:
            weights.values.update(fresh_adapters(model))
    freeze(model, options["freeze"] or [])
    if options["load_balancing"]:
        balance_load(model)
    check_rates(model, options["lr"])
    check_no_decay(model, options["no_decay"] or [])
    device = torch.get_default_device()
    if isinstance(strategy, Parallelizes):
        model, device = strategy.parallelize(model), strategy.root_device
    if weights is not None:
        rank_zero_info(str(weights.fill(model, device)))
    return model, coverage


def _plan(options: Mapping[str, Any]) -> tuple[NemotronVL, ImportPlan | None]:
    if options["config"] is not None:
        return NemotronVL(make_config("model.config", options["config"])), None
    folder = local_folder(pretrained_source(options["model_id"], "model.model_id"))
    if options["init"] == "random":
        return open_random(folder), None
    return plan_pretrained(folder, options["from_scratch"] or [])
