"""The content of rows in memory as one hash: the same for equal rows in any process, another for any others.

By it a resumed run and the kept lengths know whether the rows are still those they belong to. So every value is read
once, whole; pixels as they are decoded, so that an image is the same one before and after somebody has looked at it.
What cannot be read so is refused: an address in memory, which Python shows of most objects, is another in each process.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np
import torch
from PIL import Image

from lightning_vlm.schema import DataError

_PLAIN = (bool, int, float, complex, str, type(None), PurePath, date, time, timedelta, Decimal, UUID)
"""Types of which ``repr`` shows all."""

_ORIENTATION_TAG = 0x0112


def fingerprint(rows: Iterable[Any], name: str) -> str:
    """The hash of rows.

    Args:
        rows: Objects as of any format: of text, numbers, bytes, arrays, tensors and PIL images, however deep.
        name: What errors call the rows.

    Raises:
        DataError: If a row holds an object of another type.
    """
    digest = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        _add(digest, row, f"{name}:{number}")
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any, place: str) -> None:
    def begin(*what: Any) -> None:  # with lengths: no two values may look alike, joined
        digest.update(repr(what).encode(errors="backslashreplace"))

    if isinstance(value, Image.Image):
        _add_image(digest, value)
    elif isinstance(value, torch.Tensor):
        begin("tensor", value.dtype, tuple(value.shape))
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, (np.ndarray, np.generic)):
        begin("array", value.dtype.str, value.shape)
        if value.dtype.hasobject:  # its bytes are addresses
            _add(digest, value.tolist(), place)
        else:
            digest.update(value.tobytes())
    elif isinstance(value, _PLAIN):
        begin(type(value).__name__, value)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        begin("bytes", len(value))
        digest.update(value)
    elif isinstance(value, Mapping):
        begin("mapping", len(value))
        for key in sorted(value, key=str):
            _add(digest, key, place)
            _add(digest, value[key], place)
    elif isinstance(value, (list, tuple)):
        begin("list", len(value))
        for item in value:
            _add(digest, item, place)
    elif is_dataclass(value) and not isinstance(value, type):
        begin(type(value).__name__, len(fields(value)))
        for field in fields(value):
            _add(digest, getattr(value, field.name), place)
    else:
        raise DataError(
            place,
            f"the row holds an object of the type {type(value).__name__}, whose content cannot be compared, expected "
            "text, numbers, bytes, arrays, tensors or PIL images",
            "convert it, or leave it out of the row",
            "unknown object",
        )


def _add_image(digest: Any, image: Image.Image) -> None:
    """An image's pixels and what else decides how it looks.

    One that is opened and not decoded yet is decoded from its file a second time and stays as it is: decoded in place,
    the pixels of all rows would stay in memory. One that cannot be decoded is known by its file's bytes; it is a bad
    sample, told when it is read.
    """
    stream, encoded = getattr(image, "fp", None), b""
    try:
        if stream is None or not getattr(image, "tile", None):
            _add_pixels(digest, image)
            return
        position = stream.tell()
        stream.seek(0)
        encoded = stream.read()
        stream.seek(position)
        with Image.open(io.BytesIO(encoded)) as own:
            own.seek(image.tell())
            _add_pixels(digest, own)
    except Exception:  # Pillow raises almost any kind for a damaged or closed file
        name = getattr(image, "filename", "")
        digest.update(repr(("damaged image", image.mode, image.size, name)).encode(errors="backslashreplace") + encoded)


def _add_pixels(digest: Any, image: Image.Image) -> None:
    pixels = image.tobytes()  # first: decoding may change all that follows
    palette = image.getpalette() if image.mode in ("P", "PA") else None
    look = (image.mode, image.size, palette, image.info.get("transparency"), image.getexif().get(_ORIENTATION_TAG))
    digest.update(repr(("image", *look)).encode())
    digest.update(pixels)
