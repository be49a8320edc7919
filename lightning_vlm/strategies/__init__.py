"""Ways to spread a model and its data over ranks, as strategies of Lightning's Trainer; importing registers them."""

from lightning_vlm.strategies.fsdp2 import FSDP2Strategy
from lightning_vlm.strategies.pipeline import PipelineStrategy

__all__ = ["FSDP2Strategy", "PipelineStrategy"]
