"""A byte-level tokenizer and its processor, made in memory: for the demo, the tests, and first steps offline.

It has no merges and no unknown text (one token per byte), the tokens of the Nemotron-3 vocabulary by name,
and a ChatML template of the same form. It trades sequence length for needing no download.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
from lightning_vlm.processing.processor import NemotronVLProcessor

SPECIAL_TOKENS = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<image>", "<img>", "</img>")
"""Ids 0..6; bytes follow."""

SOUND_TOKENS = ("<so_embedding>", "<so_start>", "<so_end>")
"""Ids 263..265 of the tokenizer that has them."""

TINY_VIDEO: dict[str, Any] = {"target_num_patches": 16, "num_frames": 16, "fps": None}
"""Videos for a tiny model: 4 tokens a tubelet."""

TINY_SOUND: dict[str, Any] = {"num_mel_bins": 32, "clip_s": 5.0}
"""Sounds for a tiny model, whose config has as many bins."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer(sound: bool = False) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer: 263 tokens, ChatML template, padding on the right.

    Args:
        sound: Whether it has the three tokens of sounds besides.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = (*SPECIAL_TOKENS, *SOUND_TOKENS) if sound else SPECIAL_TOKENS
    tokens = [*SPECIAL_TOKENS, *alphabet, *special[len(SPECIAL_TOKENS) :]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHATML_TEMPLATE,
        padding_side="right",
    )


def tiny_processor(
    video: dict[str, Any] | None = None, sound: dict[str, Any] | None = None, **image_options: Any
) -> NemotronVLProcessor:
    """A processor for small images: 8-pixel patches, 4 to 256 per image, unless overridden.

    Args:
        video: Options of videos, e.g. `TINY_VIDEO`; without them videos are refused.
        sound: Options of sounds, e.g. `TINY_SOUND`; without them sounds are refused.
        **image_options: Options of `NemotronVLImageProcessor`.
    """
    options = {
        "patch_size": 8,
        "min_num_patches": 4,
        "max_num_patches": 256,
        "max_model_len": 2048,
        "tile_size": 32,
    }
    images = NemotronVLImageProcessor(**{**options, **image_options})
    return NemotronVLProcessor(images, tiny_tokenizer(sound is not None), video=video, sound=sound)
