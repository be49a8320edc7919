"""Parameters that no medium of a step reaches are left alone by it.

Ranks without images, videos or sounds bring zero gradients (`models.absent_media`), and to an optimizer zero is a
gradient like any other: weight decay and momentum would move a sound tower through a training without sounds. Here the
gradients of what nothing reached on any rank are taken away, as they would never have been in one process.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import distributed as dist
from torch import nn

from lightning_vlm.models.media import KINDS
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.schema import VLMBatch


class ReachedMedia:
    """Which kinds of media an optimizer step has seen.

    Attributes:
        unreached: ``id`` of the parameters that the last step left alone, the same ones on every rank.
    """

    def __init__(self) -> None:
        self.unreached: frozenset[int] = frozenset()
        self._seen = [False] * len(KINDS)

    def add(self, batch: VLMBatch) -> None:
        """Takes note of a micro-batch.

        Args:
            batch: The batch.
        """
        given = (batch.pixel_values, batch.pixel_values_videos, batch.input_features)
        self._seen = [seen or media is not None for seen, media in zip(self._seen, given)]

    def leave_unreached_alone(self, model: NemotronVL, device: torch.device) -> None:
        """Takes the gradients of unreached parameters away, and begins the next step.

        Args:
            model: The model, after the backward pass of the step's last micro-batch.
            device: Where ranks compare.
        """
        seen = torch.tensor(self._seen, dtype=torch.float32, device=device)
        self._seen = [False] * len(KINDS)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        image, video, sound = (bool(value) for value in seen.tolist())
        alone = list(_unreached(model, image, video, sound))
        for parameter in alone:
            parameter.grad = None
        self.unreached = frozenset(map(id, alone))


def _unreached(model: NemotronVL, image: bool, video: bool, sound: bool) -> Iterator[nn.Parameter]:
    if model.vision_model is None:  # a later stage of a pipeline has no part that media reach
        return
    embeddings = model.vision_model.embeddings
    if not (image or video):
        yield from model.vision_model.parameters()
        yield from model.multi_modal_projector.parameters()
    elif embeddings.video_patch_projection is not None:  # without one, videos are images to the tower
        if not image:
            yield from embeddings.patch_projection.parameters()
        if not video:
            yield from embeddings.video_patch_projection.parameters()
    if not sound and model.audio_tower is not None and model.embed_audio is not None:
        yield from model.audio_tower.parameters()
        yield from model.embed_audio.parameters()
