"""Which family a processor belongs to, by the name of its class: so that remote code need not be imported to be known.

Subclasses are of their parent's family. A processor that nothing is known of is of the family ``template``, said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lightning_vlm.processing.encoded import EncodedSample
from lightning_vlm.processing.kimi_k25 import encode_kimi_k25
from lightning_vlm.processing.nemotron_omni import encode_nemotron_omni
from lightning_vlm.processing.nemotron_parse import encode_nemotron_parse
from lightning_vlm.processing.phi4_mm import encode_phi4_mm
from lightning_vlm.processing.qwen_omni import encode_qwen_omni
from lightning_vlm.processing.rendered_encoder import encode_kimi_vl, encode_rendered
from lightning_vlm.processing.template_encoder import encode_gemma4_prefix, encode_with_template

_log = logging.getLogger(__name__)

ENCODERS: dict[str, Callable[..., EncodedSample]] = {
    "default": encode_with_template,
    "gemma4_prefix": encode_gemma4_prefix,
    "qwen2_5": encode_rendered,
    "llava_onevision": encode_rendered,
    "qwen3_omni": encode_qwen_omni,
    "kimi_vl": encode_kimi_vl,
    "kimi_k25_vl": encode_kimi_k25,
    "nemotron_parse": encode_nemotron_parse,
    "nemotron_omni": encode_nemotron_omni,
    "phi4_mm": encode_phi4_mm,
}
"""Encoder of each family: ``(example, processor, **options) -> sample``."""

FAMILIES: dict[str, str] = {
    "Qwen2_5_VLProcessor": "qwen2_5",
    "Qwen3OmniMoeProcessor": "qwen3_omni",
    "KimiVLProcessor": "kimi_vl",
    "KimiK25Processor": "kimi_k25_vl",
    "NemotronParseProcessor": "nemotron_parse",
    "NemotronH_Nano_Omni_Reasoning_V3Processor": "nemotron_omni",
    "NemotronH_Omni_Reasoning_V3Processor": "nemotron_omni",
    "NemotronVLProcessor": "nemotron_omni",
    "LlavaOneVisionProcessor": "llava_onevision",
    "Phi4MMProcessor": "phi4_mm",
    "Phi4MultimodalProcessor": "phi4_mm",
    # Their templates place the media: the default on purpose, hence no warning.
    "Qwen2VLProcessor": "default",
    "Qwen3VLProcessor": "default",
    "LlavaOnevisionProcessor": "default",
    "Gemma3Processor": "default",
    "Gemma4Processor": "default",
    "Kimi_K25Processor": "default",
}
"""Family of each class of processors."""

_unknown: set[str] = set()


def family_of(processor: Any) -> str:
    """The family of a processor, a key of `ENCODERS`.

    Args:
        processor: The processor.
    """
    for cls in type(processor).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    name = type(processor).__name__
    if name not in _unknown:
        _unknown.add(name)
        _log.warning("nothing is known of %s: its own chat template is asked to place text and media", name)
    return "default"
