"""Opening a source file: local, or behind an fsspec URL that the user wrote; and the cache of what was found in it.

What a scan of a file finds (where its rows start) is kept in the cache under a name made of the file's path, size and
time, so a second start maps it into memory instead of reading the file again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from urllib.parse import unquote

import numpy as np

from lightning_vlm.schema import DataError

_log = logging.getLogger(__name__)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_url(path: str) -> bool:
    """Whether a path names a file system of its own, e.g. ``s3://``."""
    return _SCHEME.match(path) is not None


def local_path(path: str) -> str:
    """The path that a ``file://`` address names; anything else as it is.

    Raises:
        DataError: If the address names another machine.
    """
    if not path.lower().startswith("file://"):
        return path
    host, slash, name = path[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise DataError(
            path,
            f"the address names the host {host!r}, expected file:///absolute/path",
            "write the path itself",
            "missing file",
        )
    return "/" + unquote(name)


def name_and_folder(path: str) -> tuple[str, str]:
    """A file's stem, and the folder that it lies in."""
    return Path(path).stem, path.rpartition("/")[0] if is_url(path) else str(Path(path).parent)


def cache_root() -> Path:
    """``$LIGHTNING_VLM_CACHE``, or else ``~/.cache/lightning_vlm``."""
    return Path(os.environ.get("LIGHTNING_VLM_CACHE") or Path.home() / ".cache" / "lightning_vlm")


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        DataError: If fsspec or what it needs for this scheme is not installed.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            path,
            f"the file cannot be reached ({reason}), expected a local path or a scheme that fsspec knows",
            "install the package that this scheme needs, or copy the file",
            "file not reachable",
        ) from error


def check_file(path: str, expected: str) -> None:
    """Refuses what is not a file.

    Args:
        path: Path or URL.
        expected: What it should be, for the error.

    Raises:
        DataError: If there is no such file.
    """
    if is_url(path):
        system, name = filesystem(path)
        exists, is_folder = system.isfile(name), system.isdir(name)
    else:
        exists, is_folder = os.path.isfile(path), os.path.isdir(path)
    if not exists:
        found = f"is a folder, expected {expected}" if is_folder else "does not exist"
        raise DataError(path, f"the file {found}", "correct the path in the data config", "missing file")


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading from its start."""
    if is_url(path):
        system, name = filesystem(path)
        return system.open(name, "rb")
    return open(path, "rb")


class RangeReader:
    """Reads any bytes of a file, which is opened once per process.

    Workers may share what they inherit: each read says where it starts. A file that is replaced meanwhile is read on as
    it was, so an index of it stays true.

    Args:
        path: Path or fsspec URL.
    """

    _open: ClassVar[OrderedDict[RangeReader, None]] = OrderedDict()  # of this process, the one read last at the end
    _MOST_OPEN = 64

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def read(self, start: int, size: int) -> bytes:
        """Some bytes, fewer at the file's end.

        Args:
            start: The first.
            size: How many.
        """
        if is_url(self.path):
            system, name = filesystem(self.path)
            return system.cat_file(name, start=start, end=start + size)
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed below, or with the reader)
        self._open[self] = None
        self._open.move_to_end(self)
        if len(self._open) > self._MOST_OPEN:  # a thousand shards are usual, and so is a limit of a thousand files
            oldest, _ = self._open.popitem(last=False)
            oldest._file = None
        content = os.pread(self._file.fileno(), size, start)
        while len(content) < size and (
            more := os.pread(self._file.fileno(), size - len(content), start + len(content))
        ):
            content += more  # one call may return less
        return content

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: another process opens its own."""
        return {"path": self.path, "_file": None}


def stamp(path: str) -> tuple[Any, ...]:
    """What tells one state of a file from another without reading it; empty if it is gone."""
    if is_url(path):
        system, name = filesystem(path)
        if not system.exists(name):
            return ()
        info = system.info(name)
        return tuple(str(info.get(key)) for key in ("size", "mtime", "LastModified", "etag", "ETag", "created"))
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def cached_array(
    path: str, purpose: str, build: Callable[[], tuple[np.ndarray, str]], cache_dir: str | Path | None = None
) -> tuple[np.ndarray, str]:
    """An array that follows from a file's content, mapped from the cache where it is there.

    Args:
        path: The file.
        purpose: What the array is; part of its name, with the version of its form.
        build: Makes the array and the fingerprint of the file's content.
        cache_dir: Folder of the arrays; ``index`` in `cache_root` when ``None``.

    Returns:
        The array, read-only and in memory only as far as it is used, and the fingerprint.
    """
    folder = cache_root() / "index" if cache_dir is None else Path(cache_dir) / "index"
    name = os.path.abspath(path) if not is_url(path) else path
    key = hashlib.sha256(repr((name, stamp(path), purpose)).encode()).hexdigest()[:32]
    target, note = folder / f"{key}.npy", folder / f"{key}.txt"
    if note.exists():
        try:
            return np.load(target, mmap_mode="r", allow_pickle=False), note.read_text()
        except (OSError, ValueError) as error:  # damaged, or removed just now
            _log.warning("%s is no index (%s); %s is scanned again", target, error, path)
    array, fingerprint = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(target, lambda file: np.save(file, array))
        _write(note, lambda file: file.write(fingerprint.encode()))  # last: it says that the array is there
    except OSError as error:
        _log.warning("%s cannot be written (%s); %s will be scanned again next time", target, error, path)
        return array, fingerprint
    return np.load(target, mmap_mode="r", allow_pickle=False), fingerprint


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that others see whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with unfinished.open("wb") as file:
        write(file)
    os.replace(unfinished, path)
