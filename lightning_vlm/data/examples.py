"""Rows for processors of other families: plain dicts with their media loaded, and batches of whatever keys they have.

Our own processor makes Samples; every other one is fed by a collate function (`automodel.collate_choice`), which takes
examples ``{"conversation": [{"role", "content": [parts]}]}`` and gives a dict. Lengths are not known before that, so
such data is neither packed nor planned by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.media.audio import audio_info, load_audio
from lightning_vlm.media.load import load_image, verify_image
from lightning_vlm.media.policy import MediaPolicy
from lightning_vlm.media.video import load_video, video_info
from lightning_vlm.processing.sizes import SampleSize
from lightning_vlm.schema import IGNORE_INDEX, AudioRef, Conversation, DataError, ImageRef, MediaRef, Text, VideoRef

VIDEO_FPS = 2.0
"""Frames per second that are taken of a video: what Qwen's processors were trained with."""

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
        """How many images a row holds, after a look at all of its media; the length is not known.

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
                video_info(medium.ref, policy, conversation.source)
        return SampleSize(0, 0, len(conversation.images), repaired=bool(conversation.notes))


class ExampleBatch(dict[str, Any]):
    """What a collate function returned, with what the loader has to say of it.

    Attributes:
        num_label_tokens: Labels other than -100.
        step_label_tokens: The same in all micro-batches of this rank's optimizer step; the loader fills it in.
        indices: Numbers of its samples; the loader fills them in.
        skipped: Bad samples that are not in it: the number of each, and what is wrong.
    """

    def __init__(self, batch: dict[str, Any]) -> None:
        super().__init__(batch)
        labels = self.get("labels")
        self.num_label_tokens = int((labels != IGNORE_INDEX).sum()) if isinstance(labels, Tensor) else 0
        self.step_label_tokens = 0
        self.indices: Tensor | None = None
        self.skipped: list[tuple[int, DataError]] = []

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
    """

    def __init__(self, function: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.function = function

    def __call__(self, examples: Sequence[dict[str, Any]], counted: bool = True) -> ExampleBatch:
        """Makes a batch.

        Args:
            examples: At least one.
            counted: False for a stand-in: its labels are removed.
        """
        batch = dict(self.function(list(examples)))
        if not counted and isinstance(batch.get("labels"), Tensor):
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return ExampleBatch(batch)


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
        return "video", list(load_video(medium.ref, policy, source, fps=VIDEO_FPS).frames)
    samples, rate = load_audio(medium.ref, policy, source, AUDIO_RATE_HZ)
    return "audio", (samples.numpy(), rate)
