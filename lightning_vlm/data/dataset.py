"""Index -> Sample: reads a row, loads its media, encodes it. Runs in the loader's workers.

Nothing is cached or changed in place, so a worker's memory does not grow with what it has seen. A sample that is not
as long as the plan was told is an error here, before it can overflow a pack.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from lightning_vlm.data.lengths import LengthTable
from lightning_vlm.data.overlong import ways_to_shorten
from lightning_vlm.media.audio import audio_info, load_audio
from lightning_vlm.media.load import MediaPolicy, load_image, verify_image
from lightning_vlm.media.video import load_video, video_info
from lightning_vlm.processing.media_layout import Medium, MediumSize
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.processing.sizes import SampleLimit, SampleSize
from lightning_vlm.schema import AudioRef, Conversation, ImageRef, MediaRef, Sample, StoppingError, VideoRef
from lightning_vlm.sources.files import is_url
from lightning_vlm.sources.rows import RowSource

OverlongPolicy = Literal["error", "drop", "truncate_text", "downscale_images"]


class SampleDataset:
    """All rows of several sources as Samples.

    Args:
        sources: Where the rows are, in order.
        processor: Encodes conversations.
        policy: What media may be read; its ``media_root`` is replaced by that of each source.
        max_tokens: Longest sample, in tokens; longer ones are an error, never cut.
        answer: Samples end with a generation prompt instead of the row's last assistant turn.
        template_kwargs: Extra chat-template variables.
        lengths: What the samples were measured to be; one that differs is an error.
        limit: The most that a sample may be; one that exceeds it is an error.
        overlong: What is done before it is one: with ``downscale_images``, its images are made smaller; with
            ``truncate_text``, its text's end is cut off. ``drop`` is for the plan to heed (see
            `lightning_vlm.data.overlong`): an index always means the same row.

    Raises:
        ValueError: If ``lengths`` are those of another number of samples.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        processor: NemotronVLProcessor,
        policy: MediaPolicy,
        max_tokens: int | None = None,
        answer: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        lengths: LengthTable | None = None,
        limit: SampleLimit | None = None,
        overlong: OverlongPolicy = "error",
    ) -> None:
        self.sources = list(sources)
        self.processor = processor
        self.max_tokens = max_tokens
        self.answer = answer
        self.template_kwargs = template_kwargs
        self.limit = limit
        self.overlong = overlong
        self.policies = [replace(policy, media_root=_root(source.media_root)) for source in self.sources]
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))
        self.lengths = self._checked(lengths)

    @property
    def image_limit(self) -> SampleLimit | None:
        """The limit that images are made smaller for, if they are."""
        return self.limit if self.overlong == "downscale_images" else None

    @property
    def max_text(self) -> int | None:
        """The number of tokens that texts are cut at, if they are."""
        return self.limit.tokens if self.limit is not None and self.overlong == "truncate_text" else None

    def with_lengths(self, lengths: LengthTable) -> Self:
        """The same samples, each checked against what it was measured to be."""
        other = copy.copy(self)
        other.lengths = self._checked(lengths)
        return other

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Encodes one row.

        Raises:
            DataError: If the row or a medium is not acceptable.
            StoppingError: If the sample is too long, or not as long as it was measured.
        """
        source, row, policy = self._locate(index)
        conversation = source.conversation(row)
        self.processor.check_media(conversation)
        media = [self._load(medium, policy, conversation.source) for medium in conversation.media]
        sample = self.processor.encode(conversation, media, **self._options(conversation))
        self._check_length(sample, index, conversation)
        return sample

    def conversation(self, index: int) -> Conversation:
        """What a row means, nothing loaded.

        Raises:
            DataError: If the row is not acceptable.
        """
        source, row, _ = self._locate(index)
        return source.conversation(row)

    def size(self, index: int, decode: bool = False) -> SampleSize:
        """The size of ``self[index]`` from the row and the headers of its media; too long is no error here.

        Args:
            index: The sample.
            decode: Decode the media too, to find damage that their headers do not show.

        Raises:
            DataError: If the row or a medium is not acceptable.
        """
        source, row, policy = self._locate(index)
        conversation = source.conversation(row)
        self.processor.check_media(conversation)
        sizes = [self._look_at(medium, policy, conversation.source, decode) for medium in conversation.media]
        return self.processor.measure(conversation, sizes, **self._options(conversation))

    def policy(self, index: int) -> MediaPolicy:
        """What the media of a row may be."""
        return self._locate(index)[2]

    def place(self, index: int) -> str:
        """``file:line`` of a sample."""
        source, row, _ = self._locate(index)
        return source.place(row)

    def _locate(self, index: int) -> tuple[RowSource, int, MediaPolicy]:
        which = bisect.bisect_right(self._ends, index)
        return self.sources[which], index - (self._ends[which - 1] if which else 0), self.policies[which]

    def _load(self, medium: MediaRef, policy: MediaPolicy, place: str) -> Medium:
        if isinstance(medium, ImageRef):
            return load_image(medium.ref, policy, place)
        if isinstance(medium, AudioRef):
            assert self.processor.sound_geometry is not None, "check_media has refused sounds without settings"
            return load_audio(medium.ref, policy, place, self.processor.sound_geometry.sampling_rate)[0]
        return load_video(medium.ref, policy, place, frames_fps=medium.fps, choose=self._choice(medium))

    def _look_at(self, medium: MediaRef, policy: MediaPolicy, place: str, decode: bool) -> MediumSize:
        if isinstance(medium, ImageRef):
            return verify_image(medium.ref, policy, place, decode)
        if decode:
            self._load(medium, policy, place)
        if isinstance(medium, AudioRef):
            return audio_info(medium.ref, policy, place)
        return video_info(medium.ref, policy, place, medium.fps, self._choice(medium))

    def _choice(self, video: VideoRef) -> Callable[[int, float | None], list[int]]:
        return partial(self.processor.choose_frames, fps=video.sampling_fps)

    def _options(self, conversation: Conversation) -> dict[str, Any]:
        answer = self.answer and conversation.turns[-1].role != "assistant"
        options = {"answer": answer, "template_kwargs": self.template_kwargs, "limit": self.image_limit}
        return {**options, "max_text": self.max_text}

    def _checked(self, lengths: LengthTable | None) -> LengthTable | None:
        if lengths is not None and len(lengths) != len(self):
            raise ValueError(f"lengths of {len(lengths)} samples were given for {len(self)} samples")
        return lengths

    def _check_length(self, sample: Sample, index: int, conversation: Conversation) -> None:
        tokens, patches = len(sample), sample.num_patches
        if self.lengths is not None:
            expected_tokens, expected_patches = int(self.lengths.tokens[index]), int(self.lengths.patches[index])
            if (tokens, patches) != (expected_tokens, expected_patches):
                path = self.lengths.path
                raise StoppingError(
                    sample.source,
                    f"the sample has {tokens} tokens and {patches} vision patches, expected {expected_tokens} and "
                    f"{expected_patches} as it was measured (a medium or the row has changed since)",
                    f"delete {str(path)!r} and start again" if path else "measure the samples again",
                    "changed since it was measured",
                )
        if self.max_tokens is not None and len(sample) > self.max_tokens:
            raise StoppingError(
                sample.source,
                f"the sample has {len(sample)} tokens {_counted(conversation)}, expected at most max_tokens = "
                f"{self.max_tokens}",
                f"raise max_tokens, {ways_to_shorten(conversation)}or shorten the row",
                "too long",
            )
        if self.limit is not None and not self.limit.holds(tokens, patches):
            raise StoppingError(
                sample.source,
                f"the sample has {tokens} tokens and {patches} vision patches {_counted(conversation)}, expected "
                f"at most {self.limit}",
                f"raise the limit, {ways_to_shorten(conversation)}set overlong to drop, or shorten the row",
                "too long",
            )


def _counted(conversation: Conversation) -> str:
    counts = {name: len(getattr(conversation, f"{name}s")) for name in ("image", "video", "sound")}
    return "with " + (", ".join(f"{count} {name}(s)" for name, count in counts.items() if count) or "no media")


def _root(folder: str) -> Path | str:
    return folder if is_url(folder) else Path(folder)
