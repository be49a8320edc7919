"""Rendered text with one placeholder per medium -> token ids with one placeholder per feature.

Images and sounds are runs of special tokens inside the text, which is tokenised as a whole. A video is text of its own
between such runs; each of its labels is tokenised alone, as serving does it, so that no token ever spans two of them
and the number of tokens does not depend on what stands beside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_vlm.processing.chat import Span
from lightning_vlm.processing.labels import tokenize_spans, tokenize_text
from lightning_vlm.processing.media_layout import SoundLayout, VideoLayout
from lightning_vlm.schema import IGNORE_INDEX, IMAGE, SOUND, TEXT, VIDEO

_VIDEO_FEATURE = -1  # images and videos share a placeholder; no tokenizer has this id


@dataclass(frozen=True, slots=True)
class MediaTokens:
    """The tokens around and in place of media, by their text.

    Attributes:
        image: Placeholder of a feature of an image or a video; stands for a whole image in a rendered text.
        image_start: Opens an image or a tubelet.
        image_end: Closes it.
        video: Stands for a whole video in a rendered text; no token of the model.
        sound: Placeholder of a feature of a sound; stands for a whole sound in a rendered text.
        sound_start: Opens a sound.
        sound_end: Closes it.
    """

    image: str = "<image>"
    image_start: str = "<img>"
    image_end: str = "</img>"
    video: str = "<video>"
    sound: str = "<so_embedding>"
    sound_start: str = "<so_start>"
    sound_end: str = "<so_end>"


@dataclass(frozen=True, slots=True)
class VideoPiece:
    """A video in the place of its placeholder.

    Attributes:
        token_ids: Labels, start and end tokens, and `_VIDEO_FEATURE` for each feature.
        trained: As of `Span`: a video that stands in an answer.
    """

    token_ids: tuple[int, ...]
    trained: bool


Piece = Span | VideoPiece


class PieceExpander:
    """Expands placeholders.

    Args:
        tokenizer: A fast tokenizer.
        tokens: The tokens; those of sounds and videos need not be in the tokenizer until there is one.
    """

    def __init__(self, tokenizer: Any, tokens: MediaTokens) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        self._placeholders = _any_of(tokens.image, tokens.video, tokens.sound)
        self._without_videos = _any_of(tokens.image, tokens.sound)

    def expand(
        self,
        spans: Iterable[Span],
        image_counts: Iterable[int],
        videos: Sequence[VideoLayout],
        sounds: Iterable[SoundLayout],
    ) -> list[Piece]:
        """Writes each medium out in the place of its placeholder.

        Args:
            spans: Rendered text.
            image_counts: Tokens of each image.
            videos: Each video; without any, their placeholder is a word like others.
            sounds: Each sound.
        """
        images, films, noises = iter(image_counts), iter(videos), iter(sounds)
        found = self._placeholders if videos else self._without_videos
        return [piece for span in spans for piece in self._expand(span, found, images, films, noises)]

    def _expand(
        self,
        span: Span,
        placeholders: re.Pattern[str],
        images: Iterator[int],
        videos: Iterator[VideoLayout],
        sounds: Iterator[Any],
    ) -> Iterator[Piece]:
        tokens, text = self.tokens, ""
        for part in placeholders.split(span.text):
            if part == tokens.image:
                text += tokens.image_start + tokens.image * next(images) + tokens.image_end
            elif part == tokens.sound:
                text += tokens.sound_start + tokens.sound * next(sounds).num_tokens + tokens.sound_end
            elif part == tokens.video:
                if text:
                    yield Span(text, span.trained)
                yield VideoPiece(self._video_ids(next(videos)), span.trained)
                text = ""
            else:
                text += part
        if text:
            yield Span(text, span.trained)

    def _video_ids(self, video: VideoLayout) -> tuple[int, ...]:
        labels = self.tokenizer(list(video.labels), add_special_tokens=False, verbose=False)["input_ids"]
        ids: list[int] = []
        for label, count in zip(labels, video.tokens_per_tubelet, strict=True):
            ids += [*label, *self._start, *(_VIDEO_FEATURE,) * count, *self._end]
        return tuple(ids)

    @cached_property
    def _start(self) -> list[int]:
        return tokenize_text(self.tokenizer, self.tokens.image_start)

    @cached_property
    def _end(self) -> list[int]:
        return tokenize_text(self.tokenizer, self.tokens.image_end)


def tokenize_pieces(
    tokenizer: Any, pieces: Sequence[Piece], image_token_id: int, sound_token_id: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokenises pieces and labels the trained ones.

    Args:
        tokenizer: A fast tokenizer.
        pieces: From `PieceExpander.expand`.
        image_token_id: Id of the placeholder of images and videos.
        sound_token_id: Id of the placeholder of sounds, if the tokenizer has one.

    Returns:
        ``input_ids``, ``labels`` (-100 outside trained spans, and for placeholders: no model is to say them) and
        ``mm_token_type_ids``, all ``(L,)`` int64.
    """
    ids, labels = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]  # a text may be empty
    for is_video, group in groupby(pieces, lambda piece: isinstance(piece, VideoPiece)):
        if not is_video:
            found = tokenize_spans(tokenizer, list(group))  # type: ignore[arg-type]
            ids.append(found[0])
            labels.append(found[1])
            continue
        for piece in group:
            own = torch.tensor(piece.token_ids)  # type: ignore[union-attr]
            ids.append(own)
            labels.append(own if piece.trained else torch.full_like(own, IGNORE_INDEX))
    input_ids, all_labels = torch.cat(ids), torch.cat(labels)
    types = torch.full_like(input_ids, TEXT)
    types[input_ids == image_token_id] = IMAGE
    types[input_ids == _VIDEO_FEATURE] = VIDEO
    if sound_token_id is not None:
        types[input_ids == sound_token_id] = SOUND
    return (
        input_ids.masked_fill(types == VIDEO, image_token_id),
        all_labels.masked_fill(types != TEXT, IGNORE_INDEX),
        types,
    )


def piece_ids(tokenizer: Any, pieces: Sequence[Piece]) -> list[int]:
    """The ids of `tokenize_pieces`, without labels: for their number. Features of videos are negative.

    Args:
        tokenizer: A fast tokenizer.
        pieces: From `PieceExpander.expand`.
    """
    ids: list[int] = []
    for is_video, group in groupby(pieces, lambda piece: isinstance(piece, VideoPiece)):
        if is_video:
            for piece in group:
                ids += piece.token_ids  # type: ignore[union-attr]
        else:
            ids += tokenize_text(tokenizer, "".join(piece.text for piece in group))  # type: ignore[union-attr]
    return ids


def _any_of(*tokens: str) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
