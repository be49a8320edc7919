"""A rendered text and the sizes of its media -> the grids of its images, and the text with all media written out.

Images share what the context leaves them, and a limit if there is one, so their grids depend on how long the rest is;
and the rest is tokenised only where that can matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning_vlm.geometry.images import ImageGeometry, ImageLayout, lay_out_images
from lightning_vlm.processing.chat import Span
from lightning_vlm.processing.media_layout import MediaSizes
from lightning_vlm.processing.pieces import MediaTokens, Piece, PieceExpander, piece_ids
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.schema import DataError

_MARKERS = 16  # more tokens than any medium has around its features, besides labels


class SampleLayouter:
    """Lays texts out.

    Args:
        tokenizer: A fast tokenizer.
        tokens: The tokens around and in place of media.
        image_token_id: Id of the placeholder of images.
    """

    def __init__(self, tokenizer: Any, tokens: MediaTokens, image_token_id: int) -> None:
        self.tokenizer, self.tokens, self.image_token_id = tokenizer, tokens, image_token_id
        self.expander = PieceExpander(tokenizer, tokens)

    def lay_out(
        self,
        spans: Sequence[Span],
        sizes: MediaSizes,
        geometry: ImageGeometry,
        source: str,
        limit: SampleLimit | None = None,
    ) -> tuple[ImageLayout, list[Piece]]:
        """Grids of the images, and the text with all media written out.

        Args:
            spans: The text.
            sizes: Its media.
            geometry: Of images.
            source: Names the text in errors.
            limit: Images are made smaller where the sample would exceed it.
        """
        layout = lay_out_images(sizes.images, geometry)
        most = self._most_other_tokens(spans, sizes)
        if most is None or bounded_layout(sizes, geometry, most, limit).scaled:
            layout = bounded_layout(sizes, geometry, self.num_other_tokens(spans, sizes, geometry, source), limit)
        return layout, self.expander.expand(spans, layout.num_tokens, sizes.videos, sizes.sounds)

    def num_other_tokens(self, spans: Sequence[Span], sizes: MediaSizes, geometry: ImageGeometry, source: str) -> int:
        """Tokens of a text but its image placeholders: the start and end of each image are included.

        A placeholder that the tokenizer cuts out before anything else sees the text leaves the same text on both
        sides of a run of any length: a run of one is tokenised in place of thousands.

        Args:
            spans: The text.
            sizes: Its media.
            geometry: Of images.
            source: Names the text in errors.
        """
        shortened = self._cuts_out_placeholders
        counts = [1] * len(sizes.images) if shortened else lay_out_images(sizes.images, geometry).num_tokens
        ids = piece_ids(self.tokenizer, self.expander.expand(spans, counts, sizes.videos, sizes.sounds))
        check_placeholders(ids.count(self.image_token_id), sum(counts), source)
        return len(ids) - sum(counts)

    def _most_other_tokens(self, spans: Sequence[Span], sizes: MediaSizes) -> int | None:
        """At least `num_other_tokens`, without tokenising anything; ``None`` where that cannot be told.

        No token of a byte-level tokenizer is shorter than a byte, unless it rewrites the text first.
        """
        if getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None) is not None:
            return None
        text = sum(len(span.text.encode()) for span in spans) + _MARKERS * (1 + len(sizes.images))
        labels = sum(len(label) + _MARKERS for video in sizes.videos for label in video.labels)
        features = [video.num_tokens for video in sizes.videos] + [sound.num_tokens for sound in sizes.sounds]
        return text + labels + sum(count + _MARKERS for count in features)

    @cached_property  # a released tokenizer has a thousand added tokens
    def _cuts_out_placeholders(self) -> bool:
        added = self.tokenizer.added_tokens_decoder
        token = added.get(self.image_token_id)
        image = self.tokens.image
        longer = any(image in other.content and other != token for other in added.values())
        return token is not None and not token.normalized and not longer


def bounded_layout(
    sizes: MediaSizes, geometry: ImageGeometry, other_tokens: int, limit: SampleLimit | None
) -> ImageLayout:
    """Grids of images that share a context, and a limit if there is one, with everything else.

    Args:
        sizes: The media.
        geometry: Of images.
        other_tokens: Tokens of everything else, the start and end of each image included.
        limit: The most that the sample may be.
    """
    bounds = [] if limit is None else [limit.image_patches(other_tokens, geometry.merge_size, sizes.video_patches)]
    if geometry.mode == "dynamic":  # serving counts the text without the start and end of each image
        bounds.append(geometry.context_patches(len(sizes.images), other_tokens - 2 * len(sizes.images)))
    return lay_out_images(sizes.images, geometry, min(bounds, default=None))


def check_placeholders(found: int, expected: int, source: str) -> None:
    """Checks that a tokenizer kept every placeholder of an image.

    Args:
        found: In the tokenised text.
        expected: In the text.
        source: Names the text.

    Raises:
        DataError: If it did not.
    """
    if found != expected:
        raise DataError(
            source,
            f"{found} image placeholders were tokenised, expected {expected}",
            "use the tokenizer that belongs to the model",
        )
