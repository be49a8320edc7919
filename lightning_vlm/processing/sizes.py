"""How large a sample is, and how large it may be: numbers alone, so that a plan is made before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampleSize:
    """The size of the Sample that a row becomes.

    Attributes:
        tokens: Length of ``input_ids``.
        patches: Vision patches of its images and videos.
        images: Number of images; in static mode one image has several tiles.
        videos: Number of videos.
        sounds: Number of sounds; one sound may have several clips.
        scaled: Whether it was made smaller to fit a limit: its images, or its text.
        repaired: Whether its reader changed the row to make sense of it, see `Conversation.notes`.
    """

    tokens: int
    patches: int
    images: int
    videos: int = 0
    sounds: int = 0
    scaled: bool = False
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class SampleLimit:
    """The most that one sample may be.

    Attributes:
        tokens: Most tokens.
        patches: Most vision patches; unbounded when ``None``.

    Raises:
        ValueError: If a number is less than 1.
    """

    tokens: int
    patches: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("patches", self.patches)):
            if value is not None and value < 1:
                raise ValueError(f"the limit of a sample is {value} {name}; expected at least 1")

    def __str__(self) -> str:
        patches = "" if self.patches is None else f" and {self.patches:,} vision patches"
        return f"{self.tokens:,} tokens{patches}"

    def holds(self, tokens: int, patches: int) -> bool:
        """Whether a sample of this size is within the limit."""
        return tokens <= self.tokens and (self.patches is None or patches <= self.patches)

    def image_patches(self, other_tokens: int, merge_size: int, other_patches: int = 0) -> int:
        """Patches that are left for all images of a sample.

        Args:
            other_tokens: Tokens of the sample that are no image placeholders; may leave nothing or less.
            merge_size: See `ImageGeometry`.
            other_patches: Patches of its videos.
        """
        by_tokens = (self.tokens - other_tokens) * merge_size**2
        return by_tokens if self.patches is None else min(by_tokens, self.patches - other_patches)
