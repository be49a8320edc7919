"""Videos: frames are counted before decoding, chosen by a formula, exact wherever the decoder starts."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.media.video import VideoInfo, load_video, sample_frames, video_info
from lightning_vlm.media.video_backend import VARIABLE, video_choice
from lightning_vlm.media.video_torchcodec import TorchcodecFile
from lightning_vlm.schema import FileSlice

SOURCE = "file.jsonl:12"
NUM_FRAMES = 50
KINDS = {  # ending: (encoder, pixel format, options)
    "mp4": ("libx264", "yuv420p", {"bf": "2"}),
    "mov": ("mpeg4", "yuv420p", {"qmin": "1", "qmax": "1"}),
    "mkv": ("libx264", "yuv420p", {"bf": "2"}),
    "webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime"}),
    "avi": ("libx264", "yuv420p", {"bf": "2"}),  # whose times come in the order of decoding
    "ts": ("libx264", "yuv420p", {"bf": "2"}),
    "gif": ("gif", "rgb8", {}),
}


def grey(index: int) -> int:
    return 4 * (index % NUM_FRAMES) + 20


def write_video(path: Any, num_frames: int = NUM_FRAMES, size: tuple[int, int] = (48, 64), **options: Any) -> None:
    """A video whose frame number i is of the grey ``grey(i)``, with a keyframe every ten."""
    ending = options.get("ending") or str(path).rpartition(".")[2]
    codec, pixels, more = KINDS[ending]
    names = {"mkv": "matroska", "ts": "mpegts"}
    with av.open(path, "w", format=names.get(ending, ending)) as container:
        stream = container.add_stream(codec, rate=25, options={"sc_threshold": "0", **more})
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 10
        if degrees := options.get("rotation"):
            stream.set_display_rotation(degrees)
        for index in range(num_frames):
            array = np.full((*size, 3), grey(index), dtype=np.uint8)
            if options.get("mark"):
                array[: size[0] // 2, : size[1] // 2] = 255  # the top left quarter is white
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def greys(frames: Any) -> list[int]:
    """The number of each frame, as its colour tells."""
    return [round((float(np.asarray(frame).mean()) - grey(0)) / 4) for frame in frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video of each kind."""
    folder = tmp_path_factory.mktemp("videos")
    for ending in KINDS:
        write_video(str(folder / f"a.{ending}"))
    return folder


@pytest.fixture
def policy(folder: Path) -> MediaPolicy:
    return MediaPolicy(folder)


class TestFiles:
    @pytest.mark.parametrize("ending", KINDS)
    def test_are_counted_without_decoding_and_decoded_in_order(self, policy: MediaPolicy, ending: str) -> None:
        info = video_info(f"a.{ending}", policy, SOURCE)
        assert info == VideoInfo(NUM_FRAMES, 48, 64, 25.0)
        assert info.duration_s == 2.0
        video = load_video(f"a.{ending}", policy, SOURCE)
        assert video.info == info
        assert video.indices == tuple(range(NUM_FRAMES))
        assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (64, 48))}
        assert greys(video.frames) == list(range(NUM_FRAMES))
        assert video.timestamps_s == pytest.approx([index / 25 for index in range(NUM_FRAMES)], abs=1e-3)

    @pytest.mark.parametrize("ending", KINDS)
    def test_are_read_by_the_chosen_backend(
        self, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch, ending: str
    ) -> None:
        """This file's tests run twice, see test_video_backend.py: each time they must meet the one that is meant."""
        decode, served = TorchcodecFile.decode, []

        def counted(file: TorchcodecFile, indices: list[int]) -> Any:
            answer = decode(file, indices)
            served.append(indices)
            return answer

        monkeypatch.setattr(TorchcodecFile, "decode", counted)
        load_video(f"a.{ending}", policy, SOURCE, num_frames=2)
        by_torchcodec = video_choice()[0] == "torchcodec" and ending in ("mp4", "mov", "mkv", "webm")
        assert served == ([[0, NUM_FRAMES - 1]] if by_torchcodec else [])

    @pytest.mark.parametrize("ending", KINDS)
    @pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 49])
    def test_jumping_gives_the_frames_that_decoding_all_gives(
        self, policy: MediaPolicy, ending: str, num_frames: int
    ) -> None:
        everything = load_video(f"a.{ending}", policy, SOURCE)
        some = load_video(f"a.{ending}", policy, SOURCE, num_frames=num_frames)
        assert list(some.indices) == sample_frames(NUM_FRAMES, 25.0, num_frames)
        for index, frame, time in zip(some.indices, some.frames, some.timestamps_s or (), strict=True):
            assert frame.tobytes() == everything.frames[index].tobytes()
            assert time == everything.timestamps_s[index]

    def test_jumping_decodes_less(self, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "pyav")
        monkeypatch.setitem(KINDS, "mp4", ("libx264", "yuv420p", {"bf": "0"}))
        content = io.BytesIO()
        write_video(content, 200, ending="mp4")
        decoded = []

        def counted(container: Any, stream: Any) -> Iterator[Any]:
            for packet in container.demux(stream):
                for frame in packet.decode():
                    decoded.append(frame.pts)
                    yield frame

        monkeypatch.setattr(Seen, "decode", lambda self, stream: counted(self.container, stream), raising=False)
        monkeypatch.setattr(av, "open", Seen.opener(av.open))
        video = load_video(content.getvalue(), policy, SOURCE, num_frames=3)
        assert video.indices == (0, 100, 199)
        assert len(decoded) < 40, "the header's look, and from a keyframe to each of three frames"

    @pytest.mark.parametrize("way", ["bytes", "slice", "path object"])
    def test_come_as_whatever_holds_bytes(self, policy: MediaPolicy, folder: Path, tmp_path: Path, way: str) -> None:
        content = (folder / "a.mp4").read_bytes()
        (tmp_path / "shard.tar").write_bytes(b"x" * 700 + content + b"y" * 900)
        ref = {
            "bytes": content,
            "slice": FileSlice(str(tmp_path / "shard.tar"), 700, len(content), "a.mp4"),
            "path object": Path("a.mp4"),
        }[way]
        assert video_info(ref, policy, SOURCE).num_frames == NUM_FRAMES
        assert greys(load_video(ref, policy, SOURCE, num_frames=2).frames) == [0, NUM_FRAMES - 1]

    @pytest.mark.parametrize("degrees", [90, 180, -90])
    def test_are_upright(self, policy: MediaPolicy, degrees: int) -> None:
        content = io.BytesIO()
        write_video(content, 3, rotation=degrees, mark=True, ending="mp4")
        info = video_info(content.getvalue(), policy, SOURCE)
        frame = np.asarray(load_video(content.getvalue(), policy, SOURCE).frames[0])[..., 0]
        assert frame.shape == (info.height, info.width) == ((48, 64) if degrees == 180 else (64, 48))
        # A turn against the clock takes the white corner from the top left to the bottom left.
        row, column = {90: (-5, 4), 180: (-5, -5), -90: (4, -5)}[degrees]
        assert frame[row, column] > 200
        assert (frame > 200).mean() == pytest.approx(0.25, abs=0.05)

    def test_cut_by_an_edit_list_have_only_the_frames_that_are_shown(self, policy: MediaPolicy, folder: Path) -> None:
        content = io.BytesIO()
        with av.open(str(folder / "a.mov")) as old, av.open(content, "w", format="mp4") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            shift = round(Fraction(12, 25) / old.streams.video[0].time_base)
            for packet in old.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                    new.mux(packet)
        with av.open(io.BytesIO(content.getvalue())) as container:
            assert container.streams.video[0].frames > NUM_FRAMES - 12, "the header's own number counts hidden frames"
        assert video_info(content.getvalue(), policy, SOURCE).num_frames == NUM_FRAMES - 12
        video = load_video(content.getvalue(), policy, SOURCE)
        assert greys(video.frames) == list(range(12, NUM_FRAMES))
        assert video.timestamps_s[0] == 0.0

    def test_of_a_title_that_is_no_utf8_are_read(self, policy: MediaPolicy) -> None:
        content = io.BytesIO()
        with av.open(content, "w", format="mp4") as container:
            container.metadata["title"] = "Caf#"
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode())
        latin = content.getvalue().replace(b"Caf#", "Caf\xe9".encode("latin-1"))
        with pytest.raises(UnicodeDecodeError):
            av.open(io.BytesIO(latin))
        assert len(load_video(latin, policy, SOURCE).frames) == 1

    def test_audio_beside_the_pictures_is_left_alone(self, policy: MediaPolicy) -> None:
        content = io.BytesIO()
        with av.open(content, "w", format="mp4") as container:
            sound = container.add_stream("aac", rate=16_000, layout="mono")
            pictures = container.add_stream("libx264", rate=25)
            pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16_000
            container.mux(sound.encode(samples))
            for index in range(5):
                array = np.full((48, 64, 3), grey(index), dtype=np.uint8)
                container.mux(pictures.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(pictures.encode())
            container.mux(sound.encode())
        assert greys(load_video(content.getvalue(), policy, SOURCE).frames) == [0, 1, 2, 3, 4]


class Seen:
    """A container that passes everything on, so that a test can stand between it and its frames."""

    def __init__(self, container: Any) -> None:
        self.container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *args: object) -> None:
        self.container.close()

    @classmethod
    def opener(cls, original: Any) -> Any:
        return lambda *args, **kwargs: cls(original(*args, **kwargs))


class TestFrameLists:
    images = tuple(Image.new("RGB", (6, 4), (grey(index),) * 3) for index in range(10))

    @pytest.mark.parametrize("as_list", [False, True], ids=["tuple", "list"])
    def test_are_loaded_as_images_are(self, tmp_path: Path, as_list: bool) -> None:
        for index, image in enumerate(self.images):
            image.save(tmp_path / f"{index}.png")
        names: Any = tuple(f"{index}.png" for index in range(10))
        names = list(names) if as_list else names
        video = load_video(names, MediaPolicy(tmp_path), SOURCE, num_frames=4, frames_fps=2.0)
        assert greys(video.frames) == list(video.indices) == [0, 3, 6, 9]
        assert video.timestamps_s == (0.0, 1.5, 3.0, 4.5)
        assert video.info == video_info(names, MediaPolicy(tmp_path), SOURCE, 2.0) == VideoInfo(10, 4, 6, 2.0)

    def test_only_the_chosen_frames_are_read(self, tmp_path: Path) -> None:
        self.images[0].save(tmp_path / "0.png")
        self.images[9].save(tmp_path / "9.png")
        names = tuple(f"{index}.png" for index in range(10))
        assert greys(load_video(names, MediaPolicy(tmp_path), SOURCE, num_frames=2).frames) == [0, 9]

    def test_of_unknown_rate_have_no_times(self, policy: MediaPolicy) -> None:
        video = load_video(self.images, policy, SOURCE, fps=1.0)
        assert video.timestamps_s is None
        assert len(video.frames) == 10
        assert video.info.duration_s is None

    @pytest.mark.parametrize("way", ["numpy", "tensor", "channels first", "PIL"])
    def test_in_memory_are_copied(self, policy: MediaPolicy, way: str) -> None:
        array = np.stack([np.asarray(image) for image in self.images])
        ref = {
            "numpy": array,
            "tensor": torch.from_numpy(array),
            "channels first": torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(),
            "PIL": self.images,
        }[way]
        before = [np.asarray(frame).copy() for frame in ref]
        frames = load_video(ref, policy, SOURCE).frames
        assert greys(frames) == list(range(10))
        for frame in frames:
            frame.paste("red", (0, 0, 6, 4))
        assert all(np.array_equal(np.asarray(frame), old) for frame, old in zip(ref, before, strict=True))


class TestSampling:
    @pytest.mark.parametrize(
        ("total", "source_fps", "num_frames", "fps", "chosen"),
        [
            (5, 25.0, None, None, [0, 1, 2, 3, 4]),
            (50, 25.0, 2, None, [0, 49]),
            (50, 25.0, 1, None, [0]),
            (3, 25.0, 8, None, [0, 1, 2]),
            (50, 25.0, None, 2.0, [0, 12, 25, 37]),
            (51, 25.0, None, 2.0, [0, 12, 25, 37, 50]),
            (30, 10.0, None, 5.0, list(range(0, 30, 2))),
            (30, 10.0, None, 20.0, list(range(30))),
            (30, None, None, 2.0, list(range(30))),
            (300, 30.0, 4, 2.0, [0, 100, 199, 299]),
            (60, 30.0, 8, 2.0, [0, 15, 30, 45]),
            (0, 30.0, 8, 2.0, []),
        ],
    )
    def test_by_hand(
        self, total: int, source_fps: float | None, num_frames: int | None, fps: float | None, chosen: list[int]
    ) -> None:
        assert sample_frames(total, source_fps, num_frames, fps) == chosen

    @settings(max_examples=200, deadline=None)
    @given(
        total=st.integers(1, 5000),
        source_fps=st.one_of(st.none(), st.floats(1, 240)),
        num_frames=st.one_of(st.none(), st.integers(1, 300)),
        fps=st.one_of(st.none(), st.floats(0.1, 60)),
    )
    def test_rises_within_the_video_and_its_limit(
        self, total: int, source_fps: float | None, num_frames: int | None, fps: float | None
    ) -> None:
        chosen = sample_frames(total, source_fps, num_frames, fps)
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        assert chosen[-1] < total
        assert num_frames is None or len(chosen) <= num_frames
        if num_frames is not None and fps is None:
            assert len(chosen) == min(num_frames, total)
            assert num_frames == 1 or chosen[-1] == total - 1
        if fps and source_fps and num_frames is None:
            assert len(chosen) == pytest.approx(min(total, total * fps / source_fps), abs=1)

    @pytest.mark.parametrize(("num_frames", "fps"), [(0, None), (None, 0.0), (None, -1.0)])
    def test_of_nothing_is_a_mistake_of_the_caller(
        self, policy: MediaPolicy, num_frames: int | None, fps: float | None
    ) -> None:
        for call in (
            lambda: sample_frames(5, 25.0, num_frames, fps),
            lambda: load_video("a.mp4", policy, SOURCE, num_frames, fps),
        ):
            with pytest.raises(ValueError, match="expected numbers above zero") as caught:
                call()
            assert not isinstance(caught.value, MediaError)


class TestLimits:
    def test_of_frames(self, folder: Path) -> None:
        strict = MediaPolicy(folder, max_video_frames=10)
        assert len(load_video("a.mp4", strict, SOURCE, num_frames=10).frames) == 10
        assert video_info("a.mp4", strict, SOURCE).num_frames == NUM_FRAMES
        for ref in ("a.mp4", TestFrameLists.images * 2):
            with pytest.raises(MediaError, match="expected at most max_video_frames = 10") as caught:
                load_video(ref, strict, SOURCE)
            assert caught.value.kind == "too many frames"
            with pytest.raises(MediaError) as known:
                video_info(ref, strict, SOURCE, choose=sample_frames)
            assert str(known.value) == str(caught.value), "the header tells it already"
        assert video_info("a.mp4", strict, SOURCE, choose=lambda total, fps: [0, total - 1]).num_frames == NUM_FRAMES

    @pytest.mark.parametrize("function", [load_video, video_info], ids=lambda function: function.__name__)
    def test_of_pixels(self, folder: Path, function: Any) -> None:
        function("a.mp4", MediaPolicy(folder, max_image_pixels=48 * 64), SOURCE)
        with pytest.raises(MediaError, match="64 x 48 = 3,072 pixels") as caught:
            function("a.mp4", MediaPolicy(folder, max_image_pixels=48 * 64 - 1), SOURCE)
        assert caught.value.kind == "too many pixels"


def test_without_pyav_its_extra_is_named(policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "pyav")
    monkeypatch.setitem(sys.modules, "av", None)
    for function in (load_video, video_info):
        with pytest.raises(MediaError, match=r"run: pip install 'lightning-vlm\[video\]'") as caught:
            function("a.mp4", policy, SOURCE)
        assert caught.value.kind == "extra not installed"
    assert len(load_video(TestFrameLists.images, policy, SOURCE).frames) == 10, "images need no extra"
