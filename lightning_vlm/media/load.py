"""From a reference in a row to a decoded RGB image, safely.

Sizes are checked from the header before anything is decoded, and what is decoded is a copy: a row keeps holding what
it held, so memory does not grow with the rows that were read. Where the bytes come from is `open`'s business, what
is allowed `policy`'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from lightning_vlm.media.image import array_size, to_rgb
from lightning_vlm.media.open import open_media, resolve_path
from lightning_vlm.media.policy import MediaError, MediaPolicy, check_pixels, describe, undecodable

__all__ = [
    "MediaError",
    "MediaPolicy",
    "image_size",
    "load_image",
    "looks_truncated",
    "open_media",
    "resolve_path",
    "verify_image",
]

_WIDTH_TAG, _HEIGHT_TAG, _ORIENTATION_TAG = 0x0100, 0x0101, 0x0112
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap width and height
_TAIL_BYTES = 1024

# What photographs, scans and screenshots come in. Others are refused: Pillow hands EPS to an external program.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def load_image(ref: Any, policy: MediaPolicy, source: str) -> Image.Image:
    """Decodes one image to RGB, upright (its EXIF orientation applied), of an animation the first frame.

    Args:
        ref: Path, ``data:`` URI or address; encoded bytes; a `FileSlice`; or a PIL image or array of pixels, which
            is copied (an image that was opened but not decoded yet is decoded in place: Pillow knows no other way).
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.

    Raises:
        MediaError: If the image is missing, outside the media root, unreadable, too large, or an address that is
            not allowed.
    """
    with _opened(ref, policy, source) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def image_size(ref: Any, policy: MediaPolicy, source: str) -> tuple[int, int]:
    """Upright (height, width) in pixels, from the header alone.

    Args:
        ref: As for `load_image`.
        policy: As for `load_image`.
        source: As for `load_image`.

    Raises:
        MediaError: As for `load_image`, except for damage that only decoding reveals.
    """
    with _opened(ref, policy, source) as image:
        return _upright_size(image)


def verify_image(ref: Any, policy: MediaPolicy, source: str, decode: bool = False) -> tuple[int, int]:
    """Upright (height, width) of an image that is likely to decode, or, with ``decode``, is sure to.

    Without ``decode``, an image is decoded only if its file looks cut off (see `looks_truncated`), or if it holds
    numbers whose range only decoding tells: damage in the middle of a file is not found.

    Args:
        ref: As for `load_image`.
        policy: As for `load_image`.
        source: As for `load_image`.
        decode: Decode it in any case.

    Raises:
        MediaError: As for `load_image`.
    """
    with _opened(ref, policy, source) as image:
        size = _upright_size(image)
        stream = None if isinstance(ref, Image.Image) else getattr(image, "fp", None)
        suspect = stream is not None and looks_truncated(stream, image.format or "")
        if decode or suspect or image.mode in ("I", "F"):
            to_rgb(ImageOps.exif_transpose(image))
        return size


def looks_truncated(stream: BinaryIO, image_format: str) -> bool:
    """Whether an image file lacks its end, by its last bytes.

    A suspicion, not a verdict: Pillow reads some such files, and the mark of an end can stand near the cut by chance.
    Other formats than JPEG, PNG and GIF are never suspected (Pillow refuses a cut WEBP when it reads the header).

    Args:
        stream: The file; its position is kept.
        image_format: Pillow's name of the format.
    """
    position, length = stream.tell(), stream.seek(0, os.SEEK_END)
    stream.seek(max(0, length - _TAIL_BYTES))
    found = stream.read(_TAIL_BYTES)
    stream.seek(position)
    if image_format == "GIF":
        return not found.rstrip(b"\x00").endswith(b";")
    # Cameras and web pages append bytes of their own behind the end, so it need not be the last thing.
    end = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image_format, b"")
    return end not in found


@contextmanager
def _opened(ref: Any, policy: MediaPolicy, source: str) -> Iterator[Image.Image]:
    """An image whose header is read and accepted; whatever goes wrong inside becomes a `MediaError`."""
    what = describe(ref, "image")
    with warnings.catch_warnings():
        # Pillow's own size warning comes at a size of its own: the policy decides.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            if isinstance(ref, np.ndarray | Tensor):
                height, width = array_size(ref)
                check_pixels(width, height, policy, what, source)
                yield to_rgb(ref)
            elif isinstance(ref, Image.Image):
                yield _accepted(ref, policy, what, source)
            else:
                stream = open_media(ref, policy, source)
                with stream, Image.open(stream, formats=_FORMATS) as image:
                    yield _accepted(image, policy, what, source)
        except MediaError:
            raise
        except Image.DecompressionBombError:
            raise _beyond_pillow(policy, what, source) from None
        except Exception as error:  # Pillow's decoders raise almost any kind for a damaged file
            raise undecodable(error, what, "image", source, "Pillow") from error


def _accepted(image: Image.Image, policy: MediaPolicy, what: str, source: str) -> Image.Image:
    # Pillow keeps the orientation that is read here: whoever asks later sees the header's too.
    height, width = _upright_size(image)
    check_pixels(width, height, policy, what, source)
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after rotation, decoding nothing."""
    if (tags := getattr(image, "tag_v2", None)) is not None and getattr(image, "tile", None):
        # A TIFF: Pillow turns it while decoding; whether its size is turned before depends on the version.
        width, height, orientation = tags[_WIDTH_TAG], tags[_HEIGHT_TAG], tags.get(_ORIENTATION_TAG)
    else:
        # The base class's method: PNG's own decodes the whole image to look for EXIF data behind the pixels.
        (width, height), orientation = image.size, Image.Image.getexif(image).get(_ORIENTATION_TAG)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def _beyond_pillow(policy: MediaPolicy, what: str, source: str) -> MediaError:
    """Pillow refuses to tell the size of an image beyond twice its own limit, whatever the policy says."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    ours = policy.max_image_pixels <= limit
    expected = f"max_image_pixels = {policy.max_image_pixels:,}" if ours else "Pillow's own limit"
    return MediaError(
        source,
        f"{what} has more than {limit:,} pixels, expected at most {expected}",
        f"shrink the image or raise {'data.max_image_pixels' if ours else 'PIL.Image.MAX_IMAGE_PIXELS'}",
        "too many pixels",
    )
