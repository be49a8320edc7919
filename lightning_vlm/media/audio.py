"""From a reference to the samples of a sound: WAV, FLAC, MP3, OGG, or an array with its rate.

Models hear one channel at one rate, so channels are averaged and the rate is changed here, by a polyphase filter
(SciPy's); lengths are exact from the header, before anything is decoded. What soundfile does not read (AAC, the sound
track of a video) is refused rather than handed to a second decoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_vlm.media.mp3 import with_length
from lightning_vlm.media.open import open_media
from lightning_vlm.media.policy import MediaError, MediaPolicy, describe, not_installed, undecodable

if TYPE_CHECKING:
    from soundfile import SoundFile


_UNKNOWN_SIZE = 0x7FFF_F000
"""From here on the size in a WAV file's header is a stand-in of what wrote it as a stream (SoX; FFmpeg: all ones)."""


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a sound says of itself.

    Attributes:
        num_samples: Samples of each channel.
        sampling_rate: Samples per second.
        num_channels: Channels.
    """

    num_samples: int
    sampling_rate: int
    num_channels: int

    @property
    def duration_s(self) -> float:
        """Its length in seconds."""
        return self.num_samples / self.sampling_rate

    def num_samples_at(self, sampling_rate: int) -> int:
        """Samples after `load_audio` has changed the rate.

        Args:
            sampling_rate: The rate asked for.
        """
        return -(-self.num_samples * sampling_rate // self.sampling_rate)


def audio_info(ref: Any, policy: MediaPolicy, source: str) -> AudioInfo:
    """Length, rate and channels of a sound, from the header alone.

    Args:
        ref: As for `load_audio`.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.

    Raises:
        MediaError: As for `load_audio`, except for damage that only decoding reveals.
    """
    with _opened(ref, policy, source) as (info, _):
        return info


def load_audio(ref: Any, policy: MediaPolicy, source: str, sampling_rate: int = 16_000) -> tuple[Tensor, int]:
    """Decodes a sound to one channel at one rate.

    Args:
        ref: Path, ``data:`` URI or address of a sound file; its bytes; a `FileSlice`; or a pair (samples, sampling
            rate), of shape ``(n,)``, ``(channels, n)`` or ``(n, channels)`` (the shorter side is the channels'), where
            whole numbers are scaled by their type's range.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.
        sampling_rate: Samples per second of what is returned.

    Returns:
        ``(num_samples,)`` float32 samples, a copy, the loudest possible at 1; and their sampling rate.

    Raises:
        MediaError: If the sound is missing, not allowed, unreadable, cut off, empty or too long.
    """
    what = describe(ref, "audio")
    with _opened(ref, policy, source) as (info, read):
        samples = read()
        if len(samples) != info.num_samples:
            raise MediaError(
                source,
                f"{what} ends after {len(samples):,} of {info.num_samples:,} samples, expected a complete sound",
                "replace the file or remove the row",
                "damaged audio",
            )
        if not np.isfinite(samples).all():
            raise ValueError("some samples are no finite numbers")
        mono = samples.mean(axis=1, dtype=np.float32)
        if sampling_rate != info.sampling_rate:
            mono = _resampled(mono, info.sampling_rate, sampling_rate, what, source)
        return torch.from_numpy(mono), sampling_rate


@contextmanager
def _opened(ref: Any, policy: MediaPolicy, source: str) -> Iterator[tuple[AudioInfo, Any]]:
    """What a sound says of itself, and a function that gives its samples ``(n, channels)``."""
    what = describe(ref, "audio")
    if isinstance(ref, list | tuple):
        try:
            samples, info = _from_pair(ref)
            _check_length(info, policy, what, source)
            yield info, lambda: _as_float(samples)
        except MediaError:
            raise
        except (TypeError, ValueError) as error:
            raise undecodable(error, what, "audio", source, "NumPy") from error
        return
    try:
        import soundfile  # noqa: F401  see `_sound_file`
    except (ImportError, OSError) as error:  # OSError: without its libsndfile
        raise not_installed(what, "soundfile", "lightning-vlm[audio]", source) from error
    with open_media(ref, policy, source, "audio") as stream:
        try:
            _check_complete(stream, what, source)
            with _sound_file(stream) as file:
                info = AudioInfo(file.frames, file.samplerate, file.channels)
                _check_length(info, policy, what, source)
                yield info, lambda: file.read(dtype="float32", always_2d=True)
        except MediaError:
            raise
        except Exception as error:  # libsndfile's and ours alike
            raise undecodable(error, what, "audio", source, "libsndfile") from error


def _check_complete(stream: BinaryIO, what: str, source: str) -> None:
    """Refuses a WAV file that was cut off: libsndfile reads what is left of it as if it were all."""
    start = stream.read(12)
    order: Literal["little", "big"] = "big" if start.startswith(b"RIFX") else "little"
    if start[:4] in (b"RIFF", b"RIFX") and start[8:] == b"WAVE":
        while len(chunk := stream.read(8)) == 8:
            size, place = int.from_bytes(chunk[4:], order), stream.tell()
            if chunk[:4] != b"data":
                stream.seek(place + size + size % 2)
                continue
            found = stream.seek(0, os.SEEK_END) - place
            if found < size < _UNKNOWN_SIZE:
                raise MediaError(
                    source,
                    f"{what} ends after {found:,} of {size:,} bytes of samples, expected a complete sound",
                    "replace the file or remove the row",
                    "damaged audio",
                )
            break
    stream.seek(0)


def _sound_file(stream: BinaryIO) -> SoundFile:
    from soundfile import SoundFile

    file = SoundFile(stream)
    if file.format != "MP3":
        return file
    file.close()
    return SoundFile(with_length(stream))


def _check_length(info: AudioInfo, policy: MediaPolicy, what: str, source: str) -> None:
    if not info.num_samples:
        raise MediaError(
            source,
            f"{what} has no samples, expected a sound of at least one",
            "replace the file or remove the row",
            "empty audio",
        )
    if info.duration_s > policy.max_audio_s:
        raise MediaError(
            source,
            f"{what} lasts {info.duration_s:,.1f} s, expected at most max_audio_s = {policy.max_audio_s:,.1f}",
            "cut the sound or raise data.max_audio_s",
            "audio too long",
        )


def _from_pair(ref: Any) -> tuple[np.ndarray, AudioInfo]:
    if len(ref) != 2 or not isinstance(ref[1], int | np.integer) or isinstance(ref[1], bool) or ref[1] < 1:
        raise ValueError("it is not a pair of samples and their rate in whole Hz")
    samples = np.asarray(ref[0].detach().cpu() if isinstance(ref[0], Tensor) else ref[0])
    if samples.ndim not in (1, 2):
        raise ValueError(f"its samples have shape {samples.shape}")
    if samples.ndim == 1 or not samples.size:  # of channels without samples neither side is the shorter one
        samples = samples.reshape(-1, 1)
    samples = samples.T if samples.shape[0] < samples.shape[1] and samples.size else samples
    return samples, AudioInfo(samples.shape[0], int(ref[1]), samples.shape[1])


def _as_float(samples: np.ndarray) -> np.ndarray:
    """A float32 copy; whole numbers scaled to -1..1, unsigned bytes around 128 as in WAV files."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if samples.dtype.kind != "f":
        raise ValueError(f"its samples are {samples.dtype}")
    return samples.astype(np.float32)


def _resampled(samples: np.ndarray, rate: int, target: int, what: str, source: str) -> np.ndarray:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise not_installed(what, f"SciPy to go from {rate} to {target} Hz", "lightning-vlm[audio]", source) from error
    # Measured from 48 to 16 kHz: 7 kHz keep 97 % of their strength, 7.5 kHz 81 %; of 9 kHz 3 % come through.
    common = math.gcd(rate, target)
    return resample_poly(samples, target // common, rate // common).astype(np.float32, copy=False)
