"""A processor by the name of its folder: ours for Nemotron-VL models, transformers' own class for other families."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor
from transformers.image_processing_base import ImageProcessingMixin

from lightning_vlm.processing.calls import IMAGE_OPTIONS
from lightning_vlm.processing.media_layout import checked_settings
from lightning_vlm.processing.processor import OWN_OPTIONS, NemotronVLProcessor
from lightning_vlm.processing.registry import FAMILIES


def load_processor(name: str, options: dict[str, Any] | None = None) -> Any:
    """Loads a processor; no code but transformers' own and ours is run.

    Args:
        name: Folder or, if the hub may be reached, repository.
        options: In place of what was saved with it; ``{"video.fps": 1.0}`` means ``{"video": {"fps": 1.0}}``.

    Returns:
        A `NemotronVLProcessor`, unless the folder names the class of another family.

    Raises:
        OSError: If there is none.
        TypeError: If ours knows no such option, or one of videos or sounds is of another type.
        ValueError: If its class is neither ours nor one of transformers.
    """
    options = _nested(options or {})
    family = FAMILIES.get(_saved_class(name), "nemotron_omni")
    if family == "nemotron_omni":
        known = {*OWN_OPTIONS, *IMAGE_OPTIONS}
        if unknown := sorted(set(options) - known):  # from_pretrained would take it for one of a download
            raise TypeError(f"the processor has no option {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
        try:  # before they are mixed with what was saved: what is wrong is then known to be the caller's
            checked_settings("video", options.get("video"))
            checked_settings("sound", options.get("sound"))
        except ValueError as error:
            raise TypeError(str(error)) from error
        return NemotronVLProcessor.from_pretrained(name, **options)
    return AutoProcessor.from_pretrained(name, trust_remote_code=False, **options)


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """Dotted names, as the command line gives them, as dicts in dicts."""
    nested: dict[str, Any] = {}
    for name, value in options.items():
        first, _, rest = name.partition(".")
        if rest:
            value = {**nested.get(first, {}), **_nested({rest: value})}
        nested[first] = {**nested.get(first, {}), **value} if isinstance(value, dict) else value
    return nested


def _saved_class(name: str) -> str:
    """The class that the folder was saved from; empty where it does not say."""
    saved, _ = NemotronVLProcessor.get_processor_dict(name)
    if "processor_class" not in saved:
        saved, _ = ImageProcessingMixin.get_image_processor_dict(name)
    return saved.get("processor_class", "")
