"""Pixel shuffle and the MLP projector: 2 x 2 patch features become one language-model token.

RMSNorm -> Linear -> relu^2 -> Linear without biases, the ``mlp1`` of the released checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

PROJECTOR_NORM_EPS = 1e-5


def pixel_shuffle(features: Tensor, merge_size: int, version: str = "v2") -> Tensor:
    """Merges each ``merge_size`` x ``merge_size`` block of patches into one token.

    In ``v2`` token (Y, X) is row-major over the merged grid and its channels are the block's patches, row by
    row, concatenated. ``v1`` (early InternVL) leaves out the last transpose: the same tokens in column-major
    order.

    Args:
        features: ``(rows, columns, C)`` of one image.
        merge_size: Patches per side; divides rows and columns.
        version: ``v2`` or ``v1``.

    Returns:
        ``(rows * columns / merge_size**2, C * merge_size**2)``.
    """
    rows, columns, channels = features.shape
    merged = features.reshape(rows // merge_size, merge_size, columns // merge_size, merge_size, channels)
    order = (0, 2, 1, 3, 4) if version == "v2" else (2, 0, 1, 3, 4)
    return merged.permute(order).reshape(-1, channels * merge_size**2)


class MultiModalProjector(nn.Module):
    """Projects shuffled vision features into the language model's space.

    Args:
        input_size: Width of a shuffled feature (vision width times ``merge_size**2``).
        hidden_size: Width of the hidden layer.
        output_size: Width of the language model.
        bias: Whether the linear layers have one; those of the released models have none.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.layer_norm = NemotronHRMSNorm(input_size, eps=PROJECTOR_NORM_EPS)
        self.linear_1 = nn.Linear(input_size, hidden_size, bias=bias)
        self.act = ACT2FN["relu2"]
        self.linear_2 = nn.Linear(hidden_size, output_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Projects ``(num_tokens, input_size)`` to ``(num_tokens, output_size)``."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(features))))


def shuffle_images(features: Tensor, grids: list[tuple[int, int]], merge_size: int, version: str) -> Tensor:
    """Pixel-shuffles the packed features of several images.

    Args:
        features: ``(num_patches, C)``, images concatenated.
        grids: (rows, columns) of each image.
        merge_size: As for `pixel_shuffle`.
        version: As for `pixel_shuffle`.

    Returns:
        ``(num_tokens, C * merge_size**2)``.
    """
    images = features.split([rows * columns for rows, columns in grids])
    return torch.cat(
        [
            pixel_shuffle(image.view(rows, columns, -1), merge_size, version)
            for image, (rows, columns) in zip(images, grids, strict=True)
        ]
    )
