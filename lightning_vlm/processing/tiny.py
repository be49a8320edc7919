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

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer: 263 tokens, ChatML template, padding on the right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHATML_TEMPLATE,
        padding_side="right",
    )


def tiny_processor(**image_options: Any) -> NemotronVLProcessor:
    """A processor for small images: 8-pixel patches, 4 to 256 per image, unless overridden.

    Args:
        **image_options: Options of `NemotronVLImageProcessor`.
    """
    options = {
        "patch_size": 8,
        "min_num_patches": 4,
        "max_num_patches": 256,
        "max_model_len": 2048,
        "tile_size": 32,
    }
    return NemotronVLProcessor(NemotronVLImageProcessor(**{**options, **image_options}), tiny_tokenizer())
