"""The vision tower: transformers' RADIO over the patches of any mix of images, or of a video's tubelets.

transformers attends to one image after the other unless its own FlashAttention integration is installed; ours takes
PyTorch's varlen kernel where there is one. transformers embeds tubelets of one size only; ours are packed like images.
And ours can take a long video in several passes, so that its peak memory is that of one. A pass begins with pixels,
which as float32 are many times what came, and ends behind the projector, whose hidden layer is wider than the tower.
What is computed is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import RadioConfig, RadioModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.radio.modeling_radio import RadioAttention, RadioModelOutput

from lightning_vlm.ops.attention import ATTENTION, use_document_attention
from lightning_vlm.ops.pixels import normalize_patches
from lightning_vlm.segments import Documents, documents_from_lengths

Grids = list[tuple[int, int]]
Project = Callable[[Tensor, Grids], Tensor]


class PixelNorm(nn.Module):
    """Normalises uint8 patches on the device they are on; patches that are already floats pass through.

    The numbers stay Python's: buffers would be rounded with the model to bfloat16, a bias on every pixel.

    Args:
        mean: Per-channel mean.
        std: Per-channel standard deviation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, pixel_values: Tensor, frames: int = 1) -> Tensor:
        """``(num_patches, frames * 3 * patch_size**2)`` uint8 pixels or normalised floats -> normalised floats."""
        if pixel_values.is_floating_point():
            return pixel_values
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=pixel_values.device)
        return normalize_patches(pixel_values, mean, std, frames)


class PackedRadioAttention(RadioAttention):
    """transformers' attention; instances of it become ours by their class, which adds no state."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within each image.

        Args:
            hidden_states: ``(1, T, D)``, images one after another.
            attention_mask: As in transformers.
            cu_seqlens: ``(num_images + 1,)``; ``None`` for a single image.
            documents: The same boundaries.
            **kwargs: As in transformers.
        """
        if self.config._attn_implementation != ATTENTION or cu_seqlens is None or documents is None:
            return super().forward(hidden_states, attention_mask, cu_seqlens, **kwargs)
        return super().forward(hidden_states, attention_mask, None, documents=documents, **kwargs)


class PackedRadioModel(RadioModel):
    """transformers' tower; an instance of it becomes ours by its class.

    Attributes:
        micro_batch: Most frames of one pass through the tower and what follows it; all at once when ``None``. A frame
            is an image, a tile, or one of the frames of a tubelet; a tubelet is never divided.
    """

    micro_batch: int | None = None

    def forward(
        self, pixel_values: Tensor, image_grid_hw: Tensor | Grids, project: Project | None = None
    ) -> RadioModelOutput:
        """Patch features of images, or of the tubelets of videos.

        Args:
            pixel_values: ``(num_patches, patch_dim)`` of images or ``(num_patches, video_patch_dim)`` of tubelets, one
                grid after another; uint8 pixels or normalised floats.
            image_grid_hw: (rows, columns) of each image or tubelet.
            project: What follows the tower: takes the features of a pass and its grids. Run here, it needs the memory
                of one pass; so its result must not depend on how the grids are divided.

        Returns:
            ``features`` ``(num_patches, hidden_size)``, without the tower's own prefix tokens, or what ``project``
            makes of them; nothing else.

        Raises:
            ValueError: If the patches are neither an image's nor a tubelet's, or ``micro_batch`` is set and the tower's
                layers are shards of their own.
        """
        grids = image_grid_hw.tolist() if isinstance(image_grid_hw, Tensor) else image_grid_hw
        grids = [(rows, columns) for rows, columns in grids]
        frames = self.frames_of(pixel_values)
        if self.micro_batch is not None and self._gathers_layers:
            raise ValueError(
                f"vision_micro_batch is {self.micro_batch} and the layers of the vision tower are sharded one by one: "
                "a rank with a longer video would gather them more often than the others, and wait for them forever; "
                "leave vision_micro_batch out, or shard the tower as one unit"
            )
        size = len(grids) if self.micro_batch is None else max(1, self.micro_batch // frames)
        parts = [grids[start : start + size] for start in range(0, len(grids), size)]
        pieces = pixel_values.split([sum(rows * columns for rows, columns in part) for part in parts])
        # What layers keep for their own recomputation would grow with the video; a whole pass keeps its result.
        recomputes = len(parts) > 1 and self._recomputes

        def run(function: Callable[..., Tensor], *given: Any) -> Tensor:
            return checkpoint(function, *given, use_reentrant=False) if recomputes else function(*given)

        results = []
        for piece, part in zip(pieces, parts):
            features = run(self._encode, piece, part)
            # On its own, so that the projector after a frozen tower is recomputed without the tower.
            results.append(features if project is None else run(project, features, part))
        return RadioModelOutput(features=torch.cat(results))

    @property
    def _recomputes(self) -> bool:
        layers: Any = self.encoder.layer  # a frozen tower is in eval mode, and what follows it is trained all the same
        return torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in layers)

    @property
    def _gathers_layers(self) -> bool:
        return any(isinstance(module, FSDPModule) for module in self.encoder.modules())

    def frames_of(self, patches: Tensor) -> int:
        """How many frames each patch holds.

        Args:
            patches: ``(num_patches, width)``.

        Raises:
            ValueError: If they are neither an image's nor a tubelet's.
        """
        width, config = patches.shape[-1], self.config
        if width == config.patch_dim:
            return 1
        if width == config.video_patch_dim:
            return config.video_temporal_patch_size
        tubelet = "" if config.video_patch_dim is None else f" or {config.video_patch_dim} (a tubelet's)"
        raise ValueError(
            f"patches have {width} values; expected {config.patch_dim} (an image's){tubelet}: use the processor that "
            "belongs to the model"
        )

    def _encode(self, patches: Tensor, grids: Grids) -> Tensor:
        embeddings, prefix = self.embeddings, self.config.num_summary_tokens
        frames = self.frames_of(patches)
        project = embeddings.patch_projection if frames == 1 else embeddings.video_patch_projection
        embedded = project(self.input_conditioner(patches, frames).to(self.dtype))
        places = {grid: embeddings._interpolate_position_embedding(grid, embedded.dtype)[0] for grid in set(grids)}
        row = []
        for grid, image in zip(grids, embedded.split([rows * columns for rows, columns in grids])):
            row += [embeddings.cls_register_token, image + places[grid]]
        documents = documents_from_lengths([rows * columns + prefix for rows, columns in grids], patches.device)
        alone = len(grids) == 1  # a plain dense sequence needs no boundaries
        encoded = self.encoder(
            torch.cat(row)[None], cu_seqlens=None if alone else documents.cu_seqlens, documents=documents
        ).last_hidden_state[0]
        images = encoded.split(list(documents.lengths))
        return torch.cat([image[prefix:] for image in images])


# The released key names are looked up by class: ours has transformers' own.
register_checkpoint_conversion_mapping(
    PackedRadioModel.__name__, get_checkpoint_conversion_mapping(RadioConfig.model_type), overwrite=True
)


def make_vision_model(
    config: RadioConfig, norm_mean: Sequence[float] | None = None, norm_std: Sequence[float] | None = None
) -> PackedRadioModel:
    """A RADIO tower that takes patches which are already cut.

    Args:
        config: The tower's.
        norm_mean: Per-channel mean of pixels; the tower's own by default.
        norm_std: Per-channel standard deviation of pixels; the tower's own by default.
    """
    model = RadioModel(config)
    model.input_conditioner = PixelNorm(norm_mean or config.norm_mean, norm_std or config.norm_std)
    for module in model.modules():
        if type(module) is RadioAttention:
            module.__class__ = PackedRadioAttention
    model.__class__ = PackedRadioModel
    use_document_attention(model.config)
    return model
