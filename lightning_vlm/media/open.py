"""From a reference in a row to a stream of bytes, safely: names, addresses, data URIs, bytes, members of a shard.

Every way in ends in one seekable binary stream, so that a loader reads a header without reading the rest, wherever
the bytes lie; the price is that plain files pass through it too. Paths stay under the media root with links
resolved. Addresses are refused unless the policy names their scheme; fsspec is needed for those that are not HTTP.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import posixpath
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lightning_vlm.media.policy import MediaError, MediaPolicy, Medium, describe, not_installed, reason, short
from lightning_vlm.schema import FileSlice

_MAX_DOWNLOAD_BYTES = 64 * 2**20
_DOWNLOAD_TIMEOUT_S = 30.0
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_FILE = {"image": "an image file", "video": "a video file", "audio": "an audio file"}


def open_media(ref: Any, policy: MediaPolicy, source: str, medium: Medium = "image") -> BinaryIO:
    """Opens what a reference names, applying the policy.

    Args:
        ref: Path under the media root, ``data:`` URI or allowed address; encoded bytes; or a `FileSlice`.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.
        medium: What it is meant to be, for the error.

    Returns:
        A seekable stream at its start; the caller closes it. Only what is read of it is fetched (an HTTP address
        is fetched as a whole).

    Raises:
        MediaError: If the reference is empty, missing, outside the media root, not allowed, or of no known kind.
    """
    if isinstance(ref, bytes):
        return io.BytesIO(ref)
    if isinstance(ref, FileSlice):
        return _open_slice(ref, source, medium)
    if isinstance(ref, os.PathLike):
        ref = os.fspath(ref)
    if not isinstance(ref, str):
        raise MediaError(
            source,
            f"{describe(ref, medium)} cannot be read, expected a name, encoded bytes or a decoded {medium}",
            "check what the reader of this data returns",
            "not a media reference",
        )
    if not ref or "\x00" in ref:
        raise MediaError(
            source,
            f"{medium} path is {short(ref)!r}, expected a file name",
            f"name the {medium} file",
            "empty name" if not ref else "impossible name",
        )
    match = _SCHEME.match(ref)
    scheme = match[1].lower() if match else ""
    if scheme == "data":
        return _decode_data_uri(ref, source, medium)
    if scheme in ("http", "https") or (scheme and "://" in ref):
        _check_scheme(scheme, ref, policy, source, medium)
        return _download(ref, policy, source, medium) if scheme.startswith("http") else _fetch(ref, source, medium)
    if policy.remote_root:
        return _open_under(policy.remote_root, ref, source, medium)
    return _open_file(resolve_path(ref, policy, source, medium), ref, source, medium)


def resolve_path(ref: str, policy: MediaPolicy, source: str, medium: Medium = "image") -> Path:
    """A path under the media root, links resolved, that is an existing file.

    Args:
        ref: Relative path, or an absolute one inside the media root.
        policy: Gives the media root, a folder.
        source: ``file:line`` of the row, for the error.
        medium: What it is meant to be, for the error.

    Raises:
        MediaError: If the path is outside the media root, or not a file.
    """
    root = policy.folder
    name, place = repr(short(ref)), f"the media root {str(policy.media_root)!r}"
    try:
        path = (root / ref).resolve()
        found = "" if path.is_file() else "is a folder" if path.is_dir() else "is not a regular file"
        found = found if not found or path.exists() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, impossible characters
        raise MediaError(
            source,
            f"{medium} path {name} cannot be looked up ({reason(error)}), expected the name of a file under {place}",
            "correct the path in the row",
            "impossible name",
        ) from error
    if not path.is_relative_to(root):
        raise _outside(ref, str(policy.media_root), source, medium)
    if found and "::" in ref:
        raise MediaError(
            source,
            f"{medium} {name} reads as a key in an LMDB database, expected {_FILE[medium]} under {place}",
            "export the database to files or tar shards, as its values can be anything, pickles too",
            "LMDB not supported",
        )
    if found:
        raise MediaError(
            source,
            f"{medium} {name} {found} under {place}, expected {_FILE[medium]}",
            "correct the path in the row or set media_root",
            "missing file" if found == "does not exist" else "not a file",
        )
    return path


class _Window(io.RawIOBase):
    """Bytes ``offset .. offset + size`` of a larger stream, as a stream; nothing is read before it is asked for."""

    def __init__(self, whole: IO[bytes], offset: int, size: int) -> None:
        self._whole, self._offset, self._size, self._position = whole, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}, expected 0 or more")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._whole.seek(self._offset + self._position)
        content = self._whole.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._whole.close()
        super().close()


def _open_slice(ref: FileSlice, source: str, medium: Medium) -> BinaryIO:
    what, shard = describe(ref, medium), f"{short(ref.path)!r}"
    fix = "restore the shard, or index the shards again if they have changed"
    if "://" in ref.path:
        whole: IO[bytes] = _fetch(ref.path, source, medium)
    else:
        try:
            whole = open(ref.path, "rb", buffering=0)  # noqa: SIM115  the window closes it
        except OSError as error:
            raise MediaError(
                source, f"{what} cannot be read ({reason(error)}), expected the shard {shard}", fix, "missing file"
            ) from error
    length, end = whole.seek(0, os.SEEK_END), ref.offset + ref.size
    if length < end:
        whole.close()
        raise MediaError(
            source,
            f"{what} ends at byte {end:,}, where the shard has {length:,}, expected a complete shard",
            fix,
            "damaged shard",
        )
    return io.BufferedReader(_Window(whole, ref.offset, ref.size))


def _open_file(path: Path, ref: str, source: str, medium: Medium) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise MediaError(
            source,
            f"{describe(ref, medium)} cannot be opened ({reason(error)}), expected a file that this user may read",
            "change the file's permissions",
            "file not readable",
        ) from error


def _outside(ref: str, root: str, source: str, medium: Medium) -> MediaError:
    return MediaError(
        source,
        f"{medium} path {short(ref)!r} leads outside the media root {root!r}, expected a file inside it",
        "move the file under the media root or set media_root to a folder that holds it",
        "outside the media root",
    )


def _check_scheme(scheme: str, ref: str, policy: MediaPolicy, source: str, medium: Medium) -> None:
    # fsspec chains filesystems by '::': behind an allowed scheme, any other could follow.
    if scheme in policy.schemes and "::" not in ref:
        return
    what, kind = describe(ref, medium), "URL not allowed"
    if scheme in ("http", "https"):
        raise MediaError(
            source,
            f"{what} is a URL, expected a path under the media root",
            f"download the {medium}, or set allow_urls: true if you trust every URL in the data",
            kind,
        )
    raise MediaError(
        source,
        f"{what} has the scheme {scheme!r}, expected a path under the media root",
        "copy the file under the media root and name it by a relative path",
        kind,
    )


def _open_under(root: str, ref: str, source: str, medium: Medium) -> BinaryIO:
    """A name joined to an address. The name is data: fsspec never reads it as an address of its own."""
    for name in (ref, urllib.parse.unquote(ref)):  # a web server reads %2e%2e as '..'
        normal = posixpath.normpath(name.replace("\\", "/"))
        if normal.startswith("/") or normal.split("/")[0] == "..":
            raise _outside(ref, root, source, medium)
    return _fetch(root, source, medium, posixpath.normpath(ref))


def _fetch(address: str, source: str, medium: Medium, name: str = "") -> BinaryIO:
    what = describe(name or address, medium)
    try:
        import fsspec
    except ImportError as error:
        raise not_installed(what, "fsspec", "fsspec", source) from error
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
        return cast(BinaryIO, filesystem.open(f"{path.rstrip('/')}/{name}" if name else path, "rb"))
    except FileNotFoundError as error:
        place = f" under the media root {address!r}" if name else ""
        raise MediaError(
            source,
            f"{what} does not exist{place}, expected {_FILE[medium]}",
            "correct the path in the row or set media_root",
            "missing file",
        ) from error
    except ImportError as error:  # each store has its own package, which fsspec's message names
        raise MediaError(
            source,
            f"{what} cannot be fetched ({reason(error)}), expected fsspec's package for that store",
            "install that package",
            "extra not installed",
        ) from error
    except Exception as error:  # each store raises its own kinds
        raise _not_downloaded(what, error, source, medium) from error


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed schemes only: a page must not lead further than the row itself may."""

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self._schemes = schemes

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in self._schemes:
            raise urllib.error.URLError(f"redirected to the scheme {scheme!r}, which is not allowed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(ref: str, policy: MediaPolicy, source: str, medium: Medium) -> BinaryIO:
    what = describe(ref, medium)
    try:
        opener = urllib.request.build_opener(_SameSchemes(policy.schemes))
        with opener.open(ref, timeout=_DOWNLOAD_TIMEOUT_S) as response:
            content = response.read(_MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _not_downloaded(what, error, source, medium) from error
    if len(content) > _MAX_DOWNLOAD_BYTES:
        raise MediaError(
            source,
            f"{what} has more than {_MAX_DOWNLOAD_BYTES:,} bytes, expected at most as many",
            "download and shrink it, then name the local file",
            "download too large",
        )
    return io.BytesIO(content)


def _not_downloaded(what: str, error: Exception, source: str, medium: Medium) -> MediaError:
    return MediaError(
        source,
        f"{what} cannot be downloaded ({reason(error)}), expected {_FILE[medium]} at that address",
        "check the URL or use a local file",
        "download failed",
    )


def _decode_data_uri(ref: str, source: str, medium: Medium) -> BinaryIO:
    header, _, payload = ref.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError(f"its header is {header[:40]!r}")
        return io.BytesIO(base64.b64decode(payload, validate=True))
    except (ValueError, binascii.Error) as error:
        raise MediaError(
            source,
            f"data URI {short(ref)!r} cannot be decoded ({reason(error)}), expected 'data:{medium}/...;base64,...'",
            f"encode the {medium} as base64 or name a file",
            "damaged data URI",
        ) from error
