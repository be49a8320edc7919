"""Index -> Sample: reads a row, loads its images, encodes it. Runs in the loader's workers.

Nothing is cached or changed in place, so a worker's memory does not grow with what it has seen.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_vlm.data.sources import JsonlSource
from lightning_vlm.media.load import MediaPolicy, load_image
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import DataError, Sample


class SampleDataset:
    """All rows of several sources as Samples.

    Args:
        sources: The files, in order.
        processor: Encodes conversations.
        policy: What media may be read; its ``media_root`` is replaced by each file's folder when it is ``None`` there.
        media_root: Folder that image paths start from; each file's own folder when ``None``.
        max_tokens: Longest sample, in tokens; longer ones are an error, never cut.
        answer: Samples end with a generation prompt instead of the row's last assistant turn.
        template_kwargs: Extra chat-template variables.
    """

    def __init__(
        self,
        sources: Sequence[JsonlSource],
        processor: NemotronVLProcessor,
        policy: MediaPolicy,
        media_root: Path | None = None,
        max_tokens: int | None = None,
        answer: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.sources = list(sources)
        self.processor = processor
        self.max_tokens = max_tokens
        self.answer = answer
        self.template_kwargs = template_kwargs
        self._policies = [replace(policy, media_root=media_root or source.path.parent) for source in self.sources]
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Encodes one row.

        Raises:
            DataError: If the row, an image, or the sample's length is not acceptable.
        """
        which = bisect.bisect_right(self._ends, index)
        source, policy = self.sources[which], self._policies[which]
        conversation = source.conversation(index - (self._ends[which - 1] if which else 0))
        images = [load_image(image.ref, policy, conversation.source) for image in conversation.images]
        answer = self.answer and conversation.turns[-1].role != "assistant"
        sample = self.processor.encode(conversation, images, answer=answer, template_kwargs=self.template_kwargs)
        if self.max_tokens is not None and len(sample) > self.max_tokens:
            raise DataError(
                conversation.source,
                f"the sample has {len(sample)} tokens with {len(images)} image(s), expected at most max_tokens = "
                f"{self.max_tokens}",
                "raise max_tokens, lower the processor's max_num_patches, or shorten the row",
            )
        return sample
