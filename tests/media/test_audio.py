"""Sounds: one channel at one rate, as long as the header said."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.media.audio import AudioInfo, audio_info, load_audio
from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.schema import FileSlice

SOURCE = "file.jsonl:12"
RATE = 16_000


def tone(hertz: float, rate: int = RATE, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.fixture
def policy(tmp_path: Path) -> MediaPolicy:
    return MediaPolicy(tmp_path)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=kind, subtype=subtype)
    return content.getvalue()


class TestFiles:
    @pytest.mark.parametrize(("kind", "worst"), [("WAV", 1 / 32768), ("FLAC", 1 / 32768), ("OGG", 0.05), ("MP3", 0.05)])
    def test_are_decoded_and_as_long_as_announced(self, policy: MediaPolicy, kind: str, worst: float) -> None:
        original = tone(440)
        (Path(policy.media_root) / "a").write_bytes(encoded(original, kind=kind))
        info = audio_info("a", policy, SOURCE)
        samples, rate = load_audio("a", policy, SOURCE)
        assert rate == RATE
        assert samples.dtype == torch.float32
        assert samples.shape == (info.num_samples,) == (len(original),)
        assert info == AudioInfo(len(original), RATE, 1)
        assert info.duration_s == 0.5
        assert np.abs(samples.numpy() - original).max() < worst

    @pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
    def test_of_any_depth_are_floats_up_to_one(self, policy: MediaPolicy, subtype: str) -> None:
        samples, _ = load_audio(encoded(tone(440), subtype=subtype), policy, SOURCE)
        assert np.abs(samples.numpy() - tone(440)).max() < 0.01

    @pytest.mark.parametrize("way", ["bytes", "slice", "path object"])
    def test_come_as_whatever_holds_bytes(self, policy: MediaPolicy, tmp_path: Path, way: str) -> None:
        content = encoded(tone(440))
        (tmp_path / "a.wav").write_bytes(content)
        (tmp_path / "shard.tar").write_bytes(b"x" * 512 + content + b"y" * 512)
        ref: Any = {
            "bytes": content,
            "slice": FileSlice(str(tmp_path / "shard.tar"), 512, len(content), "a.wav"),
            "path object": Path("a.wav"),
        }[way]
        assert audio_info(ref, policy, SOURCE) == AudioInfo(RATE // 2, RATE, 1)
        assert torch.equal(load_audio(ref, policy, SOURCE)[0], load_audio("a.wav", policy, SOURCE)[0])

    def test_limit_of_length_holds_before_decoding(self, tmp_path: Path) -> None:
        silence = encoded(np.zeros(RATE * 20, dtype=np.int16), kind="FLAC")
        assert len(silence) < 20_000
        for function in (load_audio, audio_info):
            function(silence, MediaPolicy(tmp_path, max_audio_s=20.0), SOURCE)
            with pytest.raises(MediaError, match=r"lasts 20.0 s, expected at most max_audio_s = 19.9") as caught:
                function(silence, MediaPolicy(tmp_path, max_audio_s=19.9), SOURCE)
            assert caught.value.kind == "audio too long"


class TestCutOff:
    """libsndfile reads what is left of a WAV file as if it were all."""

    @staticmethod
    def damaged(content: bytes, size: int | None = None, keep: int | None = None) -> bytes:
        place = content.index(b"data") + 4
        order: Any = "big" if content.startswith(b"RIFX") else "little"
        header = content[:place] + (content[place : place + 4] if size is None else size.to_bytes(4, order))
        return (header + content[place + 4 :])[:keep]

    @pytest.mark.parametrize("way", ["bytes", "slice"])
    @pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RIFX"])
    def test_wav_is_refused_by_its_header(self, policy: MediaPolicy, tmp_path: Path, kind: str, way: str) -> None:
        stream = io.BytesIO()
        options = {"format": "WAV", "endian": "BIG"} if kind == "RIFX" else {"format": kind}
        soundfile.write(stream, tone(440), RATE, subtype="PCM_16", **options)
        ref: Any = self.damaged(stream.getvalue(), keep=9000)
        if way == "slice":
            (tmp_path / "shard.tar").write_bytes(b"x" * 512 + ref + b"y" * 99_999)
            ref = FileSlice(str(tmp_path / "shard.tar"), 512, len(ref), "a.wav")
        for function in (audio_info, load_audio):
            with pytest.raises(MediaError, match=r"ends after 8,9\d\d of 16,000 bytes of samples") as caught:
                function(ref, policy, SOURCE)
            assert caught.value.kind == "damaged audio"

    @pytest.mark.parametrize("size", [0xFFFFFFFF, 0x80000000, 0x7FFFF000])
    def test_wav_of_a_stream_is_read_to_its_end(self, policy: MediaPolicy, size: int) -> None:
        content = encoded(tone(440))
        content = content[:4] + size.to_bytes(4, "little") + content[8:]
        ref = self.damaged(content, size)
        assert audio_info(ref, policy, SOURCE).num_samples == len(load_audio(ref, policy, SOURCE)[0]) == RATE // 2

    def test_wav_with_chunks_around_its_samples_is_whole(self, policy: MediaPolicy) -> None:
        content = encoded(tone(440))
        place = content.index(b"data")
        notes = b"LIST" + (5).to_bytes(4, "little") + b"abcde\0"  # of odd length, which is filled up
        ref = content[:place] + notes + content[place:] + notes
        assert audio_info(ref, policy, SOURCE).num_samples == RATE // 2
        odd = encoded(tone(440)[:4001], subtype="PCM_U8").rstrip(b"\0")  # writers leave the filling out
        assert audio_info(odd, policy, SOURCE).num_samples == 4001


class TestChannels:
    @pytest.mark.parametrize("channels", [2, 5])
    def test_are_averaged(self, policy: MediaPolicy, channels: int) -> None:
        many = np.stack([tone(200 * (n + 1)) for n in range(channels)], axis=1)
        content = encoded(many, subtype="FLOAT")
        assert audio_info(content, policy, SOURCE).num_channels == channels
        samples, _ = load_audio(content, policy, SOURCE)
        assert np.allclose(samples.numpy(), many.mean(axis=1), atol=1e-6)

    @pytest.mark.parametrize("way", ["last", "first", "tensor"])
    def test_of_arrays_are_the_shorter_side(self, policy: MediaPolicy, way: str) -> None:
        stereo = np.stack([tone(200), tone(400)], axis=1)
        ref: Any = {"last": stereo, "first": stereo.T, "tensor": torch.from_numpy(stereo.T.copy())}[way]
        assert audio_info((ref, RATE), policy, SOURCE) == AudioInfo(RATE // 2, RATE, 2)
        assert np.allclose(load_audio((ref, RATE), policy, SOURCE)[0].numpy(), stereo.mean(axis=1), atol=1e-6)


class TestArrays:
    @pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64", "uint8"])
    def test_are_scaled_by_their_type_as_files_are(self, policy: MediaPolicy, dtype: str) -> None:
        scale = {"int16": 2**15, "int32": 2**31, "uint8": 128}.get(dtype, 1)
        values = (tone(440).astype(np.float64) * scale + (128 if dtype == "uint8" else 0)).astype(dtype)
        samples, _ = load_audio((values, RATE), policy, SOURCE)
        assert samples.dtype == torch.float32
        assert np.abs(samples.numpy() - tone(440)).max() < 0.01

    def test_a_list_of_numbers_is_one(self, policy: MediaPolicy) -> None:
        samples, _ = load_audio(([0.0, 0.5, -0.5], RATE), policy, SOURCE)
        assert samples.tolist() == [0.0, 0.5, -0.5]

    @pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 2), (1, 0), (2, 0), (0, 0)])
    def test_without_samples_are_empty(self, policy: MediaPolicy, shape: tuple[int, ...]) -> None:
        for function in (load_audio, audio_info):
            with pytest.raises(MediaError, match="has no samples, expected a sound of at least one") as caught:
                function((np.zeros(shape, np.float32), RATE), policy, SOURCE)
            assert caught.value.kind == "empty audio"

    def test_are_copied(self, policy: MediaPolicy) -> None:
        original = tone(440)
        samples, _ = load_audio((original, RATE), policy, SOURCE)
        samples.zero_()
        assert np.array_equal(original, tone(440))


class TestRate:
    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 44_101])
    def test_is_changed_without_changing_the_sound(self, policy: MediaPolicy, rate: int) -> None:
        content = encoded(tone(440, rate), rate, subtype="FLOAT")
        samples, given = load_audio(content, policy, SOURCE)
        assert given == RATE
        inside = slice(400, 7600)  # the filter reaches over the ends
        # Measured: 7.3e-4 from 8,000 Hz, 4.2e-4 at most from the others.
        assert np.abs(samples.numpy()[inside] - tone(440)[: len(samples)][inside]).max() < 1e-3

    def test_too_high_for_the_new_rate_is_silenced_not_folded(self, policy: MediaPolicy) -> None:
        samples, _ = load_audio((tone(15_000, 48_000), 48_000), policy, SOURCE)
        assert samples[400:-400].abs().max() < 2e-3  # folded, it would be a tone of 1,000 Hz at 0.5

    @settings(max_examples=100, deadline=None)
    @given(length=st.integers(1, 2000), rate=st.integers(1000, 50_000), target=st.sampled_from([8_000, 16_000, 44_100]))
    def test_length_is_known_before(self, length: int, rate: int, target: int) -> None:
        policy = MediaPolicy(".")
        pair = (np.zeros(length, dtype=np.float32), rate)
        samples, _ = load_audio(pair, policy, SOURCE, target)
        assert len(samples) == audio_info(pair, policy, SOURCE).num_samples_at(target)

    def test_that_is_right_is_left_alone(self, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "scipy.signal", None)
        assert np.array_equal(load_audio((tone(440), RATE), policy, SOURCE)[0].numpy(), tone(440))
        with pytest.raises(MediaError, match="needs SciPy to go from 16000 to 8000 Hz") as caught:
            load_audio((tone(440), RATE), policy, SOURCE, 8_000)
        assert caught.value.kind == "extra not installed"


def test_without_soundfile_its_extra_is_named(policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for function in (load_audio, audio_info):
        with pytest.raises(MediaError, match=r"run: pip install 'lightning-vlm\[audio\]'") as caught:
            function(b"RIFF", policy, SOURCE)
        assert caught.value.kind == "extra not installed"
    assert len(load_audio((tone(440), RATE), policy, SOURCE)[0]) == RATE // 2, "arrays need no extra"
