"""Features of media into the text: each placeholder token receives one feature, in reading order.

A mismatch is an error that names both numbers and the row, never a warning: a truncated or shifted feature
would train every following image on the wrong picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, pairwise

import torch
from torch import Tensor

from lightning_vlm.schema import DataError
from lightning_vlm.segments import Documents


class FusionError(ValueError):
    """Placeholders and features do not match.

    Attributes:
        row: Row of the batch that is wrong, or ``None`` if it cannot be told.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row

    def named(self, sources: Sequence[str]) -> DataError | FusionError:
        """This error with the sample that it is about, where that can be told.

        Args:
            sources: Of the batch's rows, or of the documents of a packed row.
        """
        if self.row is None or self.row >= len(sources):
            return self
        return DataError(sources[self.row], str(self), "use the processor that belongs to the model")


def fuse(
    inputs_embeds: Tensor,
    features: Tensor,
    is_placeholder: Tensor,
    tokens_per_image: list[int],
    num_images: list[int] | None = None,
    documents: Documents | None = None,
    kind: str = "image",
) -> Tensor:
    """Writes features over the embeddings of placeholder tokens.

    Args:
        inputs_embeds: ``(B, T, D)``.
        features: ``(num_features, D)``, images in reading order over the rows of the batch.
        is_placeholder: ``(B, T)`` bool.
        tokens_per_image: Features of each image, summing to ``num_features``.
        num_images: Images of each row (of each document of a packed row), where known: then every one is checked
            against its own images.
        documents: Boundaries, if the batch is one packed row.
        kind: ``image``, ``video`` or ``sound``, for the error.

    Returns:
        ``(B, T, D)``; the input is not changed.

    Raises:
        FusionError: If a row's or document's placeholders are not the features of its images.
    """
    found, what = placeholders_per_row(is_placeholder, documents), "row" if documents is None else "document"
    if num_images is None:
        images_per_row(found, tokens_per_image, what, kind)
    else:
        check_rows(found, tokens_per_image, num_images, what, kind)
    mask = is_placeholder.unsqueeze(-1).expand_as(inputs_embeds)
    return inputs_embeds.masked_scatter(mask, features.to(inputs_embeds.dtype))


def placeholders_per_row(is_placeholder: Tensor, documents: Documents | None = None) -> list[int]:
    """Placeholders of each row, or of each document of a packed row.

    Args:
        is_placeholder: ``(B, T)`` bool.
        documents: Boundaries, if the batch is one packed row.
    """
    if documents is None:
        return is_placeholder.sum(-1).tolist()
    counts = torch.zeros(len(documents.lengths), dtype=torch.int64, device=is_placeholder.device)
    return counts.index_add_(0, documents.seq_idx, is_placeholder[0].long()).tolist()


def images_per_row(
    placeholders: list[int], tokens_per_image: list[int], what: str = "row", kind: str = "image"
) -> list[int]:
    """How many images each row has: as many of the next ones as its placeholders hold.

    Equal totals are not enough: a row with one placeholder too few and a next row with one too many would
    shift every feature between them.

    Args:
        placeholders: Of each row.
        tokens_per_image: Features of each image in reading order.
        what: ``row`` or ``document``, for the error.
        kind: As for `fuse`.

    Returns:
        One number per row.

    Raises:
        FusionError: If a row's placeholders do not end with an image, or images are left over.
    """
    image_ends = {end: index for index, end in enumerate(accumulate(tokens_per_image, initial=0))}
    ends = [0, *accumulate(placeholders)]
    for row, end in enumerate(ends[1:]):
        if end not in image_ends:
            raise _mismatch(placeholders, tokens_per_image, row, what, kind)
    if image_ends[ends[-1]] < len(tokens_per_image):
        raise _mismatch(placeholders, tokens_per_image, None, what, kind)
    return [image_ends[end] - image_ends[start] for start, end in pairwise(ends)]


def check_rows(
    placeholders: list[int], tokens_per_image: list[int], num_images: list[int], what: str = "row", kind: str = "image"
) -> None:
    """Checks each row's placeholders against its own images.

    Args:
        placeholders: Of each row.
        tokens_per_image: Features of each image in reading order.
        num_images: Images of each row.
        what: ``row`` or ``document``, for the error.
        kind: As for `fuse`.

    Raises:
        FusionError: If a row's placeholders are more or fewer than its images' features, or the rows have not as many
            images as there are.
    """
    if len(num_images) != len(placeholders) or sum(num_images) != len(tokens_per_image):
        raise FusionError(
            f"the batch has {len(placeholders)} {what}(s) and {len(tokens_per_image)} {kind}(s), but their numbers per "
            f"{what} tell of {sum(num_images)} in {len(num_images)}; take both from one call of the processor"
        )
    remaining = iter(tokens_per_image)
    for row, (found, count) in enumerate(zip(placeholders, num_images, strict=True)):
        tokens = list(islice(remaining, count))
        if found != sum(tokens):
            raise FusionError(
                f"{what} {row} has {found} {kind} placeholder tokens for {sum(tokens)} features of its {count} "
                f"{kind}(s); {_fix(kind)}",
                row,
            )


def refuse_placeholders(placeholders: list[int], what: str = "row", kind: str = "image") -> None:
    """For a batch without any image, video or sound.

    Args:
        placeholders: Of each row.
        what: ``row`` or ``document``, for the error.
        kind: As for `fuse`.

    Raises:
        FusionError: If there is a placeholder all the same.
    """
    for row, found in enumerate(placeholders):
        if found:
            raise FusionError(f"{what} {row} has {found} {kind} placeholder tokens and no {kind} was given", row)


def _fix(kind: str) -> str:
    article = "an" if kind == "image" else "a"
    return f"prepare text and {kind}s with one processor, and cut no text inside {article} {kind}"


def _mismatch(per_row: list[int], tokens_per_image: list[int], row: int | None, what: str, kind: str) -> FusionError:
    where = "the batch" if row is None else f"{what} {row}"
    found = sum(per_row) if row is None else per_row[row]
    sizes = ", ".join(map(str, tokens_per_image[:8])) + (", ..." if len(tokens_per_image) > 8 else "")
    return FusionError(
        f"{where} has {found} {kind} placeholder tokens that do not match the {kind}s: the batch has "
        f"{sum(per_row)} placeholders and {sum(tokens_per_image)} features of "
        f"{len(tokens_per_image)} {kind}(s) ({sizes}); {_fix(kind)}",
        row,
    )
