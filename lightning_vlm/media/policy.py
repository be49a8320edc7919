"""What a row may point to, and how media that is refused is named: the rules that every loader of this room shares.

A row is untrusted input, so the defaults refuse: nothing outside the media root, no address, nothing larger than the
limits. Whatever is refused is a `MediaError` with the row, what was found and what to change; nothing is replaced
or skipped in this room.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_vlm.schema import DataError, FileSlice

Medium = Literal["image", "video", "audio"]

# What libraries say of a file that is something else altogether, and the kind of error that it is then.
_UNRECOGNISED = {"not an image": "not an image", "not a video": "not a video", "Format not recognised": "not audio"}
_LOCAL_SCHEMES = ("file", "local")  # fsspec reads any file of the machine through them


class MediaError(DataError):
    """An image, video or sound that cannot be found, read, or accepted."""


@dataclass(frozen=True)
class MediaPolicy:
    """What a reference may point to.

    Attributes:
        media_root: Folder that relative paths start from and that no path may leave; or an address of a store that
            fsspec can read (``s3://bucket/images``), which names are joined to.
        max_image_pixels: Most pixels (width x height) of one image or video frame; checked before decoding.
        allow_urls: Whether rows may name addresses: ``True`` for ``http`` and ``https``, or the schemes themselves,
            e.g. ``("https", "s3")``. Those of other than ``http(s)`` are read through fsspec.
        max_video_frames: Most frames that are taken from one video.
        max_audio_s: Longest sound, in seconds; checked before decoding.

    Raises:
        ValueError: If a scheme is none, or is ``file``: that would open every file of the machine to every row.
    """

    media_root: Path | str
    max_image_pixels: int = 64_000_000
    allow_urls: bool | tuple[str, ...] = False
    max_video_frames: int = 512
    max_audio_s: float = 3600.0

    def __post_init__(self) -> None:
        if (found := self.remote_root) and found.partition(":")[0].lower() in _LOCAL_SCHEMES:
            raise ValueError(f"media_root is {found!r}; expected the folder's path: links are followed through file://")
        if isinstance(self.allow_urls, str):  # its letters would pass for schemes
            raise ValueError(f"allow_urls is {self.allow_urls!r}; expected true, false or a list of schemes")
        for scheme in self.schemes:
            if scheme.lower() != scheme or not scheme.isalnum() or scheme in _LOCAL_SCHEMES:
                raise ValueError(f"allow_urls holds {scheme!r}; expected schemes like 'https' or 's3', never 'file'")

    @property
    def schemes(self) -> tuple[str, ...]:
        """Schemes of the addresses that rows may name."""
        if isinstance(self.allow_urls, bool):
            return ("http", "https") if self.allow_urls else ()
        return tuple(self.allow_urls)

    @property
    def remote_root(self) -> str | None:
        """The media root where it is an address, ``None`` where it is a folder."""
        return self.media_root if isinstance(self.media_root, str) and "://" in self.media_root else None

    @cached_property
    def folder(self) -> Path:
        """The media root where it is a folder, absolute and with links resolved when it is first asked for.

        A link that is turned elsewhere afterwards leads outside it.
        """
        return Path(self.media_root).resolve()

    @property
    def root_key(self) -> str:
        """The media root as one text that stays the same however it was written: for fingerprints."""
        return self.remote_root or str(self.folder)


def describe(ref: Any, medium: Medium) -> str:
    """A reference as an error names it, short enough to print.

    Args:
        ref: A `MediaRef.ref`.
        medium: What it is meant to be.
    """
    if isinstance(ref, str):
        return f"{medium} {short(ref)!r}"
    if isinstance(ref, FileSlice):
        return f"{medium} {short(ref.name)!r} in {posixpath.basename(ref.path)}"
    if isinstance(ref, bytes):
        return f"the {medium} of {len(ref):,} bytes"
    if isinstance(ref, Image.Image):
        return f"the {medium} of mode {ref.mode} in memory"
    if isinstance(ref, np.ndarray | Tensor):
        return f"the {medium} array of shape {tuple(ref.shape)}"
    if isinstance(ref, list | tuple):
        return f"the {medium} of {len(ref):,} parts"
    return f"the {medium} given as {type(ref).__name__}"


def short(name: str) -> str:
    """A name without its middle if it is long: a row can hold a whole image as text."""
    return name if len(name) <= 120 else name[:60] + "..." + name[-20:]


def reason(error: BaseException) -> str:
    """Why a library gave up, as one part of a sentence."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    # soundfile's own text begins with the address of an object: its error_string does not.
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    lines = text.splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def undecodable(error: Exception, what: str, medium: Medium, source: str, reader: str) -> MediaError:
    """The error of a file that its decoder gave up on.

    Args:
        error: The decoder's.
        what: As `describe` names it.
        medium: What it was meant to be.
        source: ``file:line`` of the row.
        reader: The library that decodes.
    """
    why = reason(error)
    whole = {"image": "a complete image", "video": "a complete video", "audio": "a complete sound"}[medium]
    return MediaError(
        source,
        f"{what} cannot be decoded ({why}), expected {whole} that {reader} can read",
        "replace the file or remove the row",
        _UNRECOGNISED.get(why, f"damaged {medium}"),
    )


def check_pixels(width: int, height: int, policy: MediaPolicy, what: str, source: str) -> None:
    """Refuses what would take too much memory, before it is decoded.

    Args:
        width: Of an image or of a video's frames.
        height: Likewise.
        policy: Gives the limit.
        what: As `describe` names it.
        source: ``file:line`` of the row.

    Raises:
        MediaError: If there are more pixels than the policy allows.
    """
    if width * height > policy.max_image_pixels:
        raise MediaError(
            source,
            f"{what} has {width} x {height} = {width * height:,} pixels, expected at most "
            f"max_image_pixels = {policy.max_image_pixels:,}",
            "shrink the image or raise data.max_image_pixels",
            "too many pixels",
        )


def not_installed(what: str, package: str, extra: str, source: str) -> MediaError:
    """The error of media whose optional library is absent.

    Args:
        what: As `describe` names it.
        package: The library.
        extra: The extra of this package that brings it, or the package's own name.
        source: ``file:line`` of the row.
    """
    return MediaError(
        source,
        f"{what} needs {package}, which is not installed, expected an environment with it",
        f"run: pip install {extra!r}",
        "extra not installed",
    )
