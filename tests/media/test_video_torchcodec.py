"""torchcodec beside PyAV: equal frames, times and sentences; and what it leaves to PyAV, it leaves untouched.

Runs where torchcodec can be loaded: in the process that test_video_backend.py starts, or with FFmpeg on the system.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.media.video import Video, load_video, video_info
from lightning_vlm.media.video_backend import VARIABLE, torchcodec_obstacle
from lightning_vlm.media.video_torchcodec import TorchcodecFile, _is_matroska, _is_mp4, _Reader

if torchcodec_obstacle():
    pytest.skip(torchcodec_obstacle(), allow_module_level=True)

SOURCE = "file.jsonl:12"
POLICY = MediaPolicy(".", max_image_pixels=100_000)
UNEVEN_MS = (0, 40, 80, 200, 240, 400, 1000, 1040)
NTSC = Fraction(30_000, 1_001)


def scene(index: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """Slanted colours that move."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 5 + index * 7, y * 3 + index * 11, (x + y) * 2 + index * 5], -1).astype(np.uint8)


def film(kind: str = "mp4", codec: str = "libx264", num_frames: int = 40, **options: Any) -> bytes:
    """A film of so many scenes, with a keyframe every ten."""
    content = io.BytesIO()
    height, width = options.get("size", (48, 64))
    times = options.get("times_ms")
    with av.open(content, "w", format=kind, options=options.get("container", {})) as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono") if options.get("sound_first") else None
        stream = container.add_stream(codec, rate=options.get("rate", 25), options=options.get("encoder", {"bf": "2"}))
        stream.height, stream.width, stream.pix_fmt = height, width, options.get("pixels", "yuv420p")
        stream.codec_context.gop_size = 10
        if "matrix" in options:
            stream.codec_context.colorspace = options["matrix"]
        if "rotation" in options:
            stream.set_display_rotation(options["rotation"])
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16_000
            container.mux([*sound.encode(silence), *sound.encode()])
        packets: list[av.Packet] = []
        for index in range(len(times or range(num_frames))):
            frame = av.VideoFrame.from_ndarray(scene(index, height, width), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        if "held" in options:
            packets[-1].duration = options["held"]
        container.mux(packets)
    return content.getvalue()


def growing_film(size: tuple[int, int]) -> bytes:
    """A film whose frames are larger than its header says, from the fourth on."""

    def picture(height: int, width: int) -> bytes:
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = height, width, "yuvj420p", Fraction(1, 25)
        frame = av.VideoFrame.from_ndarray(scene(0, height, width), format="rgb24")
        return bytes(encoder.encode(frame)[0])

    content = io.BytesIO()
    with av.open(content, "w", format="mov") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for index in range(10):
            packet = av.Packet(picture(48, 64) if index < 3 else picture(*size))
            packet.pts = packet.dts = index
            packet.time_base, packet.duration, packet.is_keyframe, packet.stream = Fraction(1, 25), 1, True, stream
            container.mux(packet)
    return content.getvalue()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Video | str, bool]]:
    """Reads with one of them: the video, or the sentence; and whether it was torchcodec that decoded."""
    served: list[int] = []
    decode = TorchcodecFile.decode

    def counted(file: TorchcodecFile, indices: list[int]) -> Any:
        answer = decode(file, indices)
        served.append(len(indices))
        return answer

    monkeypatch.setattr(TorchcodecFile, "decode", counted)

    def by(backend: str, content: bytes, **how: Any) -> tuple[Video | str, bool]:
        monkeypatch.setenv(VARIABLE, backend)
        served.clear()
        try:
            return load_video(content, POLICY, SOURCE, **how), bool(served)
        except MediaError as error:
            return str(error), bool(served)

    return by


def worst_difference(one: Video, other: Video) -> int:
    """Of any colour of any pixel."""
    pairs = zip(one.frames, other.frames, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


SERVED = {
    "MP4 with B-frames": {},
    "MOV of MPEG-4": {"kind": "mov", "codec": "mpeg4", "encoder": {}},
    "Matroska with B-frames": {"kind": "matroska"},
    "WebM": {"kind": "webm", "codec": "libvpx-vp9", "encoder": {"deadline": "realtime"}},
    "MP4 of 29.97 frames": {"rate": NTSC, "num_frames": 97},
    "Matroska of 29.97 frames": {"kind": "matroska", "rate": NTSC, "num_frames": 97},
    "Matroska of 2 frames": {"kind": "matroska", "rate": 2},
    "turned left": {"rotation": 90},
    "turned right, odd rows of chroma": {"rotation": -90, "size": (50, 66)},
    "upside down": {"rotation": 180},
    "odd width": {"codec": "libvpx-vp9", "size": (48, 65), "encoder": {"deadline": "realtime"}},
    "BT.709": {"matrix": 1},
    "full range": {"codec": "mjpeg", "pixels": "yuvj420p", "encoder": {}},
    "open groups": {"encoder": {"bf": "2", "x264-params": "open-gop=1:keyint=8"}},
    "one frame": {"num_frames": 1},
    "one frame in Matroska": {"kind": "matroska", "num_frames": 1},
}
LEFT_TO_PYAV = {  # with what is said of them in the log
    "AVI": ({"kind": "avi"}, "neither MP4 nor Matroska"),
    "MPEG-TS": ({"kind": "mpegts"}, "neither MP4 nor Matroska"),
    "uneven MP4": ({"times_ms": UNEVEN_MS}, "variable frame rate"),
    "uneven Matroska": ({"kind": "matroska", "times_ms": UNEVEN_MS}, "variable frame rate"),
    "MP4 whose last frame is held": ({"encoder": {"bf": "0"}, "held": 10}, "variable frame rate"),
    "Matroska that states no rate": ({"kind": "matroska", "rateless": True}, "states no rate"),
    "odd height": ({"codec": "libvpx-vp9", "size": (47, 64), "encoder": {"deadline": "realtime"}}, "64 x 47"),
    "ten bits": ({"pixels": "yuv420p10le"}, "pixels of yuv420p10le"),
    "RGB": ({"codec": "libx264rgb", "pixels": "rgb24"}, "pixels of gbrp"),
    "turned half way": ({"rotation": 45}, "turned by 45"),
    "turned in Matroska": ({"kind": "matroska", "rotation": 90}, "turned by 90"),
    "fragmented": ({"container": {"movflags": "frag_keyframe+empty_moov"}}, "40 frames, None in the header"),
    "sound first": ({"sound_first": True}, "does not begin with its pictures"),
}


def left_to_pyav(what: str) -> bytes:
    options = dict(LEFT_TO_PYAV[what][0])
    rateless = options.pop("rateless", False)
    content = film(**options)
    # The element that holds the rate gets the name of one that is to be skipped.
    return content.replace(b"\x23\xe3\x83", b"\x23\xe3\x84") if rateless else content


@pytest.mark.parametrize("how", [{}, {"num_frames": 3}, {"fps": 7.7}], ids=["all", "three", "by rate"])
@pytest.mark.parametrize("what", [*SERVED, *LEFT_TO_PYAV])
def test_both_give_the_same_frames_at_the_same_times(read: Any, what: str, how: dict[str, Any]) -> None:
    content = film(**SERVED[what]) if what in SERVED else left_to_pyav(what)
    ours, served = read("torchcodec", content, **how)
    theirs, _ = read("pyav", content, **how)
    assert served is (what in SERVED)
    assert ours.info == theirs.info
    assert ours.indices == theirs.indices
    assert ours.timestamps_s == theirs.timestamps_s
    assert worst_difference(ours, theirs) == 0, "measured: 0 of 255 in all of these, with one FFmpeg below both"


@pytest.mark.parametrize("what", LEFT_TO_PYAV)
def test_why_a_file_is_left_to_pyav(what: str) -> None:
    with pytest.raises(ValueError, match=LEFT_TO_PYAV[what][1]):
        TorchcodecFile(io.BytesIO(left_to_pyav(what)), POLICY, "it", SOURCE)


def test_a_frame_that_is_missing_is_not_replaced_by_the_next_one(read: Any) -> None:
    """VP8 marks frames that are not to be shown: FFmpeg gives none, and no error."""

    content = bytearray(film("webm", "libvpx", encoder={"deadline": "realtime"}))
    with av.open(io.BytesIO(content)) as container:
        sixth = bytes(list(container.demux(video=0))[5])
    content[content.index(sixth)] &= ~0x10
    for chosen, by_torchcodec in (([4], True), ([6], True), ([5], False), ([0, 5, 7], False)):
        how = {"choose": lambda total, fps, chosen=chosen: chosen}
        (ours, served), (theirs, _) = (read(backend, bytes(content), **how) for backend in ("torchcodec", "pyav"))
        assert served is by_torchcodec
        assert ours.timestamps_s == theirs.timestamps_s
        assert worst_difference(ours, theirs) == 0


@pytest.mark.parametrize("size", [(96, 128), (400, 400)], ids=["allowed", "above the limit"])
def test_frames_larger_than_the_header_says_are_refused_alike(read: Any, size: tuple[int, int]) -> None:
    ours, theirs = (read(backend, growing_film(size), num_frames=2)[0] for backend in ("torchcodec", "pyav"))
    assert isinstance(ours, str)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_damaged_files_are_read_or_refused_alike(read: Any, kind: str) -> None:
    whole, chance = film(kind), random.Random(0)
    answers = set()
    for number in range(40):
        damaged, start = bytearray(whole), chance.randrange(20, len(whole))
        damaged[start : len(whole) if number % 2 else start + chance.randrange(300)] = b""
        ours, theirs = (read(backend, bytes(damaged), num_frames=9)[0] for backend in ("torchcodec", "pyav"))
        if isinstance(ours, Video) and isinstance(theirs, Video):
            assert (ours.info, ours.timestamps_s) == (theirs.info, theirs.timestamps_s)
            assert worst_difference(ours, theirs) == 0
        else:
            assert ours == theirs
        answers.add(type(ours))
    assert answers == {str, Video}


def matroska_of(header: bytes) -> bytes:
    return b"\x1a\x45\xdf\xa3" + (0x4000 | len(header)).to_bytes(2) + header


MANIFEST = b'<MPD profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
PLAYLISTS = {
    "HLS": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.0,\na.ts\n",
    "HLS that says it is MP4": b"#EXTftypisom\n",
    "concat": b"ffconcat version 1.0\nfile 'a.mp4'\n",
    "DASH": MANIFEST,
    "DASH behind Matroska's mark": matroska_of(MANIFEST),
    "DASH behind Matroska's mark, its name outside": matroska_of(MANIFEST) + b"matroska",
    "Matroska's mark alone": b"\x1a\x45\xdf\xa3",
    "Matroska of an impossible length": b"\x1a\x45\xdf\xa3\0" + b"matroska" * 9,
    "network session": b"v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("what", PLAYLISTS)
def test_no_playlist_reaches_torchcodec(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """It has no list of formats: it would open the files and the network that one names."""
    from torchcodec import decoders

    reached = []
    monkeypatch.setattr(decoders, "VideoDecoder", lambda *args, **options: reached.append(args))
    monkeypatch.setenv(VARIABLE, "torchcodec")
    for content in (PLAYLISTS[what], PLAYLISTS[what] + bytes(4000)):
        with pytest.raises(MediaError):
            load_video(content, POLICY, SOURCE)
    assert not reached


def test_formats_are_told_by_their_first_bytes() -> None:
    assert _is_mp4(film()[:64])
    assert not _is_matroska(film()[:64])
    for kind in ("matroska", "webm"):
        head = film(kind, "libvpx-vp9", 1, encoder={"deadline": "realtime"})[:64]
        assert _is_matroska(head)
        assert not _is_mp4(head)


def test_the_limit_of_pixels_comes_before_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    for rotation in (0, 90):
        with pytest.raises(MediaError, match="has 640 x 480 = 307,200 pixels"):
            TorchcodecFile(io.BytesIO(film(num_frames=1, size=(480, 640), rotation=rotation)), POLICY, "it", SOURCE)


def test_a_stream_that_breaks_raises_its_own_error() -> None:
    class Breaking(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            if self.reads > 2:
                raise ConnectionResetError("gone")
            return super().read(size)

    with pytest.raises(ConnectionResetError, match="gone"):
        TorchcodecFile(Breaking(film()), POLICY, "it", SOURCE)
    reader = _Reader(Breaking(film()))
    assert [len(reader.read(9)) for _ in range(3)] == [9, 9, 0], "nothing is raised within FFmpeg"
    assert reader.seek(-1, 0) == -1
    with pytest.raises(ValueError, match="negative seek"):
        reader.check()


def test_headers_are_read_by_pyav_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = film()
    monkeypatch.setenv(VARIABLE, "torchcodec")
    known = video_info(content, POLICY, SOURCE)
    monkeypatch.setattr("lightning_vlm.media.video_torchcodec.TorchcodecFile", None)
    assert video_info(content, POLICY, SOURCE) == known


def test_alone_it_reads_what_it_is_sure_of(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: film(kind=name) for name in ("mp4", "avi")}
    monkeypatch.setenv(VARIABLE, "torchcodec")
    monkeypatch.setitem(sys.modules, "av", None)
    video = load_video(files["mp4"], POLICY, SOURCE, num_frames=2)
    assert video.indices == (0, 39)
    assert video.info == video_info(files["mp4"], POLICY, SOURCE)
    with pytest.raises(MediaError, match="needs PyAV, which is not installed") as caught:
        load_video(files["avi"], POLICY, SOURCE)
    assert str(caught.value.__cause__) == "neither MP4 nor Matroska"
