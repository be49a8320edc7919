"""The one table of released names: where each parameter of ours lies in the files of a released checkpoint.

    language_model.model.layers.1.mixer.experts.up_proj[7]
        = language_model.backbone.layers.1.mixer.experts.7.up_proj.weight
    vision_model.encoder.layer.0.attention.k_proj.weight
        = vision_model.radio_model.model.blocks.0.attn.qkv.weight[n : 2n]
    embed_audio.linear_1.weight
        = sound_projection.linear1.weight

Import and export both read it. transformers renames in the same way inside `from_pretrained` and `save_pretrained`, and
can read shards; the tests hold this table against it. Own, because an export is to give back the base's files, and an
import to hold the weights once: transformers' peaks at half as much again (`benchmarks/checkpoint.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

_RADIO = "vision_model.radio_model."
# In this order; each replaces the beginning of a name, or a piece of it inside a block of the tower.
_RENAMED = [
    (r"^language_model\.model\.", "language_model.backbone."),
    (r"^vision_model\.embeddings\.patch_projection\.", f"{_RADIO}model.patch_generator.embedder."),
    (r"^vision_model\.embeddings\.video_patch_projection\.", f"{_RADIO}model.patch_generator.video_embedder."),
    (r"^vision_model\.embeddings\.position_embedding$", f"{_RADIO}model.patch_generator.pos_embed"),
    (r"^vision_model\.embeddings\.cls_register_token$", f"{_RADIO}model.patch_generator.cls_token.token"),
    (r"^vision_model\.encoder\.layer\.(\d+)\.attention\.o_proj\.", rf"{_RADIO}model.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layer\.", f"{_RADIO}model.blocks."),
    (r"^vision_model\.summary_idxs$", f"{_RADIO}summary_idxs"),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^audio_tower\.", "sound_encoder.encoder."),
    (r"^embed_audio\.layer_norm\.", "sound_projection.norm."),
    (r"^embed_audio\.linear_([12])\.", r"sound_projection.linear\1."),
]
_RENAMES = [(re.compile(pattern), replacement) for pattern, replacement in _RENAMED]
_QKV = re.compile(r"^vision_model\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)$")
_EXPERTS = re.compile(r"^(language_model\.)model\.(.*\.experts)\.(up_proj|down_proj)$")

# Names of the same tensors in files of other origin -> the released ones.
_ALIASES = [
    (re.compile(r"^language_model\.model\."), "language_model.backbone."),
    (re.compile(r"^(language_model\.backbone\.)embed_tokens\."), r"\1embeddings."),
]

_IMPLIED = re.compile(r"layer_scale[12]\.|summary_idxs$")
_OPTIONAL = re.compile(rf"{_IMPLIED.pattern}|num_batches_tracked$")
_NOT_OURS = re.compile(r"input_conditioner\.|feature_extractor\.featurizer\.|^(language_model\.)?mtp\.")
_SOUND_BIAS = re.compile(r"^sound_encoder\.encoder\.layers\.\d+\..*\.bias$")
# float32 in the released bfloat16 files: what routing and normalisation would not bear to be rounded.
_IN_FLOAT32 = re.compile(r"e_score_correction_bias$|input_conditioner\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stretch of one of our tensors lies in a file.

    Attributes:
        key: Released name.
        index: Of our first dimension; ``None`` where it is all of our tensor.
        rows: First and one after the last row of the released tensor; ``None`` where it is all of it.
    """

    key: str
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a stretch of a released tensor is of ours.

    Attributes:
        name: Ours.
        index: Of our first dimension; ``None`` for all of it.
    """

    name: str
    index: int | None = None


def places(name: str, shape: Shape) -> list[Place]:
    """Where one of our tensors lies in released files.

    Args:
        name: In the state dict of `NemotronVL`.
        shape: Of the tensor.

    Returns:
        Its stretches in order; one for most.
    """
    if match := _QKV.match(name):
        layer, which, kind = match.groups()
        start = "qkv".index(which) * shape[0]
        return [Place(f"{_RADIO}model.blocks.{layer}.attn.qkv.{kind}", rows=(start, start + shape[0]))]
    if match := _EXPERTS.match(name):
        language, experts, projection = match.groups()
        return [Place(f"{language}backbone.{experts}.{e}.{projection}.weight", index=e) for e in range(shape[0])]
    for pattern, replacement in _RENAMES:
        renamed, found = pattern.subn(replacement, name)
        if found:
            return [Place(renamed)]
    return [Place(name)]


def released_shape(name: str, shape: Shape, place: Place) -> Shape:
    """Shape of the whole released tensor in which one of ours lies.

    Args:
        name: Ours.
        shape: Of ours.
        place: One of `places`.
    """
    if place.index is not None:
        return shape[1:]
    return (3 * shape[0], *shape[1:]) if _QKV.match(name) else shape


def released_tensors(shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, list[Stretch]]]:
    """The released tensors that a model is written as.

    Args:
        shapes: Of all our tensors.

    Returns:
        By released name: its shape, and what it is joined from along the first dimension, in order.
    """
    tensors: dict[str, tuple[Shape, list[tuple[int, Stretch]]]] = {}
    for name, shape in shapes.items():
        for place in places(name, shape):
            found = tensors.setdefault(place.key, (released_shape(name, shape, place), []))
            found[1].append((place.rows[0] if place.rows else 0, Stretch(name, place.index)))
    return {key: (shape, [stretch for _, stretch in sorted(parts, key=lambda part: part[0])])
            for key, (shape, parts) in tensors.items()}  # fmt: skip


def canonical_key(key: str) -> str:
    """The released name of a tensor that other tools call by another.

    Args:
        key: As it stands in a file.
    """
    for pattern, replacement in _ALIASES:
        key = pattern.sub(replacement, key)
    return key


def is_optional(key: str) -> bool:
    """Whether released files may leave a tensor out: it is the identity, or follows from the config.

    Args:
        key: Released name.
    """
    return _OPTIONAL.search(key) is not None


def is_implied(key: str) -> bool:
    """Whether released files never hold a tensor: layer scales, which RADIO has not, and what follows from the config.

    Args:
        key: Released name.
    """
    return _IMPLIED.search(key) is not None


def is_not_ours(key: str) -> bool:
    """Whether released files hold a tensor that the model computes without: it is handed on by an export.

    Args:
        key: Released name.
    """
    return _NOT_OURS.search(key) is not None


def may_be_zero(key: str) -> bool:
    """Whether a tensor that the model lacks does no harm if it is all zeros: biases of the early Omni's sound tower.

    Args:
        key: Released name.
    """
    return _SOUND_BIAS.match(key) is not None


def stays_float32(key: str) -> bool:
    """Whether a tensor is float32 also in files of half precision.

    Args:
        key: Released name.
    """
    return _IN_FLOAT32.search(key) is not None
