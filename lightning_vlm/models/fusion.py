"""Image features into the text: each placeholder token receives one feature, in reading order.

A mismatch is an error that names both numbers and the row, never a warning: a truncated or shifted feature
would train every following image on the wrong picture.
"""

from __future__ import annotations

from itertools import accumulate, islice, pairwise

from torch import Tensor


class FusionError(ValueError):
    """Placeholders and features do not match.

    Attributes:
        row: Row of the batch that is wrong, or ``None`` if it cannot be told.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def fuse(
    inputs_embeds: Tensor,
    features: Tensor,
    is_placeholder: Tensor,
    tokens_per_image: list[int],
    num_images: list[int] | None = None,
) -> Tensor:
    """Writes features over the embeddings of placeholder tokens.

    Args:
        inputs_embeds: ``(B, T, D)``.
        features: ``(num_features, D)``, images in reading order over the rows of the batch.
        is_placeholder: ``(B, T)`` bool.
        tokens_per_image: Features of each image, summing to ``num_features``.
        num_images: Images of each row, where known: then every row is checked against its own images.

    Returns:
        ``(B, T, D)``; the input is not changed.

    Raises:
        FusionError: If a row's placeholders are not the features of its images.
    """
    if num_images is None:
        images_per_row(is_placeholder, tokens_per_image)
    else:
        check_rows(is_placeholder, tokens_per_image, num_images)
    mask = is_placeholder.unsqueeze(-1).expand_as(inputs_embeds)
    return inputs_embeds.masked_scatter(mask, features.to(inputs_embeds.dtype))


def images_per_row(is_placeholder: Tensor, tokens_per_image: list[int]) -> list[int]:
    """How many images each row has: as many of the next ones as its placeholders hold.

    Equal totals are not enough: a row with one placeholder too few and a next row with one too many would
    shift every feature between them.

    Args:
        is_placeholder: ``(B, T)`` bool.
        tokens_per_image: Features of each image in reading order.

    Returns:
        ``B`` numbers.

    Raises:
        FusionError: If a row's placeholders do not end with an image, or images are left over.
    """
    per_row = is_placeholder.sum(-1).tolist()
    image_ends = {end: index for index, end in enumerate(accumulate(tokens_per_image, initial=0))}
    ends = [0, *accumulate(per_row)]
    for row, end in enumerate(ends[1:]):
        if end not in image_ends:
            raise _mismatch(per_row, tokens_per_image, row)
    if image_ends[ends[-1]] < len(tokens_per_image):
        raise _mismatch(per_row, tokens_per_image, None)
    return [image_ends[end] - image_ends[start] for start, end in pairwise(ends)]


def check_rows(is_placeholder: Tensor, tokens_per_image: list[int], num_images: list[int]) -> None:
    """Checks each row's placeholders against its own images.

    Args:
        is_placeholder: ``(B, T)`` bool.
        tokens_per_image: Features of each image in reading order.
        num_images: Images of each row.

    Raises:
        FusionError: If a row's placeholders are more or fewer than its images' features.
    """
    remaining = iter(tokens_per_image)
    for row, (found, count) in enumerate(zip(is_placeholder.sum(-1).tolist(), num_images, strict=True)):
        tokens = list(islice(remaining, count))
        if found != sum(tokens):
            raise FusionError(
                f"row {row} has {found} image placeholder tokens for {sum(tokens)} features of its {count} image(s); "
                "prepare text and images with one processor, and cut no text inside an image",
                row,
            )


def _mismatch(per_row: list[int], tokens_per_image: list[int], row: int | None) -> FusionError:
    where = "the batch" if row is None else f"row {row}"
    found = sum(per_row) if row is None else per_row[row]
    sizes = ", ".join(map(str, tokens_per_image[:8])) + (", ..." if len(tokens_per_image) > 8 else "")
    return FusionError(
        f"{where} has {found} image placeholder tokens that do not match the images: the batch has "
        f"{sum(per_row)} placeholders and {sum(tokens_per_image)} features of "
        f"{len(tokens_per_image)} image(s) ({sizes}); "
        "prepare text and images with one processor, and cut no text inside an image",
        row,
    )
