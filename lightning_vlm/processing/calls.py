"""The door that transformers users know: texts and media of a batch -> padded model inputs, each text by itself.

What a text becomes does not depend on the others in the batch, and is what training makes of the same text and media.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, TextKwargs

from lightning_vlm.geometry.sounds import SoundGeometry
from lightning_vlm.geometry.videos import VideoGeometry, uniform_frames
from lightning_vlm.media.audio import load_audio
from lightning_vlm.media.image import to_rgb
from lightning_vlm.media.policy import MediaPolicy
from lightning_vlm.media.video import Video, load_video
from lightning_vlm.processing.chat import Span
from lightning_vlm.processing.image_processor import NemotronVLImageKwargs
from lightning_vlm.processing.media_layout import SoundLayout, media_sizes
from lightning_vlm.processing.media_tensors import image_tensors, sound_tensors, video_tensors
from lightning_vlm.processing.pieces import VideoPiece, tokenize_pieces
from lightning_vlm.schema import IMAGE, SOUND, TEXT

IMAGE_OPTIONS = frozenset(NemotronVLImageKwargs.__annotations__) - frozenset(ImagesKwargs.__annotations__) | {
    "do_normalize",
    "image_mean",
    "image_std",
}
"""Options of `NemotronVLImageProcessor` that a call or a config may give; transformers' others would do nothing."""

_TEXT_OPTIONS = frozenset(TextKwargs.__annotations__)
_PADDING = ("padding", "max_length", "padding_side", "pad_to_multiple_of")


def call_processor(
    processor: Any, text: str | list[str] | None, images: Any, videos: Any, audio: Any, options: dict[str, Any]
) -> BatchFeature:
    """Makes model inputs; see `NemotronVLProcessor.__call__`.

    Args:
        processor: The processor.
        text: One text or several.
        images: Images, flat or one list per text.
        videos: Videos, likewise.
        audio: Sounds, likewise.
        options: Of images, videos and the tokenizer.

    Raises:
        ValueError: If texts and media do not match, or an option is unknown.
    """
    if text is None:
        raise ValueError(f"text is missing; expected a text with one {processor.image_token} per image")
    texts = [text] if isinstance(text, str) else list(text)
    return_tensors, fps = options.pop("return_tensors", None), options.pop("video_fps", None)
    rate, image_options = options.pop("sampling_rate", None), pop_image_options(options)
    _check_options(options, fps)
    if image_options:
        processor = _with_image_options(processor, image_options)
    tokens = processor.media_tokens
    for kind, given, name in (("videos", videos, "video"), ("audio", audio, "sound")):
        if not _is_nothing(given) and getattr(processor, name) is None:
            raise ValueError(f"{kind} were given to a processor without settings for them; make it with {name}={{...}}")
    video_token = None if processor.video is None else tokens.video  # then it is a word like others
    flat: dict[str, tuple[str | None, Any, list[Any]]] = {
        "image": (tokens.image, images, _flat_images(images)),
        "video": (video_token, videos, _flat_videos(videos, processor.video_geometry, fps)),
        "sound": (tokens.sound, audio, _flat_sounds(audio, processor.sound_geometry, rate)),
    }
    owned = [
        _per_text(texts, token, media, _lengths(given, len(texts), kind), kind)
        for kind, (token, given, media) in flat.items()
    ]
    pieces: list[Any] = []
    parts: list[dict[str, Any]] = []
    pairs: list[tuple[Tensor, SoundLayout]] = []
    for number, (item, (own_images, own_videos, own_sounds)) in enumerate(zip(texts, zip(*owned)), start=1):
        media = [*own_images, *own_videos, *own_sounds]
        sizes = media_sizes(media, processor.video_geometry, processor.sound_geometry)
        spans = [Span(item, trained=False)]
        layout, own_pieces = processor.layouter.lay_out(spans, sizes, processor.geometry, f"text {number}")
        pieces.append(own_pieces)
        parts.append(
            {
                **image_tensors(own_images, layout, processor.image_processor),
                **video_tensors(own_videos, sizes.videos, processor.video_geometry, processor.image_processor),
            }
        )
        pairs += zip(own_sounds, sizes.sounds)
    names = list(dict.fromkeys(name for part in parts for name, value in part.items() if value is not None))
    data = {name: torch.cat([part[name] for part in parts if part.get(name) is not None]) for name in names}
    sounds, layouts = [sound for sound, _ in pairs], [layout for _, layout in pairs]
    data |= sound_tensors(sounds, layouts, processor.sound_geometry, processor.num_mel_bins)
    told_apart = "video_grid_thw" in data or bool(sounds)
    return BatchFeature(data={**_tokenize(processor, pieces, options, told_apart), **data}, tensor_type=return_tensors)


def _check_options(options: dict[str, Any], fps: Any) -> None:
    """Refuses what the tokenizer would pass over with a warning, or without."""
    if unknown := sorted(set(options) - _TEXT_OPTIONS):
        raise ValueError(
            f"a call has no option {unknown[0]!r}; expected video_fps, sampling_rate, the tokenizer's options or some "
            f"of {', '.join(sorted(IMAGE_OPTIONS))}: all else is said when the processor is made, e.g. "
            "from_pretrained(folder, video={'num_frames': 32})"
        )
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < float("inf")):
        raise ValueError(f"video_fps is {fps!r}; expected frames per second above 0")


def pop_image_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of `NemotronVLImageProcessor` out of others.

    Args:
        kwargs: Changed in place.
    """
    return {name: kwargs.pop(name) for name in list(kwargs) if name in IMAGE_OPTIONS}


def _with_image_options(processor: Any, options: dict[str, Any]) -> Any:
    changed = copy.copy(processor)
    changed.image_processor = copy.copy(processor.image_processor)
    for name, value in options.items():
        setattr(changed.image_processor, name, value)
    return changed


def _tokenize(processor: Any, pieces: Sequence[Any], options: dict[str, Any], told_apart: bool) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` as the tokenizer returns them, and token types where they are needed."""
    tokenizer = processor.tokenizer
    if not any(isinstance(piece, VideoPiece) for own in pieces for piece in own):
        options.setdefault("add_special_tokens", False)
        encoded = dict(tokenizer(["".join(piece.text for piece in own) for own in pieces], **options))
        if told_apart:
            ids = {processor.image_token_id: IMAGE, processor.audio_token_id: SOUND}
            encoded["mm_token_type_ids"] = [[ids.get(token, TEXT) for token in row] for row in encoded["input_ids"]]
        return encoded
    if unknown := [name for name, value in options.items() if name not in _PADDING and value]:
        raise ValueError(
            f"{', '.join(unknown)} cannot be used with videos, whose labels are tokenised one by one; expected only "
            f"{', '.join(_PADDING)} and return_tensors"
        )
    rows = [tokenize_pieces(tokenizer, own, processor.image_token_id, processor.audio_token_id) for own in pieces]
    padding = {"padding": False, **{name: value for name, value in options.items() if name in _PADDING}}
    encoded = dict(tokenizer.pad({"input_ids": [ids.tolist() for ids, _, _ in rows]}, **padding))
    encoded["mm_token_type_ids"] = []
    for mask, (_, _, types) in zip(encoded["attention_mask"], rows):
        remaining = iter(types.tolist())
        encoded["mm_token_type_ids"].append([next(remaining) if real else 0 for real in mask])
    return encoded


def _per_text(
    texts: list[str], token: str | None, flat: list[Any], lengths: list[int] | None, kind: str
) -> list[list[Any]]:
    """The media of each text: as many as it has placeholders."""
    found = [text.count(token) if token else 0 for text in texts]
    for wanted, given in zip(found, lengths) if lengths is not None else [(sum(found), len(flat))]:
        if wanted != given:
            raise ValueError(f"text has {wanted} {token} placeholder(s) for {given} {kind}(s)")
    remaining = iter(flat)
    return [[next(remaining) for _ in range(count)] for count in found]


def _lengths(media: Any, num_texts: int, kind: str) -> list[int] | None:
    """How many media each text was given, if they came as one list per text."""
    if not isinstance(media, list | tuple) or len(media) != num_texts:
        return None
    one = {"image": lambda _: False, "video": _is_video, "sound": _is_sound}[kind]  # a list may be one video's frames
    nested = all(isinstance(own, list | tuple) and not one(own) for own in media)
    return [len(own) for own in media] if nested else None


def _is_nothing(media: Any) -> bool:
    return media is None or (isinstance(media, list | tuple) and all(map(_is_nothing, media)))


def _flat_images(images: Any) -> list[Image.Image]:
    return [] if images is None else [to_rgb(image) for image in make_flat_list_of_images(images)]


def _flat_videos(videos: Any, geometry: VideoGeometry | None, fps: float | None) -> list[Video]:
    if videos is None or geometry is None:
        return []

    def choose(total: int, source_fps: float | None) -> list[int]:
        return uniform_frames(total, source_fps, geometry)

    def read(video: Any) -> Video:
        return video if isinstance(video, Video) else load_video(video, _ANY, "videos", frames_fps=fps, choose=choose)

    return [read(video) for video in _flatten(videos, _is_video, _NO_VIDEO)]


def _flat_sounds(audio: Any, geometry: SoundGeometry | None, rate: int | None) -> list[Tensor]:
    if audio is None or geometry is None:
        return []

    def read(sound: Any) -> Tensor:
        pair = sound if isinstance(sound, tuple) else (sound, geometry.sampling_rate if rate is None else rate)
        return load_audio(pair, _ANY, "audio", geometry.sampling_rate)[0]

    return [read(sound) for sound in _flatten(audio, _is_sound, _NO_SOUND)]


def _is_video(value: Any) -> bool:
    frames = isinstance(value, list | tuple) and bool(value) and _is_image(value[0])
    return frames or isinstance(value, Video) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 4)


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 3)


def _is_sound(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | np.integer)
    return pair or (isinstance(value, np.ndarray | Tensor) and value.ndim == 1)


def _flatten(media: Any, is_medium: Any, otherwise: str) -> list[Any]:
    if is_medium(media):
        return [media]
    if not isinstance(media, list | tuple):
        raise ValueError(f"{type(media).__name__} is {otherwise}")
    return [medium for item in media for medium in _flatten(item, is_medium, otherwise)]


_NO_VIDEO = (
    "no video; expected a list of images, an array (T, H, W, 3) or a Video: a file becomes one by "
    "load_video(path, MediaPolicy(folder), path, choose=processor.choose_frames) of lightning_vlm.media"
)
_NO_SOUND = (
    "no sound; expected an array (num_samples,) or a pair of samples and their rate in Hz: a file becomes one by "
    "load_audio(path, MediaPolicy(folder), path) of lightning_vlm.media"
)
# Arrays and images of the caller's own: nothing is opened, and there is no setting to raise.
_ANY = MediaPolicy("", max_video_frames=sys.maxsize, max_audio_s=math.inf)
