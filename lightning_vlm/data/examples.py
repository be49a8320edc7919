"""Rows for processors of other families: plain dicts with their media loaded, and batches of whatever keys they have.

Our own processor makes Samples; every other one is fed by a collate function (`automodel.collate_choice`), which takes
examples ``{"conversation": [{"role", "content": [parts]}]}`` and gives a dict. Lengths are not known before that, so
such data is neither packed nor planned by length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.media.audio import audio_info, load_audio
from lightning_vlm.media.load import load_image, verify_image
from lightning_vlm.media.policy import MediaPolicy
from lightning_vlm.media.video import load_video, sample_frames, video_info
from lightning_vlm.processing.sizes import SampleSize
from lightning_vlm.schema import IGNORE_INDEX, AudioRef, Conversation, DataError, ImageRef, MediaRef, Text, VideoRef

VIDEO_FPS = 2.0
"""Frames per second that are taken of a video that asks for no others: what Qwen's processors were trained with."""

AUDIO_RATE_HZ = 16_000


class ExampleDataset(SampleDataset):
    """The same rows as `SampleDataset`, as examples for a collate function."""

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        """Loads one row.

        Raises:
            DataError: If the row or its media are not acceptable.
        """
        return to_example(self.conversation(index), self.policy(index))

    def size(self, index: int, decode: bool = False) -> SampleSize:
        """How many media a row holds, after a look at all of its media; the length is not known.

        Raises:
            DataError: If the row or its media are not acceptable.
        """
        conversation, policy = self.conversation(index), self.policy(index)
        for medium in conversation.media:
            if isinstance(medium, ImageRef):
                verify_image(medium.ref, policy, conversation.source, decode)
            elif decode:
                _load(medium, policy, conversation.source)
            elif isinstance(medium, AudioRef):
                audio_info(medium.ref, policy, conversation.source)
            else:
                video_info(medium.ref, policy, conversation.source, choose=_choice(medium))
        images, videos, sounds = map(len, (conversation.images, conversation.videos, conversation.sounds))
        return SampleSize(0, 0, images, videos, sounds, repaired=bool(conversation.notes))


class ExampleBatch(dict[str, Any]):
    """What a collate function returned, with what the loader has to say of it.

    Args:
        batch: What the function returned.
        without_labels: Examples of it with nothing to learn: the position of each, and the sentence that says so.

    Attributes:
        num_label_tokens: Labels other than -100.
        step_label_tokens: The same in all micro-batches of this rank's optimizer step; the loader fills it in.
        indices: Numbers of its samples; the loader fills them in.
    """

    def __init__(self, batch: dict[str, Any], without_labels: Mapping[int, DataError] | None = None) -> None:
        super().__init__(batch)
        labels = self.get("labels")
        self.num_label_tokens = int((labels != IGNORE_INDEX).sum()) if isinstance(labels, Tensor) else 0
        self.step_label_tokens = 0
        self.indices: Tensor | None = None
        self._left_out: list[tuple[int, DataError]] = []
        self._without_labels = without_labels or {}

    @property
    def skipped(self) -> list[tuple[int, DataError]]:
        """Samples that are not trained on: the number of each, and what is wrong.

        Bad ones, which are not in the batch: the loader sets them. After them those with nothing to learn, which are
        in it and add nothing to its loss.
        """
        if self.indices is None:
            return self._left_out
        numbers = self.indices.tolist()
        return [*self._left_out, *((numbers[row], error) for row, error in self._without_labels.items())]

    @skipped.setter
    def skipped(self, left_out: list[tuple[int, DataError]]) -> None:
        self._left_out = left_out

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Moves every tensor, however deep, in place, and returns the batch (Lightning calls it)."""
        for key, value in self.items():
            self[key] = move_data_to_device(value, torch.device(device))
        return self

    def pin_memory(self) -> Self:
        """Pins every tensor, in place, and returns the batch (the call that a DataLoader makes)."""
        for key, value in self.items():
            self[key] = pin_memory(value)
        return self


class ExampleCollate:
    """A collate function in the place of ours.

    Args:
        function: ``examples -> batch``.
        trains: The batches are trained on: examples with nothing to learn are told (see `_without_labels`).
    """

    def __init__(self, function: Callable[[list[Any]], dict[str, Any]], trains: bool = False) -> None:
        self.function, self.trains = function, trains

    def __call__(self, examples: Sequence[dict[str, Any]], counted: bool = True) -> ExampleBatch:
        """Makes a batch.

        Args:
            examples: At least one.
            counted: False for a stand-in: its labels are removed.
        """
        batch = dict(self.function(list(examples)))
        if not counted and isinstance(batch.get("labels"), Tensor):
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return ExampleBatch(batch, _without_labels(batch, examples) if counted and self.trains else None)


def _without_labels(batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[int, DataError]:
    """Examples that have nothing to learn in a batch, as far as the batch tells, by their position.

    A row of labels is an example where there are as many rows as examples: no function here changes their order. Where
    there are fewer or more (a function that packs several into a row, drops long ones, or makes pairs), no row says
    whose it is: then only a batch without any label tells anything, of all of them.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return {}
    is_empty = (labels == IGNORE_INDEX).all(dim=1)
    if len(labels) != len(examples):
        is_empty = is_empty.all().expand(len(examples))
    return {
        row: DataError(
            examples[row].get("source", f"example {row + 1} of a batch"),
            "none of its tokens is trained on in the batch that the collate function made, expected at least one label "
            f"other than {IGNORE_INDEX}",
            "raise the function's max_length (collate_options) if it cut the answer off, correct the chat template if "
            "it marks none, or remove the row",
            "nothing to learn",
        )
        for row in is_empty.nonzero().flatten().tolist()
    }


def blank_example() -> dict[str, Any]:
    """What stands for a batch of which every sample is bad: a question and an answer without media."""
    turns = [("user", "."), ("assistant", ".")]
    return {"conversation": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}


def to_example(conversation: Conversation, policy: MediaPolicy) -> dict[str, Any]:
    """A conversation as collate functions take it, its media loaded.

    Args:
        conversation: The conversation.
        policy: What its media may be.

    Returns:
        ``conversation``, messages with lists of parts; ``source``; and ``audio``, its sound, where there is just one.

    Raises:
        MediaError: If a medium cannot be loaded.
    """
    sounds: list[Any] = []

    def part(item: Any) -> dict[str, Any]:
        if isinstance(item, Text):
            return {"type": "text", "text": item.text}
        name, medium = _load(item, policy, conversation.source)
        if name == "audio":
            sounds.append(medium)
        return {"type": name, name: medium}

    messages = [{"role": turn.role, "content": [part(item) for item in turn.parts]} for turn in conversation.turns]
    example = {"conversation": messages, "source": conversation.source}
    return {**example, "audio": sounds[0]} if len(sounds) == 1 else example


def _load(medium: MediaRef, policy: MediaPolicy, source: str) -> tuple[str, Any]:
    if isinstance(medium, ImageRef):
        return "image", load_image(medium.ref, policy, source)
    if isinstance(medium, VideoRef):
        return "video", list(load_video(medium.ref, policy, source, choose=_choice(medium)).frames)
    samples, rate = load_audio(medium.ref, policy, source, AUDIO_RATE_HZ)
    return "audio", (samples.numpy(), rate)


def _choice(video: VideoRef) -> Callable[[int, float | None], list[int]]:
    """The rule that its frames are chosen by."""
    return partial(sample_frames, fps=video.sampling_fps or VIDEO_FPS)
