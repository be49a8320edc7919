"""Image features into the text: each placeholder token receives one feature, in reading order.

A mismatch is an error that names both numbers and the row, never a warning: a truncated or shifted feature would train
every following image on the wrong picture.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FusionError(ValueError):
    """Placeholders and features do not match.

    Attributes:
        row: Row of the batch that is wrong, or ``None`` if it cannot be told.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def fuse(inputs_embeds: Tensor, features: Tensor, is_placeholder: Tensor, tokens_per_image: list[int]) -> Tensor:
    """Writes features over the embeddings of placeholder tokens.

    Args:
        inputs_embeds: ``(B, T, D)``.
        features: ``(num_features, D)``, images in reading order over the rows of the batch.
        is_placeholder: ``(B, T)`` bool.
        tokens_per_image: Features of each image, summing to ``num_features``.

    Returns:
        ``(B, T, D)``; the input is not changed.

    Raises:
        FusionError: If the number of placeholders is not the number of features.
    """
    if int(is_placeholder.sum()) != features.shape[0]:
        raise _mismatch(is_placeholder, tokens_per_image)
    mask = is_placeholder.unsqueeze(-1).expand_as(inputs_embeds)
    return inputs_embeds.masked_scatter(mask, features.to(inputs_embeds.dtype))


def _mismatch(is_placeholder: Tensor, tokens_per_image: list[int]) -> FusionError:
    per_row = is_placeholder.sum(-1).tolist()
    row = first_wrong_row(per_row, tokens_per_image)
    where = "the batch" if row is None else f"row {row}"
    found = sum(per_row) if row is None else per_row[row]
    return FusionError(
        f"{where} has {found} image placeholder tokens that do not match the images: the batch has {sum(per_row)} "
        f"placeholders and {sum(tokens_per_image)} features of {len(tokens_per_image)} image(s) "
        f"({', '.join(map(str, tokens_per_image[:8]))}{', ...' if len(tokens_per_image) > 8 else ''}); "
        "prepare text and images with one processor, and cut no text inside an image",
        row,
    )


def first_wrong_row(placeholders_per_row: list[int], tokens_per_image: list[int]) -> int | None:
    """The first row whose placeholders are not a whole number of the next images.

    Args:
        placeholders_per_row: Placeholder tokens of each row.
        tokens_per_image: Features of each image in reading order.

    Returns:
        The row; ``None`` if every row closes and images are left over.
    """
    ends = torch.tensor([0, *tokens_per_image]).cumsum(0).tolist()
    total = 0
    for row, placeholders in enumerate(placeholders_per_row):
        total += placeholders
        if total not in ends:
            return row
    return None
