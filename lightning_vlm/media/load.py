"""From a reference in a row to a decoded RGB image, safely.

A row is untrusted input: paths stay under the media root (links resolved), sizes are checked from the header before
anything is decoded, URLs are refused unless the user allowed them. Whatever fails becomes a `MediaError` that names the
row; nothing is replaced or skipped here.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lightning_vlm.schema import DataError

_MAX_DOWNLOAD_BYTES = 64 * 2**20
_DOWNLOAD_TIMEOUT_S = 30.0
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that swap width and height


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
        MediaError: If the image is missing, outside the media root, unreadable, too large, or a URL that is not allowed.
    """
    content = open_media(ref, policy, source)
    name = _short(ref)
    with warnings.catch_warnings():
        # Pillow's own size warning comes late and at a size of its own: the policy decides, before decoding.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(content) as image:
                _check_pixels(image.size, policy, name, source)
                return ImageOps.exif_transpose(image).convert("RGB")
        except MediaError:
            raise
        except Image.DecompressionBombError:
            raise _too_large(f"more than {policy.max_image_pixels:,}", policy, name, source) from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
            raise MediaError(
                source,
                f"image {name!r} cannot be decoded ({_reason(error)}), expected a complete image that Pillow can read",
                "replace the file or remove the row",
            ) from error


def image_size(ref: str, policy: MediaPolicy, source: str) -> tuple[int, int]:
    """Upright (height, width) in pixels, from the header alone.

    Args:
        ref: As for `load_image`.
        policy: As for `load_image`.
        source: As for `load_image`.

    Raises:
        MediaError: As for `load_image`, except for damage that only decoding reveals.
    """
    content = open_media(ref, policy, source)
    name = _short(ref)
    try:
        with Image.open(content) as image:
            _check_pixels(image.size, policy, name, source)
            width, height = image.size
            return (width, height) if image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS else (height, width)
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(f"more than {policy.max_image_pixels:,}", policy, name, source) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise MediaError(
            source,
            f"image {name!r} has no readable header ({_reason(error)}), expected an image that Pillow can read",
            "replace the file or remove the row",
        ) from error


def open_media(ref: str, policy: MediaPolicy, source: str) -> Path | io.BytesIO:
    """Resolves a reference to a readable path or to bytes, applying the policy.

    Args:
        ref: Path, ``data:`` URI, or URL.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.

    Raises:
        MediaError: If the reference is empty, missing, outside the media root, or a URL that is not allowed.
    """
    scheme = urllib.parse.urlsplit(ref).scheme.lower() if ":" in ref[:12] else ""
    if scheme == "data":
        return _decode_data_uri(ref, source)
    if scheme in ("http", "https"):
        return _download(ref, policy, source)
    if scheme and "://" in ref:
        raise MediaError(
            source,
            f"media reference {_short(ref)!r} has the scheme {scheme!r}, expected a path under the media root",
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
        raise MediaError(source, f"image path is {ref!r}, expected a file name", "name the image file")
    path = (root / ref).resolve()
    if not path.is_relative_to(root):
        raise MediaError(
            source,
            f"image path {ref!r} leads outside the media root {str(policy.media_root)!r}",
            "move the file under the media root or set media_root to a folder that holds it",
        )
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise MediaError(
            source,
            f"image {ref!r} {found} under the media root {str(policy.media_root)!r}",
            "correct the path in the row or set media_root",
        )
    return path


def _check_pixels(size: tuple[int, int], policy: MediaPolicy, name: str, source: str) -> None:
    width, height = size
    if width * height > policy.max_image_pixels:
        raise _too_large(f"{width} x {height} = {width * height:,}", policy, name, source)


def _too_large(found: str, policy: MediaPolicy, name: str, source: str) -> MediaError:
    return MediaError(
        source,
        f"image {name!r} has {found} pixels, expected at most max_image_pixels = {policy.max_image_pixels:,}",
        "shrink the image or raise max_image_pixels",
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
            f"data URI cannot be decoded ({error}), expected 'data:image/...;base64,...'",
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
    except (OSError, ValueError) as error:
        raise MediaError(
            source, f"image {_short(ref)!r} cannot be downloaded ({_reason(error)})", "check the URL or use a local file"
        ) from error
    if len(content) > _MAX_DOWNLOAD_BYTES:
        raise MediaError(
            source,
            f"image {_short(ref)!r} is larger than {_MAX_DOWNLOAD_BYTES // 2**20} MiB",
            "download and shrink it, then name the local file",
        )
    return io.BytesIO(content)


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if "BytesIO" not in text else "not an image"


def _short(ref: str) -> str:
    return ref if len(ref) <= 120 else ref[:60] + "..." + ref[-20:]
