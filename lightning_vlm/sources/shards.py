"""WebDataset shards: tar files whose members share a name per sample, read at random through an index.

``000017.json`` and ``000017.jpg`` are one row. The shard is walked once for where its members lie; media are handed on
as slices of the shard and read when they are needed, so planning reads their headers only.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from lightning_vlm.schema import DataError, FileSlice
from lightning_vlm.sources.files import RangeReader, cached_array, check_file, name_and_folder, open_file, stamp
from lightning_vlm.sources.formats import RowFormat
from lightning_vlm.sources.json_files import decode_json
from lightning_vlm.sources.rows import RowSource

_FORM = 2
_NAME_BYTES = 100  # of an extension in the index
_MEDIA = {
    "images": ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"),
    "videos": ("avi", "mkv", "mov", "mp4", "webm"),
    "audios": ("flac", "mp3", "ogg", "wav"),
}


class ShardSource(RowSource):
    """The samples of one ``.tar`` file.

    A ``.json`` member is the row; images, videos and sounds beside it are its lists, unless the row brings its own.
    A row may name a member by its extension (``"image": "left.png"``). Text members (``.txt``, ``.cls``) are columns,
    to be mapped.

    Args:
        path: Path or fsspec URL of an uncompressed tar file.
        layout: How rows are read.
        cache_dir: Where the index is kept.

    Raises:
        DataError: If the shard is missing, empty, compressed or damaged.
    """

    def __init__(self, path: str | Path, layout: RowFormat | None = None, cache_dir: str | Path | None = None) -> None:
        self.path = str(path)
        self.layout = layout or RowFormat()
        self.name, self.media_root = name_and_folder(self.path)
        check_file(self.path, "a tar file")
        self._stamp = stamp(self.path)
        self._reader = RangeReader(self.path)
        self._members, self.fingerprint = cached_array(self.path, f"tar {_FORM}", lambda: _walk(self.path), cache_dir)
        self._ends = np.flatnonzero(np.diff(self._members["sample"], append=-1)) + 1
        if not len(self):
            raise DataError(self.path, "the shard has no samples", "add some or remove it from the config", "no rows")

    def has_changed(self) -> bool:
        """Whether the file is no longer the one that was opened."""
        return stamp(self.path) != self._stamp

    def __len__(self) -> int:
        return len(self._ends)

    def place(self, index: int) -> str:
        """``shard.tar:number``, samples counted from 1."""
        return f"{self.path}:{index + 1}"

    def row(self, index: int) -> Any:
        """The row: its JSON, its texts by extension, its media as slices of the shard.

        Raises:
            DataError: If a member is no JSON or no text.
        """
        start, stop = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        place = self.place(index)
        row: dict[str, Any] = {}
        media: dict[str, dict[str, FileSlice]] = {}
        for member in self._members[start:stop]:
            extension = bytes(member["extension"]).decode(errors="surrogateescape")
            at = FileSlice(self.path, int(member["offset"]), int(member["size"]), extension)
            suffix = extension.rpartition(".")[2].lower()
            kind = next((kind for kind, suffixes in _MEDIA.items() if suffix in suffixes), None)
            if kind is not None:
                media.setdefault(kind, {})[extension] = at
                row.setdefault(extension, at)  # for a mapped column
            elif suffix == "json":
                content = decode_json(self._reader.read(at.offset, at.size), place)
                row |= content if isinstance(content, dict) else {extension: content}
            else:
                try:
                    row[extension] = self._reader.read(at.offset, at.size).decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        place,
                        f"the member {extension!r} is not text in UTF-8, expected media, JSON or text",
                        "leave it out of the shard or save it as UTF-8",
                        "not UTF-8",
                    ) from error
        return _with_media(row, media)


def _is_media(extension: str) -> bool:
    return any(extension.rpartition(".")[2].lower() in suffixes for suffixes in _MEDIA.values())


def _check_end(file: Any, offset: int, path: str) -> None:
    """A damaged header in the middle reads like the end of the archive: behind the real one are zeros alone."""
    file.seek(offset)
    size = 0
    while block := file.read(2**20):
        size += len(block)
        if block.strip(b"\0"):
            size = 0
            break
    if size < 512:
        raise DataError(
            path,
            f"the shard goes on behind its end or breaks off (at byte {offset:,}), expected one whole tar file",
            "write it again; shards are not joined with cat",
            "damaged shard",
        )


def _with_media(row: dict[str, Any], media: dict[str, dict[str, FileSlice]]) -> dict[str, Any]:
    """Members that the row names by their extension take the name's place; where it names none, all are its lists."""
    for kind, members in media.items():
        keys = [key for key in (kind, kind[:-1]) if row.get(key) is not None]
        for key in keys:
            named = row[key]
            if isinstance(named, list):
                row[key] = [members.get(name, name) if isinstance(name, str) else name for name in named]
            elif isinstance(named, str):
                row[key] = members.get(named, named)
        if not keys:
            row[kind] = list(members.values())
    return row


_MEMBER = np.dtype([("sample", "i8"), ("offset", "i8"), ("size", "i8"), ("extension", f"S{_NAME_BYTES}")])


def _walk(path: str) -> tuple[np.ndarray, str]:
    """The members of a tar file in order, each with the number of its sample; and a hash of their headers."""
    found: list[tuple[int, int, int, bytes]] = []
    seen: dict[str, int] = {}
    digest = hashlib.sha256()
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                if member.islnk() or member.issym():
                    raise DataError(
                        path,
                        f"the member {member.name!r} is a link, expected files only",
                        "write the shard with copies (tar --dereference --hard-dereference)",
                        "damaged shard",
                    )
                if not member.isfile() or base.startswith("._") or not extension:
                    continue
                number = seen.setdefault(f"{folder}/{stem}", len(seen))
                if found and number < found[-1][0]:
                    raise DataError(
                        path,
                        f"the member {member.name!r} stands apart from the others of its sample, expected them "
                        "together",
                        "sort the members by name when the shard is written",
                        "damaged shard",
                    )
                name = extension.encode(errors="surrogateescape")
                if len(name) > _NAME_BYTES:
                    raise DataError(
                        path,
                        f"the member {member.name!r} has an extension of {len(name)} bytes, expected at most "
                        f"{_NAME_BYTES}",
                        "shorten it",
                        "damaged shard",
                    )
                found.append((number, member.offset_data, member.size, name))
                digest.update(member.name.encode(errors="surrogateescape") + b"%d/" % member.size)
                if not _is_media(extension):  # what rows say; a medium is known by its size, as one beside a file is
                    digest.update(shard.extractfile(member).read())  # type: ignore[union-attr]
            _check_end(file, shard.offset, path)
    except tarfile.TarError as error:
        raise DataError(
            path,
            f"the shard cannot be read ({str(error).rstrip('.')}), expected an uncompressed tar file",
            "decompress it (gunzip) or write it again",
            "damaged shard",
        ) from error
    return np.array(found, dtype=_MEMBER), digest.hexdigest()[:16]
