"""A processor by the name of its folder: ours for Nemotron-VL models, transformers' own class for other families."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor
from transformers.image_processing_base import ImageProcessingMixin

from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.processing.registry import FAMILIES


def load_processor(name: str, options: dict[str, Any] | None = None) -> Any:
    """Loads a processor; no code but transformers' own and ours is run.

    Args:
        name: Folder or, if the hub may be reached, repository.
        options: In place of what was saved with it.

    Returns:
        A `NemotronVLProcessor`, unless the folder names the class of another family.

    Raises:
        OSError: If there is none.
        ValueError: If its class is neither ours nor one of transformers.
    """
    family = FAMILIES.get(_saved_class(name), "nemotron_omni")
    if family == "nemotron_omni":
        return NemotronVLProcessor.from_pretrained(name, **(options or {}))
    return AutoProcessor.from_pretrained(name, trust_remote_code=False, **(options or {}))


def _saved_class(name: str) -> str:
    """The class that the folder was saved from; empty where it does not say."""
    saved, _ = NemotronVLProcessor.get_processor_dict(name)
    if "processor_class" not in saved:
        saved, _ = ImageProcessingMixin.get_image_processor_dict(name)
    return saved.get("processor_class", "")
