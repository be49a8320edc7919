"""Sound length -> clips, spectrogram frames and number of tokens, in whole numbers, from the header alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SoundGeometry:
    """How sounds become clips, and clips tokens. The defaults are Nemotron-3-Nano-Omni's.

    Attributes:
        sampling_rate: Samples per second of what is encoded.
        hop_length: Samples between two spectrogram frames.
        subsampling_factor: Spectrogram frames per token, a power of two (each halving rounds up).
        clip_s: Longest clip in seconds: a longer sound is encoded in several, one by one, as vLLM does; ``None``
            encodes it whole, as transformers and Megatron-Bridge do.
        min_clip_s: Shortest clip in seconds: a shorter end is filled up with silence.

    Raises:
        ValueError: If a number is out of its range.
    """

    sampling_rate: int = 16_000
    hop_length: int = 160
    subsampling_factor: int = 8
    clip_s: float | None = 30.0
    min_clip_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "hop_length", "subsampling_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of sounds is {getattr(self, name)}; expected at least 1")
        if self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(f"subsampling_factor of sounds is {self.subsampling_factor}; expected a power of two")
        if self._num_samples(self.min_clip_s) < 2 * self.hop_length:  # a spread needs two frames
            raise ValueError(
                f"min_clip_s is {self.min_clip_s}; expected at least two frames of {self.hop_length} samples"
            )
        if self.clip_s is not None and self.clip_s < self.min_clip_s:
            raise ValueError(f"clip_s is {self.clip_s}; expected at least min_clip_s = {self.min_clip_s}, or none")

    def clip_lengths(self, num_samples: int) -> list[int]:
        """Samples of each clip of a sound, silence at its end included.

        Args:
            num_samples: Of the sound, at ``sampling_rate``.
        """
        shortest = self._num_samples(self.min_clip_s)
        num_samples = max(num_samples, shortest)
        if self.clip_s is None:
            return [num_samples]
        longest = self._num_samples(self.clip_s)
        whole, rest = divmod(num_samples, longest)
        return [longest] * whole + ([max(rest, shortest)] if rest else [])

    def num_frames(self, clip_length: int) -> int:
        """Spectrogram frames of a clip that count; the one more that a centred transform gives is masked."""
        return clip_length // self.hop_length

    def clip_tokens(self, clip_length: int) -> int:
        """Tokens of one clip: its frames halved, each time rounded up, once per factor of two.

        Source: Parakeet's subsampling (kernel 3, stride 2, padding 1). vLLM counts the same frames; transformers counts
        the masked one too, which is one token more whenever the frames are a multiple of ``subsampling_factor``.

        Args:
            clip_length: Samples of the clip.
        """
        return -(-self.num_frames(clip_length) // self.subsampling_factor)

    def num_tokens(self, num_samples: int) -> int:
        """Language-model tokens of a sound, start and end markers not counted.

        Args:
            num_samples: Of the sound, at ``sampling_rate``.
        """
        return sum(self.clip_tokens(length) for length in self.clip_lengths(num_samples))

    def _num_samples(self, seconds: float) -> int:
        return round(seconds * self.sampling_rate)
