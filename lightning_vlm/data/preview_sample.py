"""Preview of one sample: its text in pieces that are trained or not, and its media, all from its tensors alone.

Nothing is taken from the row that the sample was made of, so what a template, a tokenizer or a limit has changed is
seen here. The price is that text is decoded, and tokens need not end where characters do: see `cut_pieces`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from lightning_vlm.data.preview_image import PreviewImage, sample_images
from lightning_vlm.data.preview_sound import PreviewSound, sample_sounds
from lightning_vlm.data.preview_video import PreviewVideo, sample_videos
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import IGNORE_INDEX, IMAGE, SOUND, TEXT, VIDEO, DataError, Sample

_MOST_BYTES = 4  # of a character in UTF-8, so the most tokens that hold parts of one character


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text that is all trained on or all not, or a run of placeholders of one medium.

    Attributes:
        text: The decoded tokens.
        trained: Whether the loss is taken on it.
        marker: What is shown in place of placeholders; empty for text.
    """

    text: str
    trained: bool
    marker: str = ""

    @property
    def shown(self) -> str:
        """The text, or the marker of a medium."""
        return self.marker or self.text


@dataclass(frozen=True, slots=True)
class Preview:
    """One sample as the model gets it, or what is wrong with it.

    Attributes:
        index: Its number in the split.
        source: Its place, e.g. ``file:line``.
        pieces: Its text; joined, the tokenizer's decoding of all its tokens.
        images: Its images in reading order.
        videos: Its videos in reading order.
        sounds: Its sounds in reading order.
        num_tokens: All its tokens.
        num_image_tokens: Those that stand for images.
        num_video_tokens: Those that stand for videos, labels of frames not counted.
        num_sound_tokens: Those that stand for sounds.
        num_label_tokens: Those that the loss is taken on.
        notes: What a reader should know of this preview.
        error: Why the sample cannot be used; all else is empty then.
    """

    index: int
    source: str
    pieces: tuple[Piece, ...] = ()
    images: tuple[PreviewImage, ...] = ()
    videos: tuple[PreviewVideo, ...] = ()
    sounds: tuple[PreviewSound, ...] = ()
    num_tokens: int = 0
    num_image_tokens: int = 0
    num_video_tokens: int = 0
    num_sound_tokens: int = 0
    num_label_tokens: int = 0
    notes: tuple[str, ...] = ()
    error: DataError | None = None

    @property
    def text(self) -> str:
        """The tokenizer's decoding of all tokens."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def trained_text(self) -> str:
        """What the model learns to write."""
        return "".join(piece.text for piece in self.pieces if piece.trained)


def preview_sample(sample: Sample, index: int, processor: NemotronVLProcessor) -> Preview:
    """Makes the preview of one sample.

    Args:
        sample: What a collate function is given.
        index: Its number in the split.
        processor: What made it.

    Raises:
        ValueError: If its text and its media do not belong together.
    """
    ids = sample.input_ids.tolist()
    trained = (sample.labels != IGNORE_INDEX).tolist()
    trained[:1] = [False] * len(trained[:1])  # nothing predicts the first token
    runs = media_runs(_token_types(sample, processor))
    lengths = {kind: [length for _, length in own] for kind, own in runs.items()}
    images = _images(sample, lengths[IMAGE], processor)
    videos = sample_videos(sample, runs[VIDEO], processor)
    sounds = sample_sounds(sample, lengths[SOUND], processor)
    shown = {
        IMAGE: [f"<image {number}: {image}>" for number, image in enumerate(images, start=1)],
        VIDEO: [marker for number, video in enumerate(videos, start=1) for marker in video.markers(number)],
        SOUND: [f"<sound {number}: {sound}>" for number, sound in enumerate(sounds, start=1)],
    }
    markers, numbers = [""], [0] * len(ids)
    for kind, own in runs.items():
        for (start, length), marker in zip(own, shown[kind], strict=True):
            numbers[start : start + length] = [len(markers)] * length
            markers.append(marker)
    texts, num_cut = cut_pieces(processor.tokenizer, ids, list(zip(trained, numbers)))
    pieces = tuple(Piece(text, is_trained, markers[number]) for text, (is_trained, number) in texts)
    return Preview(
        index=index,
        source=sample.source,
        pieces=pieces,
        images=tuple(images),
        videos=tuple(videos),
        sounds=tuple(sounds),
        num_tokens=len(ids),
        num_image_tokens=sum(lengths[IMAGE]),
        num_video_tokens=sum(lengths[VIDEO]),
        num_sound_tokens=sum(lengths[SOUND]),
        num_label_tokens=sample.num_label_tokens,
        notes=_notes(pieces, sample.num_label_tokens, num_cut, any(video.is_pruned for video in videos)),
    )


def media_runs(token_types: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Where the placeholders of media stand.

    Args:
        token_types: As of `Sample.mm_token_type_ids`.

    Returns:
        Per kind of media, (start, length) of each unbroken run: an image, a sound, or a tubelet of a video; all of the
        video where it is pruned.
    """
    runs: dict[int, list[tuple[int, int]]] = {IMAGE: [], VIDEO: [], SOUND: []}
    start = 0
    for kind, run in groupby(token_types):
        length = len(list(run))
        if kind != TEXT:
            runs[kind].append((start, length))
        start += length
    return runs


def cut_pieces(
    tokenizer: Any, input_ids: Sequence[int], keys: Sequence[tuple[bool, int]]
) -> tuple[list[tuple[str, tuple[bool, int]]], int]:
    """Decodes tokens in runs of equal keys; joined, the texts are the decoding of the whole.

    Decoding each run by itself would not be: decoders drop a leading space or put spaces between words. So a run's text
    is what it adds to the decoding of all tokens before it. Where a run ends inside a character (a byte-level token
    holds a part of one), the whole character goes to the trained side: its loss is taken at least in part.

    Args:
        tokenizer: A transformers tokenizer.
        input_ids: The tokens.
        keys: Per token, (trained, number of its run of placeholders); 0 for text.

    Returns:
        Texts with their keys, empty ones left out; and the number of characters that were cut.
    """

    prefixes = _Prefixes(tokenizer, input_ids)
    whole = prefixes.whole
    pieces: list[tuple[str, tuple[bool, int]]] = []
    cut: set[int] = set()
    start = position = 0
    for key, run in groupby(keys):
        start += len(list(run))
        end, moved = (len(whole), 0) if start == len(keys) else _boundary(prefixes, start, key[0])
        if moved:
            cut.add(end - 1 if key[0] else end)
        if end > position:
            pieces.append((whole[position:end], key))
            position = end
    return pieces, len(cut)


class _Prefixes:
    """Where in the decoding of all tokens that of the first of them ends, asked for in rising order.

    What tokens add is decoded with the run before them: to decode from the beginning each time takes seconds for a long
    video. Only where that does not lead on in the whole is it decoded from the beginning.
    """

    def __init__(self, tokenizer: Any, input_ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(input_ids)
        self.whole = self.decode(0, len(self._ids))
        self._before, self._known, self._length = 0, 0, 0  # two numbers of tokens; characters of the second

    def decode(self, start: int, end: int) -> str:
        tokens = self._ids[start:end]
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def length(self, tokens: int) -> int | None:
        """Characters of the first tokens; ``None`` where the whole does not begin with them."""
        before, text = self.decode(self._before, self._known), self.decode(self._before, tokens)
        added = text[len(before) :]
        is_whole = "\ufffd" not in text  # else it may begin or end inside a character
        if is_whole and text.startswith(before) and self.whole.startswith(added, self._length):
            length = self._length + len(added)
        elif self.whole.startswith(text := self.decode(0, tokens)):
            length = len(text)
        else:
            return None
        if tokens > self._known:  # a border may be moved back
            self._before, self._known, self._length = self._known, tokens, length
        return length


def _boundary(prefixes: _Prefixes, tokens: int, trained: bool) -> tuple[int, int]:
    """Where in the whole its first tokens' text ends, and by how many tokens that is moved out of a character."""
    for moved in range(_MOST_BYTES):
        length = prefixes.length(max(tokens + moved if trained else tokens - moved, 0))
        if length is not None:
            return length, moved
    same = (one == other for one, other in zip(prefixes.whole, prefixes.decode(0, tokens)))
    return len(list(takewhile(bool, same))), 0  # the decoder changes what it wrote before


def _token_types(sample: Sample, processor: NemotronVLProcessor) -> list[int]:
    if sample.mm_token_type_ids is not None:
        return sample.mm_token_type_ids.tolist()
    return [IMAGE if token == processor.image_token_id else TEXT for token in sample.input_ids.tolist()]


def _images(sample: Sample, tokens: Sequence[int], processor: NemotronVLProcessor) -> list[PreviewImage]:
    if sample.pixel_values is None or sample.image_grid_hw is None:
        if tokens:
            raise ValueError(f"the text has {sum(tokens)} image tokens, but there is no image")
        return []
    grids = [(rows, columns) for rows, columns in sample.image_grid_hw.tolist()]
    return sample_images(sample.pixel_values, grids, tokens, processor.geometry, processor.image_processor)


def _notes(pieces: Sequence[Piece], num_label_tokens: int, num_cut: int, is_pruned: bool) -> tuple[str, ...]:
    notes = []
    if is_pruned:
        notes.append(
            "the tokens of a pruned video stand in its first tubelet; the model moves them to where they belong"
        )
    if not num_label_tokens:
        notes.append("nothing of this sample is trained on")
    if num_cut:
        notes.append(f"{num_cut} character(s) are cut by a border of trained tokens and shown as trained in whole")
    if any("\ufffd" in piece.text for piece in pieces):
        notes.append("U+FFFD stands for bytes that form no character: one was cut off, or the data has it so")
    return tuple(notes)
