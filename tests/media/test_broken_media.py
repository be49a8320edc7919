"""Broken media, each with the exact sentence that it must give: the sentence is what a user has to go by.

The files are made here, a few bytes each. ``{root}`` stands for the media root and ``{outside}`` for a folder beside
it, in what is named and in what is said.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from lightning_vlm.media.audio import load_audio
from lightning_vlm.media.load import load_image
from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.media.video import load_video
from lightning_vlm.schema import FileSlice

SOURCE = "train.jsonl:7"
REPLACE = "; replace the file or remove the row."
CORRECT = "; correct the path in the row or set media_root."
INSIDE = "; move the file under the media root or set media_root to a folder that holds it."
COPY = "; copy the file under the media root and name it by a relative path."
COMPLETE = ", expected a complete image that Pillow can read" + REPLACE
NO_VIDEO = ", expected a complete video that FFmpeg can read" + REPLACE
NO_SOUND = ", expected a complete sound that libsndfile can read" + REPLACE
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def picture(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(NOISE).save(content, kind, **options)
    return content.getvalue()


def png(width: int, height: int, pixels: bytes = b"", crc: int = 0) -> bytes:
    """A PNG by hand: any size, any pixels, a checksum that is off by ``crc``."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def movie(num_frames: int = 3, with_sound: bool = False, with_pictures: bool = True, kind: str = "mp4") -> bytes:
    """A film of so many frames, beside a short sound or not."""
    content = io.BytesIO()
    with av.open(content, "w", format=kind) as container:
        streams: list[Any] = []
        if with_pictures:
            pictures = container.add_stream("mpeg4", rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 16, 16, "yuv420p"
            streams.append(pictures)
        if with_sound:
            streams.append(container.add_stream("aac", rate=16_000, layout="mono"))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(streams[-1].encode(frame))
        for _ in range(num_frames if with_pictures else 0):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(NOISE, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return content.getvalue()


def early_end(movie: bytes) -> bytes:
    """An MP4 with its index in front whose pictures end early, as an interrupted download leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.mp4"  # FFmpeg moves the index by opening the file a second time
        with av.open(io.BytesIO(movie)) as old, av.open(path, "w", options={"movflags": "faststart"}) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
        raw = Path(path).read_bytes()
    pictures = raw.index(b"mdat")
    return raw[: (pictures + len(raw)) // 2]


def sound(num_samples: int, kind: str = "WAV") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.zeros(num_samples, np.float32), 16_000, format=kind, subtype="PCM_16")
    return content.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"404: Not Found",
    "page.png": lambda: b"<!DOCTYPE html><html></html>",
    "cut.jpg": lambda: picture("JPEG", quality=95)[:700],
    "cut.png": lambda: picture("PNG")[:500],
    "cut.gif": lambda: picture("GIF")[:900],
    "cut.webp": lambda: picture("WEBP", lossless=True)[:300],
    "header.png": lambda: png(16, 16)[:20],
    "crc.png": lambda: png(1, 1, bytes(4), crc=1),
    "bomb.png": lambda: png(50_000, 50_000),
    "large.png": lambda: png(9_000, 9_000),
    "zero.png": lambda: png(0, 0),
    "flat.png": lambda: png(0, 5),
    "a.eps": lambda: picture("EPS"),
    "a.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "a.npy": lambda: b"\x93NUMPY\x01\x00" + bytes(100),
    "a.pkl": lambda: pickle.dumps({"image": b"x"}),
    "text.mp4": lambda: b"this is no video",
    "empty.mp4": lambda: b"",
    "cut.mp4": lambda: movie()[:600],
    "early.mp4": lambda: early_end(movie(9)),
    "none.mkv": lambda: movie(0, with_sound=True, kind="matroska"),
    "sound.mp4": lambda: movie(with_sound=True, with_pictures=False),
    "list.m3u8": lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.0,\nsound.mp4\n#EXT-X-ENDLIST\n",
    "list.ffconcat": lambda: b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    "text.wav": lambda: b"this is no sound",
    "empty.wav": lambda: b"",
    "silent.wav": lambda: sound(0),
    "cut.flac": lambda: sound(9000, "FLAC")[:60],
    "shard.tar": lambda: b"\x00" * 1024,
}

ROW = tuple[str, Any, str, str]  # what it is, the reference, the sentence behind the place, the kind
IMAGES: list[ROW] = [
    (
        "missing",
        "no/such.jpg",
        "image 'no/such.jpg' does not exist under the media root '{root}', expected an image file" + CORRECT,
        "missing file",
    ),
    (
        "folder",
        "album",
        "image 'album' is a folder under the media root '{root}', expected an image file" + CORRECT,
        "not a file",
    ),
    (
        "pipe",
        "pipe",
        "image 'pipe' is not a regular file under the media root '{root}', expected an image file" + CORRECT,
        "not a file",
    ),
    ("no name", "", "image path is '', expected a file name; name the image file.", "empty name"),
    (
        "null byte",
        "a\x00.png",
        "image path is 'a\\x00.png', expected a file name; name the image file.",
        "impossible name",
    ),
    (
        "too long a name",
        "x" * 300,
        f"image path '{'x' * 60}...{'x' * 20}' cannot be looked up (File name too long), expected the name of a file "
        "under the media root '{root}'; correct the path in the row.",
        "impossible name",
    ),
    (
        "path that leaves",
        "../outside/secret.png",
        "image path '../outside/secret.png' leads outside the media root '{root}', expected a file inside it" + INSIDE,
        "outside the media root",
    ),
    (
        "absolute path",
        "{outside}/secret.png",
        "image path '{outside}/secret.png' leads outside the media root '{root}', expected a file inside it" + INSIDE,
        "outside the media root",
    ),
    (
        "link that leaves",
        "link.png",
        "image path 'link.png' leads outside the media root '{root}', expected a file inside it" + INSIDE,
        "outside the media root",
    ),
    (
        "address",
        "https://example.org/a.png",
        "image 'https://example.org/a.png' is a URL, expected a path under the media root; download the image, or set "
        "allow_urls: true if you trust every URL in the data.",
        "URL not allowed",
    ),
    (
        "file address",
        "file:///etc/hostname",
        "image 'file:///etc/hostname' has the scheme 'file', expected a path under the media root" + COPY,
        "URL not allowed",
    ),
    (
        "store address",
        "s3://bucket/a.png",
        "image 's3://bucket/a.png' has the scheme 's3', expected a path under the media root" + COPY,
        "URL not allowed",
    ),
    (
        "unknown scheme",
        "gopher://host/a.png",
        "image 'gopher://host/a.png' has the scheme 'gopher', expected a path under the media root" + COPY,
        "URL not allowed",
    ),
    (
        "LMDB key",
        "images.lmdb::0001",
        "image 'images.lmdb::0001' reads as a key in an LMDB database, expected an image file under the media root "
        "'{root}'; export the database to files or tar shards, as its values can be anything, pickles too.",
        "LMDB not supported",
    ),
    (
        "data URI with a wrong letter",
        "data:image/png;base64,@@@@",
        "data URI 'data:image/png;base64,@@@@' cannot be decoded (Only base64 data is allowed), expected "
        "'data:image/...;base64,...'; encode the image as base64 or name a file.",
        "damaged data URI",
    ),
    (
        "data URI that is not base64",
        "data:image/png,abcd",
        "data URI 'data:image/png,abcd' cannot be decoded (its header is 'data:image/png'), expected "
        "'data:image/...;base64,...'; encode the image as base64 or name a file.",
        "damaged data URI",
    ),
    (
        "data URI of text",
        "data:text/plain;base64," + base64.b64encode(b"hello").decode(),
        "image 'data:text/plain;base64,aGVsbG8=' cannot be decoded (not an image)" + COMPLETE,
        "not an image",
    ),
    ("empty file", "empty.jpg", "image 'empty.jpg' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("text", "text.jpg", "image 'text.jpg' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("web page", "page.png", "image 'page.png' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("EPS", "a.eps", "image 'a.eps' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("SVG", "a.svg", "image 'a.svg' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("array file", "a.npy", "image 'a.npy' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("pickle", "a.pkl", "image 'a.pkl' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    (
        "cut JPEG",
        "cut.jpg",
        "image 'cut.jpg' cannot be decoded (image file is truncated (77 bytes not processed))" + COMPLETE,
        "damaged image",
    ),
    ("cut PNG", "cut.png", "image 'cut.png' cannot be decoded (image file is truncated)" + COMPLETE, "damaged image"),
    (
        "cut GIF",
        "cut.gif",
        "image 'cut.gif' cannot be decoded (image file is truncated (108 bytes not processed))" + COMPLETE,
        "damaged image",
    ),
    (
        "cut WEBP",
        "cut.webp",
        "image 'cut.webp' cannot be decoded (could not create decoder object)" + COMPLETE,
        "damaged image",
    ),
    (
        "PNG cut in its header",
        "header.png",
        "image 'header.png' cannot be decoded (Truncated File Read)" + COMPLETE,
        "damaged image",
    ),
    (
        "PNG of a wrong checksum",
        "crc.png",
        "image 'crc.png' cannot be decoded (not an image)" + COMPLETE,
        "not an image",
    ),
    (
        "PNG that claims 2.5 gigapixels",
        "bomb.png",
        "image 'bomb.png' has more than 178,956,970 pixels, expected at most max_image_pixels = 64,000,000; shrink the "
        "image or raise max_image_pixels.",
        "too many pixels",
    ),
    (
        "PNG above the limit",
        "large.png",
        "image 'large.png' has 9000 x 9000 = 81,000,000 pixels, expected at most max_image_pixels = 64,000,000; shrink "
        "the image or raise max_image_pixels.",
        "too many pixels",
    ),
    ("PNG of 0 x 0", "zero.png", "image 'zero.png' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("PNG of 0 x 5", "flat.png", "image 'flat.png' cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("bytes", b"hello", "the image of 5 bytes cannot be decoded (not an image)" + COMPLETE, "not an image"),
    ("no bytes", b"", "the image of 0 bytes cannot be decoded (not an image)" + COMPLETE, "not an image"),
    (
        "number",
        7,
        "the image given as int cannot be read, expected a name, encoded bytes or a decoded image; check what the "
        "reader of this data returns.",
        "not a media reference",
    ),
    (
        "array of a wrong shape",
        np.zeros((2, 2, 2), np.uint8),
        "the image array of shape (2, 2, 2) cannot be decoded (an image array has shape (2, 2, 2); expected (H, W), "
        "(H, W, 3) or (3, H, W))" + COMPLETE,
        "damaged image",
    ),
    (
        "array up to one",
        np.full((2, 2, 3), 0.5),
        "the image array of shape (2, 2, 3) cannot be decoded (an image array of float64 spans 0.5..0.5; expected "
        "pixels in 0..255)" + COMPLETE,
        "damaged image",
    ),
    (
        "member that holds nothing",
        FileSlice("{root}/shard.tar", 512, 100, "x.jpg"),
        "image 'x.jpg' in shard.tar cannot be decoded (not an image)" + COMPLETE,
        "not an image",
    ),
    (
        "member behind the end",
        FileSlice("{root}/shard.tar", 512, 5000, "x.jpg"),
        "image 'x.jpg' in shard.tar ends at byte 5,512, where the shard has 1,024, expected a complete shard; restore "
        "the shard, or index the shards again if they have changed.",
        "damaged shard",
    ),
    (
        "member of a missing shard",
        FileSlice("{root}/no.tar", 0, 9, "x.jpg"),
        "image 'x.jpg' in no.tar cannot be read (No such file or directory), expected the shard '{root}/no.tar'; "
        "restore the shard, or index the shards again if they have changed.",
        "missing file",
    ),
]
VIDEOS: list[ROW] = [
    (
        "missing",
        "no.mp4",
        "video 'no.mp4' does not exist under the media root '{root}', expected a video file" + CORRECT,
        "missing file",
    ),
    (
        "text",
        "text.mp4",
        "video 'text.mp4' cannot be decoded (Invalid data found when processing input)" + NO_VIDEO,
        "damaged video",
    ),
    ("empty file", "empty.mp4", "video 'empty.mp4' cannot be decoded (not a video)" + NO_VIDEO, "not a video"),
    (
        "cut",
        "cut.mp4",
        "video 'cut.mp4' has no pictures, expected a video of at least one frame" + REPLACE,
        "empty video",
    ),
    (
        "pictures that end early",
        "early.mp4",
        "video 'early.mp4' ends before frame 2 of 9, expected a complete video" + REPLACE,
        "damaged video",
    ),
    (
        "no frame",
        "none.mkv",
        "video 'none.mkv' has no frame, expected a video of at least one frame" + REPLACE,
        "empty video",
    ),
    (
        "sound without pictures",
        "sound.mp4",
        "video 'sound.mp4' has no pictures, expected a video of at least one frame" + REPLACE,
        "empty video",
    ),
    (
        "playlist that names another file",
        "list.m3u8",
        "video 'list.m3u8' cannot be decoded (not a video)" + NO_VIDEO,
        "not a video",
    ),
    (
        "list that names a system file",
        "list.ffconcat",
        "video 'list.ffconcat' cannot be decoded (not a video)" + NO_VIDEO,
        "not a video",
    ),
    (
        "no images",
        (),
        "the video of 0 parts has no frame, expected a video of at least one frame" + REPLACE,
        "empty video",
    ),
    (
        "image that is missing",
        ("ok.png", "no.png"),
        "image 'no.png' does not exist under the media root '{root}', expected an image file" + CORRECT,
        "missing file",
    ),
    (
        "images of two sizes",
        ("ok.png", "wide.png"),
        "the video of 2 parts has a frame of 9 x 4 pixels (2. of those taken), expected 4 x 4 as of the first; bring "
        "all frames to one size.",
        "frames of different sizes",
    ),
]
SOUNDS: list[ROW] = [
    (
        "missing",
        "no.wav",
        "audio 'no.wav' does not exist under the media root '{root}', expected an audio file" + CORRECT,
        "missing file",
    ),
    ("text", "text.wav", "audio 'text.wav' cannot be decoded (Format not recognised)" + NO_SOUND, "not audio"),
    ("empty file", "empty.wav", "audio 'empty.wav' cannot be decoded (Format not recognised)" + NO_SOUND, "not audio"),
    (
        "no samples",
        "silent.wav",
        "audio 'silent.wav' has no samples, expected a sound of at least one" + REPLACE,
        "empty audio",
    ),
    (
        "cut",
        "cut.flac",
        "audio 'cut.flac' cannot be decoded (Error : unknown error in flac decoder)" + NO_SOUND,
        "damaged audio",
    ),
    (
        "pair without a rate",
        ([0.1, 0.2], None),
        "the audio of 2 parts cannot be decoded (it is not a pair of samples and their rate in whole Hz), expected a "
        "complete sound that NumPy can read" + REPLACE,
        "damaged audio",
    ),
    (
        "samples that are no numbers",
        ([0.1, float("nan")], 16_000),
        "the audio of 2 parts cannot be decoded (some samples are no finite numbers), expected a complete sound that "
        "NumPy can read" + REPLACE,
        "damaged audio",
    ),
]
ALL = [
    *((load_image, *row) for row in IMAGES),
    *((load_video, *row) for row in VIDEOS),
    *((load_audio, *row) for row in SOUNDS),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    root = folder / "media"
    for path in (root / "album", folder / "outside"):
        path.mkdir(parents=True)
    for name, content in FILES.items():
        (root / name).write_bytes(content())
    (folder / "outside" / "secret.png").write_bytes(picture("PNG"))
    (root / "link.png").symlink_to(folder / "outside" / "secret.png")
    os.mkfifo(root / "pipe")
    Image.new("RGB", (4, 4)).save(root / "ok.png")
    Image.new("RGB", (9, 4)).save(root / "wide.png")
    return root


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("load", "ref", "sentence", "kind"),
    [(load, ref, sentence, kind) for load, _, ref, sentence, kind in ALL],
    ids=[f"{load.__name__.removeprefix('load_')}: {what}" for load, what, *_ in ALL],
)
def test_gives_its_sentence(root: Path, load: Any, ref: Any, sentence: str, kind: str) -> None:
    def filled(text: str) -> str:
        return text.replace("{root}", str(root)).replace("{outside}", str(root.parent / "outside"))

    if isinstance(ref, str):
        ref = filled(ref)
    if isinstance(ref, FileSlice):
        ref = FileSlice(filled(ref.path), ref.offset, ref.size, ref.name)
    with pytest.raises(MediaError) as caught:
        load(ref, MediaPolicy(root), SOURCE)
    assert str(caught.value) == f"{SOURCE}: {filled(sentence)}"
    assert caught.value.kind == kind


def test_kinds_do_not_depend_on_the_row() -> None:
    kinds = {kind for *_, kind in ALL}
    assert len(kinds) < len(ALL) / 2
    assert all(len(kind) < 30 and kind[0].isalpha() for kind in kinds)
