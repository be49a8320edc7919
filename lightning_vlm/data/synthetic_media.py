"""Two small tasks that need a video or a sound: digits that are shown one after another, and beeps to be counted.

    videos   one to three scanned digits, each held for four frames; "Which digits did you see?"
    beeps    one to five beeps in noise, in a second and a half of sound; "How many beeps?"

The scans are those of `lightning_vlm.data.synthetic`, in the same splits; a video is a list of frames, so nothing has
to encode or decode one. Held frames repeat themselves: efficient video sampling can leave half of them out for nothing.

    python -m lightning_vlm.data.synthetic_media videos data/digits_video
    python -m lightning_vlm.data.synthetic_media beeps data/beeps
"""

from __future__ import annotations

import argparse
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_vlm.data.synthetic import SIDE, split_scans
from lightning_vlm.processing.tiny import TINY_SOUND, TINY_VIDEO, tiny_processor, tiny_tokenizer

ROWS: dict[str, dict[str, int]] = {
    "videos": {"train": 3200, "val": 60, "heldout": 200},
    "beeps": {"train": 4000, "val": 100, "heldout": 200},
}
FRAMES_PER_DIGIT = 4
RATE_HZ = 16_000
SOUND_S = 1.6
BEEP_S = 0.08


def write_videos(folder: Path, seed: int = 0, progress: bool = True) -> None:
    """Writes rows, frames, and a processor and config for a tiny model that sees videos.

    Args:
        folder: Receives ``train``, ``val``, ``heldout`` and ``model``.
        seed: Of the split and the mixture.
        progress: Show a progress bar.
    """
    splits = split_scans(seed)

    def prepare(split: str) -> None:
        (folder / split / "frames").mkdir(parents=True, exist_ok=True)
        for scan in range(len(splits[split])):
            splits[split].image(scan).save(folder / split / "frames" / f"{scan:04d}.png")

    def row(split: str, index: int, generator: np.random.Generator) -> dict[str, Any]:
        scans = splits[split]
        shown = generator.integers(len(scans), size=generator.integers(1, 4))
        frames = [f"frames/{scan:04d}.png" for scan in shown for _ in range(FRAMES_PER_DIGIT)]
        answer = "".join(str(scans.digits[scan]) for scan in shown)
        return _row({"type": "video", "video": frames}, "Which digits did you see?", answer)

    _write_rows(folder, "videos", seed, progress, prepare, row)
    _write_model(folder / "model", video={**TINY_VIDEO, "target_num_patches": (SIDE // 8) ** 2})


def write_beeps(folder: Path, seed: int = 0, progress: bool = True) -> None:
    """Writes rows, sounds, and a processor and config for a tiny model that hears.

    Args:
        folder: Receives ``train``, ``val``, ``heldout`` and ``model``.
        seed: Of the sounds.
        progress: Show a progress bar.
    """

    def prepare(split: str) -> None:
        (folder / split / "sounds").mkdir(parents=True, exist_ok=True)

    def row(split: str, index: int, generator: np.random.Generator) -> dict[str, Any]:
        count = int(generator.integers(1, 6))
        name = f"sounds/{index:04d}.wav"
        _write_wav(folder / split / name, beeps(count, generator))
        return _row({"type": "audio", "audio": name}, "How many beeps?", str(count))

    _write_rows(folder, "beeps", seed, progress, prepare, row)
    _write_model(folder / "model", sound=TINY_SOUND)


def beeps(count: int, generator: np.random.Generator) -> np.ndarray:
    """A sound with so many beeps.

    Args:
        count: Beeps, with pauses of at least half their length.
        generator: Chooses their pitch, their places and the noise.

    Returns:
        ``(SOUND_S * RATE_HZ,)`` float32 samples in -1..1.
    """
    length = round(BEEP_S * RATE_HZ)
    slots = int(SOUND_S * RATE_HZ) // (2 * length)
    sound = 0.02 * generator.standard_normal(int(SOUND_S * RATE_HZ))
    time = np.arange(length) / RATE_HZ
    for slot in generator.choice(slots, size=count, replace=False):
        start = int(slot) * 2 * length + int(generator.integers(length // 2))
        sound[start : start + length] += 0.5 * np.sin(2 * np.pi * generator.uniform(400, 1600) * time)
    return sound.clip(-1, 1).astype(np.float32)


def _row(medium: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    user = [medium, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def _write_rows(
    folder: Path,
    task: str,
    seed: int,
    progress: bool,
    prepare: Callable[[str], None],
    make: Callable[[str, int, np.random.Generator], dict[str, Any]],
) -> None:
    bar = tqdm(total=sum(ROWS[task].values()), disable=not progress, desc="rows")
    for number, (split, count) in enumerate(ROWS[task].items()):
        prepare(split)
        generator = np.random.default_rng([seed, number])
        with (folder / split / "rows.jsonl").open("w", encoding="utf-8") as file:
            for index in range(count):
                file.write(json.dumps(make(split, index, generator)) + "\n")
                bar.update()
    bar.close()


def _write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)  # half the size; the beeps are well above its noise
        file.setframerate(RATE_HZ)
        file.writeframes((samples * 127 + 128).round().astype(np.uint8).tobytes())


def _write_model(folder: Path, video: dict[str, Any] | None = None, sound: dict[str, Any] | None = None) -> None:
    from lightning_vlm.models.config import NemotronVLConfig

    tiny_processor(video=video, sound=sound).save_pretrained(folder)
    tokenizer = tiny_tokenizer(sound is not None)
    token = None if sound is None else tokenizer.convert_tokens_to_ids("<so_embedding>")
    NemotronVLConfig.tiny(vocab_size=len(tokenizer), video=video is not None, audio_token_id=token).save_pretrained(
        folder
    )


def main() -> None:
    """Writes a task's data into the folder given on the command line."""
    parser = argparse.ArgumentParser(description="Write a small task with videos or sounds, and a tiny model's folder.")
    parser.add_argument("task", choices=("videos", "beeps"))
    parser.add_argument("folder", type=Path, help="where to write, e.g. data/digits_video")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows")
    arguments = parser.parse_args()
    write = {"videos": write_videos, "beeps": write_beeps}[arguments.task]
    write(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
