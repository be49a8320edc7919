"""From a reference in a row to a decoded RGB image, safely.

A row is untrusted input: paths stay under the media root (links resolved), sizes are checked from the header
before anything is decoded, URLs are refused unless the user allowed them. Whatever fails becomes a
`MediaError` that names the row; nothing is replaced or skipped here.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import re
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lightning_vlm.media.image import to_rgb
from lightning_vlm.schema import DataError

_MAX_DOWNLOAD_BYTES = 64 * 2**20
_DOWNLOAD_TIMEOUT_S = 30.0
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_WIDTH_TAG, _HEIGHT_TAG, _ORIENTATION_TAG = 0x0100, 0x0101, 0x0112
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap width and height

# What photographs, scans and screenshots come in. Others are refused: Pillow hands EPS to an external program.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class MediaError(DataError):
    """An image that cannot be found, read, or accepted."""


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """What a reference may point to.

    Attributes:
        media_root: Folder that relative paths start from and that no path may leave.
        max_image_pixels: Most pixels (width x height) of one image; checked before decoding.
        allow_urls: Whether ``http(s)://`` references are downloaded.
    """

    media_root: Path
    max_image_pixels: int = 64_000_000
    allow_urls: bool = False


def load_image(ref: str, policy: MediaPolicy, source: str) -> Image.Image:
    """Decodes one image to RGB, upright (its EXIF orientation applied).

    Args:
        ref: Path, ``data:`` URI, or URL.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.

    Raises:
        MediaError: If the image is missing, outside the media root, unreadable, too large, or a URL that is
            not allowed.
    """
    with _opened(ref, policy, source) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def image_size(ref: str, policy: MediaPolicy, source: str) -> tuple[int, int]:
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


def open_media(ref: str, policy: MediaPolicy, source: str) -> Path | io.BytesIO:
    """Resolves a reference to a readable path or to bytes, applying the policy.

    Args:
        ref: Path, ``data:`` URI, or URL.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.

    Raises:
        MediaError: If the reference is empty, missing, outside the media root, or a URL that is not allowed.
    """
    match = _SCHEME.match(ref)
    scheme = match[1].lower() if match else ""
    if scheme == "data":
        return _decode_data_uri(ref, source)
    if scheme in ("http", "https"):
        return _download(ref, policy, source)
    if scheme and "://" in ref:
        raise MediaError(
            source,
            f"image {_short(ref)!r} has the scheme {scheme!r}, expected a path under the media root",
            "copy the file under the media root and name it by a relative path",
        )
    return resolve_path(ref, policy, source)


def resolve_path(ref: str, policy: MediaPolicy, source: str) -> Path:
    """A path under the media root, links resolved, that is an existing file.

    Args:
        ref: Relative path, or an absolute one inside the media root.
        policy: Gives the media root.
        source: ``file:line`` of the row, for the error.

    Raises:
        MediaError: If the path is empty, outside the media root, or not a file.
    """
    root = policy.media_root.resolve()
    if not ref or "\x00" in ref:
        raise MediaError(source, f"image path is {_short(ref)!r}, expected a file name", "name the image file")
    name, place = repr(_short(ref)), f"the media root {str(policy.media_root)!r}"
    try:
        path = (root / ref).resolve()
        found = "" if path.is_file() else "is a folder" if path.is_dir() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, impossible characters
        raise MediaError(
            source,
            f"image path {name} cannot be looked up ({_reason(error)}), expected the name of a file under {place}",
            "correct the path in the row",
        ) from error
    if not path.is_relative_to(root):
        raise MediaError(
            source,
            f"image path {name} leads outside {place}, expected a file inside it",
            "move the file under the media root or set media_root to a folder that holds it",
        )
    if found:
        raise MediaError(
            source,
            f"image {name} {found} under {place}, expected an image file",
            "correct the path in the row or set media_root",
        )
    return path


@contextmanager
def _opened(ref: str, policy: MediaPolicy, source: str) -> Iterator[Image.Image]:
    """An image whose header is read and accepted; whatever goes wrong inside becomes a `MediaError`."""
    content = open_media(ref, policy, source)
    name = _short(ref)
    with warnings.catch_warnings():
        # Pillow's own size warning comes at a size of its own: the policy decides.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(content, formats=_FORMATS) as image:
                # Pillow keeps the orientation that is read here: both callers see the header's, no later one.
                height, width = _upright_size(image)
                _check_pixels(width, height, policy, name, source)
                yield image
        except MediaError:
            raise
        except Image.DecompressionBombError:
            raise _beyond_pillow(policy, name, source) from None
        except Exception as error:  # Pillow's decoders raise almost any kind for a damaged file
            raise MediaError(
                source,
                f"image {name!r} cannot be decoded ({_reason(error)}), expected a complete image that Pillow can read",
                "replace the file or remove the row",
            ) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after rotation, decoding nothing."""
    if (tags := getattr(image, "tag_v2", None)) is not None:
        # A TIFF: Pillow turns it while decoding; whether its size is turned before depends on the version.
        width, height, orientation = tags[_WIDTH_TAG], tags[_HEIGHT_TAG], tags.get(_ORIENTATION_TAG)
    else:
        # The base class's method: PNG's own decodes the whole image to look for EXIF data behind the pixels.
        (width, height), orientation = image.size, Image.Image.getexif(image).get(_ORIENTATION_TAG)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def _check_pixels(width: int, height: int, policy: MediaPolicy, name: str, source: str) -> None:
    if width * height > policy.max_image_pixels:
        raise MediaError(
            source,
            f"image {name!r} has {width} x {height} = {width * height:,} pixels, expected at most "
            f"max_image_pixels = {policy.max_image_pixels:,}",
            "shrink the image or raise max_image_pixels",
        )


def _beyond_pillow(policy: MediaPolicy, name: str, source: str) -> MediaError:
    """Pillow refuses to tell the size of an image beyond twice its own limit, whatever the policy says."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    ours = policy.max_image_pixels <= limit
    expected = f"max_image_pixels = {policy.max_image_pixels:,}" if ours else "Pillow's own limit"
    return MediaError(
        source,
        f"image {name!r} has more than {limit:,} pixels, expected at most {expected}",
        f"shrink the image or raise {'max_image_pixels' if ours else 'PIL.Image.MAX_IMAGE_PIXELS'}",
    )


def _decode_data_uri(ref: str, source: str) -> io.BytesIO:
    header, _, payload = ref.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError(f"its header is {header[:40]!r}")
        return io.BytesIO(base64.b64decode(payload, validate=True))
    except (ValueError, binascii.Error) as error:
        raise MediaError(
            source,
            f"data URI {_short(ref)!r} cannot be decoded ({_reason(error)}), expected 'data:image/...;base64,...'",
            "encode the image as base64 or name a file",
        ) from error


def _download(ref: str, policy: MediaPolicy, source: str) -> io.BytesIO:
    if not policy.allow_urls:
        raise MediaError(
            source,
            f"image {_short(ref)!r} is a URL, expected a path under the media root",
            "download the image, or set allow_urls: true if you trust every URL in the data",
        )
    try:
        with urllib.request.urlopen(ref, timeout=_DOWNLOAD_TIMEOUT_S) as response:
            content = response.read(_MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise MediaError(
            source,
            f"image {_short(ref)!r} cannot be downloaded ({_reason(error)}), expected an image at that address",
            "check the URL or use a local file",
        ) from error
    if len(content) > _MAX_DOWNLOAD_BYTES:
        raise MediaError(
            source,
            f"image {_short(ref)!r} has more than {_MAX_DOWNLOAD_BYTES:,} bytes, expected at most as many",
            "download and shrink it, then name the local file",
        )
    return io.BytesIO(content)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _short(ref: str) -> str:
    return ref if len(ref) <= 120 else ref[:60] + "..." + ref[-20:]
