"""NeMo AutoModel's collate functions, same names and signatures: each is [encode every example] + pad, nothing more.

What differs between processors is in `processing`, one encoder per family; what a batch is, in `padding` and
`packed_batches`. Labels are shifted, as NeMo's are: a model that shifts by itself (ours, and transformers' own loss)
must not be given them. Examples are never written to. Every name of NeMo's module can be imported from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from operator import or_
from typing import Any

from lightning_vlm.automodel.fake_image import mask_fake_vision_tokens_single
from lightning_vlm.automodel.overlong import (
    _drop_overlong_samples,
    _estimate_media_tokens,
    _extract_image_config,
    report_dropped,
)
from lightning_vlm.automodel.packed_batches import neat_packed_vlm_collater, packed_sequence_thd_vlm_collater
from lightning_vlm.automodel.padding import _truncate_token_axis, pad_samples, sample_row
from lightning_vlm.automodel.robust_collate import RobustCollate, make_robust_collate
from lightning_vlm.processing.answer_search import _extract_assistant_text, build_labels
from lightning_vlm.processing.conversation_media import (
    _count_media_per_sample,
    _ensure_rgb,
    _extract_media_from_conversations,
)
from lightning_vlm.processing.encoded import COUNT_KEYS, SEQUENCE_KEYS, EncodedSample, as_media, cut_sample
from lightning_vlm.processing.kimi_k25 import _DEFAULT_MERGE_KERNEL, _expand_image_tokens, encode_kimi_k25
from lightning_vlm.processing.nemotron_omni import encode_nemotron_omni
from lightning_vlm.processing.nemotron_parse import TASK_PROMPT, encode_nemotron_parse, require_decoder_tokens
from lightning_vlm.processing.phi4_mm import encode_phi4_mm
from lightning_vlm.processing.qwen_omni import encode_qwen_omni
from lightning_vlm.processing.rendered_encoder import encode_kimi_vl, encode_rendered
from lightning_vlm.processing.template_encoder import encode_gemma4_prefix, encode_with_template
from lightning_vlm.processing.thinking_prefix import (
    _GEMMA4_MODEL_TURN,
    _GEMMA4_THINKING_PREFIX,
    _inject_thinking_prefix_tokens,
    gemma4_inject_thinking_prefix,
)
from lightning_vlm.processing.token_search import _decode_single_token, _find_pattern_indices
from lightning_vlm.processing.turn_labels import (
    _IMSTART_TEMPLATE_PROCESSORS,
    _build_labels_from_markers,
    _derive_turn_markers,
    _get_assistant_marker,
    _get_stop_token_id,
    build_labels_from_template,
)

__all__ = [
    "COLLATE_FNS",
    "HAVE_QWEN_OMNI_UTILS",
    "HAVE_QWEN_VL_UTILS",
    "_DEFAULT_MERGE_KERNEL",
    "_GEMMA4_MODEL_TURN",
    "_GEMMA4_THINKING_PREFIX",
    "_IMSTART_TEMPLATE_PROCESSORS",
    "RobustCollate",
    "_build_labels_from_markers",
    "_count_media_per_sample",
    "_decode_single_token",
    "_derive_turn_markers",
    "_drop_overlong_samples",
    "_ensure_rgb",
    "_estimate_media_tokens",
    "_expand_image_tokens",
    "_extract_assistant_text",
    "_extract_image_config",
    "_extract_media_from_conversations",
    "_find_pattern_indices",
    "_get_assistant_marker",
    "_get_stop_token_id",
    "_inject_thinking_prefix_tokens",
    "_truncate_token_axis",
    "build_labels",
    "build_labels_from_template",
    "default_collate_fn",
    "gemma4_inject_thinking_prefix",
    "gemma4_prefix_collate_fn",
    "kimi_k25_vl_collate_fn",
    "kimi_vl_collate_fn",
    "llava_onevision_collate_fn",
    "make_robust_collate",
    "neat_packed_vlm_collater",
    "nemotron_omni_collate_fn",
    "nemotron_parse_collate_fn",
    "packed_sequence_thd_vlm_collater",
    "pad_collate_fn",
    "phi4_mm_collate_fn",
    "qwen2_5_collate_fn",
    "qwen3_omni_collate_fn",
]

logger = logging.getLogger(__name__)

HAVE_QWEN_VL_UTILS = find_spec("qwen_vl_utils") is not None
HAVE_QWEN_OMNI_UTILS = find_spec("qwen_omni_utils") is not None
"""Whether these packages are there; NeMo AutoModel needs them, nothing here does."""

Batch = dict[str, Any]
Examples = Sequence[Mapping[str, Any]]


def _encode_all(examples: Examples, processor: Any, encode: Callable[..., EncodedSample], **options: Any) -> list[Any]:
    """Every example encoded, fake images hidden from attention."""
    samples = []
    for example in examples:
        sample = encode(example, processor, **options)
        samples.append(mask_fake_vision_tokens_single(sample, processor) if example.get("_injected_fake") else sample)
    return samples


def _without_overlong(samples: list[EncodedSample], max_length: int | None) -> list[EncodedSample]:
    if max_length is None:
        return samples
    kept = [sample for sample in samples if len(sample["input_ids"]) <= max_length]
    report_dropped(len(samples) - len(kept), len(samples), max_length)
    return kept


def default_collate_fn(
    examples: Examples,
    processor: Any,
    max_length: int | None = None,
    drop_overlong: bool = False,
    _post_tokenize_hook: Callable[[Any, Any], Any] | None = None,
) -> Batch:
    """For every processor whose own chat template places text and media.

    ``drop_overlong`` goes by exact lengths, where NeMo AutoModel estimates them; cutting through media is an error.

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
        max_length: Width before the shift: longer samples are cut or dropped, shorter ones padded to it.
        drop_overlong: Leave longer samples out, with a warning.
        _post_tokenize_hook: ``(batch of one sample, processor) -> batch``, called before labels are made.

    Returns:
        See `pad_samples`; floating pixels in bfloat16, and ``num_patches`` ``(B,)``, image tokens of each row, where
        pixels are those of tiles (5 axes).

    Raises:
        ValueError: If media would be cut, or all samples are dropped.
    """
    limit = None if drop_overlong else max_length
    samples = _encode_all(examples, processor, encode_with_template, max_length=limit, hook=_post_tokenize_hook)
    kept = _without_overlong(samples, max_length) if drop_overlong else samples
    return _finish_default(kept, processor, max_length)


def _finish_default(samples: list[EncodedSample], processor: Any, max_length: int | None) -> Batch:
    batch = pad_samples(samples, processor, max_length=max_length, bfloat16=True)
    token, pixels = getattr(processor, "image_token_id", None), batch.get("pixel_values")
    if token is not None and getattr(pixels, "ndim", 0) == 5:
        batch["num_patches"] = (batch["input_ids"] == token).sum(1)
    return batch


def gemma4_prefix_collate_fn(examples: Examples, processor: Any, max_length: int | None = None) -> Batch:
    """`default_collate_fn` with Gemma 4's empty thinking channel, which is not trained on (in NeMo AutoModel it is).

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
        max_length: As there, counted with the channel.

    Raises:
        ValueError: If media would be cut.
    """
    samples = _encode_all(examples, processor, encode_gemma4_prefix, max_length=max_length)
    return _finish_default(samples, processor, max_length)


def qwen2_5_collate_fn(examples: Examples, processor: Any) -> Batch:
    """For Qwen2.5-VL: text is rendered, media go beside it; pixels keep their type.

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
    """
    return pad_samples(_encode_all(examples, processor, encode_rendered), processor)


def llava_onevision_collate_fn(examples: Examples, processor: Any) -> Batch:
    """For LLaVA-OneVision-1.5, whose processor is called like Qwen2.5-VL's.

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
    """
    return pad_samples(_encode_all(examples, processor, encode_rendered), processor)


def qwen3_omni_collate_fn(examples: Examples, processor: Any, use_audio_in_video: bool = False) -> Batch:
    """For Qwen3-Omni. Rows are padded on the right; ``qwen_omni_utils`` is not needed.

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
        use_audio_in_video: Interleave each video with its sound, the ``audio`` of its own part.

    Raises:
        ValueError: If a video has no sound although it is to be used.
    """
    samples = _encode_all(examples, processor, encode_qwen_omni, use_audio_in_video=use_audio_in_video)
    return pad_samples(samples, processor)


def kimi_vl_collate_fn(examples: Examples, processor: Any, max_length: int | None = None) -> Batch:
    """For Kimi-VL.

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
        max_length: Width before the shift; longer samples are left out, with a warning.

    Raises:
        ValueError: If all samples are left out, or one has videos or sounds.
    """
    samples = _without_overlong(_encode_all(examples, processor, encode_kimi_vl), max_length)
    return pad_samples(samples, processor, max_length=max_length)


def kimi_k25_vl_collate_fn(
    examples: Examples, processor: Any, max_length: int | None = None, drop_overlong: bool = False
) -> Batch:
    """For Kimi-K2.5: placeholders are expanded before the model is called.

    NeMo AutoModel drops all images of a sample that is cut through one (defect 2A.12); here that is an error.

    Args:
        examples: Dicts with ``conversation``.
        processor: The processor.
        max_length: Width before the shift: longer samples are cut or dropped, shorter ones padded to it.
        drop_overlong: Leave longer samples out, with a warning.

    Returns:
        See `pad_samples`; with images ``grid_thws`` ``(num_images, 3)``, ``image_grid_hws`` ``(num_images, 2)`` and
        ``n_images_per_sample`` ``(B,)``.

    Raises:
        ValueError: If an image would be cut, or all samples are dropped.
    """
    samples = _encode_all(examples, processor, encode_kimi_k25)
    if drop_overlong:
        samples = _without_overlong(samples, max_length)
    else:
        samples = [cut_sample(sample, max_length, processor) for sample in samples]
    return pad_samples(samples, processor, max_length=max_length)


def nemotron_omni_collate_fn(
    examples: Examples, processor: Any, max_length: int | None = None, max_video_frames: int = 8
) -> Batch:
    """For Nemotron-3-Nano-Omni and our own processor: images, a video, sounds.

    Unlike in NeMo AutoModel labels come from the template, cutting through media is an error, counts are there, and a
    sample may have several sounds.

    Args:
        examples: Dicts with ``conversation`` and optionally ``audio``.
        processor: The processor.
        max_length: Width before the shift: longer samples are cut, shorter ones padded to it.
        max_video_frames: Most frames of a video.

    Returns:
        See `pad_samples` and `encode_nemotron_omni`; floating pixels in bfloat16.

    Raises:
        ValueError: If media would be cut.
        NotImplementedError: If a sample has several videos.
    """
    options = {"max_length": max_length, "max_video_frames": max_video_frames}
    samples = _encode_all(examples, processor, encode_nemotron_omni, **options)
    return pad_samples(samples, processor, max_length=max_length, bfloat16=True)


def nemotron_parse_collate_fn(examples: Examples, processor: Any, task_prompt: str = TASK_PROMPT) -> Batch:
    """For Nemotron-Parse, an encoder-decoder: one page in, its text out.

    Args:
        examples: Dicts with ``conversation``: an image, and its text as the first answer.
        processor: The processor.
        task_prompt: What the decoder is given; not trained on.

    Returns:
        See `pad_samples`; pixels in bfloat16, and ``decoder_input_ids`` and ``decoder_attention_mask``, the same as
        ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: If there is no image, or the tokenizer cannot pad or start a decoder.
    """
    require_decoder_tokens(processor)
    samples = _encode_all(examples, processor, encode_nemotron_parse, task_prompt=task_prompt)
    batch = pad_samples(samples, processor, bfloat16=True)
    return {**batch, "decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}


def phi4_mm_collate_fn(examples: Examples, processor: Any) -> Batch:
    """For Phi-4-multimodal: text and sound. Rows are cut at 1024 tokens, as in NeMo AutoModel, never through a sound.

    Args:
        examples: Dicts with ``conversation`` and optionally ``audio``.
        processor: The processor.

    Returns:
        See `pad_samples`; ``input_mode`` is 0 for text, 1 with images, 2 with sounds, 3 with both in the batch.

    Raises:
        ValueError: If a sound would be cut.
    """
    batch = pad_samples(_encode_all(examples, processor, encode_phi4_mm), processor)
    return {**batch, "input_mode": reduce(or_, batch["input_mode"].tolist())}


def pad_collate_fn(examples: Examples, processor: Any, max_length: int | None = None) -> Batch:
    """For samples that are tokenised already.

    Every medium comes along, ``second_per_grid_ts`` too, which NeMo AutoModel loses (defect 2A.13); images as a tensor
    and as a list may meet.

    Args:
        examples: ``input_ids``, ``attention_mask``, ``labels`` of ``(L,)`` and media.
        processor: Tells the padding token.
        max_length: Width before the shift: longer samples are cut, shorter ones padded to it.

    Returns:
        See `pad_samples`; floating pixels in bfloat16.

    Raises:
        ValueError: If media would be cut.
        TypeError: If pixels of the samples do not go together.
    """
    samples = [cut_sample(_with_counts(example), max_length, processor) for example in examples]
    return pad_samples(samples, processor, max_length=max_length, bfloat16=True)


def _with_counts(example: Mapping[str, Any]) -> EncodedSample:
    """A sample with its numbers of images and videos, as rows of their grids, where it does not say them."""
    grids = {"n_images": example.get("image_grid_thw"), "n_videos": example.get("video_grid_thw")}
    counts = {name: 0 if grid is None else len(grid) for name, grid in grids.items()}
    counts |= {name: int(example[name]) for name in COUNT_KEYS if name in example}
    rows = {key: sample_row(example, key) for key in SEQUENCE_KEYS if example.get(key) is not None}
    media = {key: as_media(value) for key, value in example.items() if key not in (*SEQUENCE_KEYS, *COUNT_KEYS)}
    return {**rows, **counts, **{key: value for key, value in media.items() if value is not None}}


COLLATE_FNS: dict[str, Callable[..., Batch]] = {
    "Qwen2_5_VLProcessor": qwen2_5_collate_fn,
    "Qwen3OmniMoeProcessor": qwen3_omni_collate_fn,
    "KimiVLProcessor": kimi_vl_collate_fn,
    "KimiK25Processor": kimi_k25_vl_collate_fn,
    "NemotronParseProcessor": nemotron_parse_collate_fn,
    "NemotronH_Nano_Omni_Reasoning_V3Processor": nemotron_omni_collate_fn,
    "LlavaOneVisionProcessor": llava_onevision_collate_fn,
    "default": default_collate_fn,
}
"""NeMo AutoModel's map, by class of processor. `collate_choice.collate_for` knows more, and subclasses."""
