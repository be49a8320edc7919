"""What data costs: images to patches, rows to batches, waiting while training, checking, starting on a million rows.

    python benchmarks/data.py
    python benchmarks/data.py --peer-python PATH    # a Python that has nemo_automodel and torchvision
    python benchmarks/data.py --sections images --quick

images    images and samples per second of one core (CPU time, one thread), files decoded included: Pillow's decoder
          alone, ours, transformers' processor of the same model, and the collate function of NeMo AutoModel. Each is a
          process of its own that waits while the others work; they take turns image by image.
waiting   the share of training time that the digits demo spends between two batches, by number of workers, and what a
          run takes in all: runs in turn, each a process of its own.
check     rows per second of reading rows, image headers (``check``) and whole images (``check --decode``).
start     seconds of ``setup`` and peak memory, each in a fresh process, the file in the page cache: cold (nothing of
          ours cached) and warm; and what else reads the same file.

Medians over rounds; ratios are those of one round, with the lowest and highest. What cannot run says why in its row.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Stdlib only up here: the driver stays small (a child's peak memory starts at its parent's), and peers run this file.

SHAPES = [
    *[(640, 480, "jpg"), (480, 640, "jpg"), (1024, 768, "jpg"), (1280, 720, "png"), (640, 427, "jpg")],
    *[(800, 1200, "jpg"), (1600, 1200, "jpg"), (640, 480, "jpg"), (1920, 1080, "jpg"), (1024, 1024, "png")],
    *[(3000, 2000, "jpg"), (1280, 960, "jpg")],
]
BATCH = 4
WORDS = 3 * ["the", "cat", "table", "red", "small", "what", "is", "shown", "near", "window", "street", "left", "image"]
OURS, THEIRS, CSV = "ours", "theirs", "lightning.pytorch.loggers.CSVLogger"


def write_photo(path: Path, width: int, height: int, seed: int) -> None:
    """Writes a JPEG file like a photograph, shades at all scales and grain; or a PNG file of flat areas."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    if path.suffix == ".png":
        areas = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        pixels = areas.repeat(8, 0).repeat(8, 1)[:height, :width]
    else:
        pixels = 128 + rng.normal(0, 4, (height, width, 3))
        for scale in (256, 64, 16, 4):
            noise = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), dtype=np.uint8)
            shades = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(shades, np.float32) - 128) * scale**0.5 / 24
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_rows(file: Path, count: int, images: list[str]) -> None:
    """Writes a LLaVA file: each row a question about an image, and an answer of 2 to 14 words."""
    with file.open("w", encoding="utf-8") as out:
        for index in range(count):
            start, answer = index * 7 % len(WORDS) // 2, 2 + index * 11 % 13
            question, reply = " ".join(WORDS[start : start + 6]), " ".join(WORDS[start : start + answer])
            turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": reply}]
            out.write(json.dumps({"id": index, "image": images[index % len(images)], "conversations": turns}) + "\n")


def listed(folder: Path) -> list[str]:
    """Names of the images in a folder, as rows name them."""
    return sorted(f"images/{path.name}" for path in (folder / "images").iterdir())


# Contestants: ready(folder) -> (indices of rows) -> anything. One index for images, BATCH of them for samples.


def decoding(folder: Path) -> Callable[[list[int]], Any]:
    from PIL import Image

    names = listed(folder)
    return lambda indices: [Image.open(folder / names[index]).convert("RGB") for index in indices]


def our_patches(folder: Path, **options: Any) -> Callable[[list[int]], Any]:
    from lightning_vlm.media.load import MediaPolicy, load_image
    from lightning_vlm.processing.image_processor import NemotronVLImageProcessor

    names, policy, processor = listed(folder), MediaPolicy(folder), NemotronVLImageProcessor(**options)
    return lambda indices: processor.patchify([load_image(names[index], policy, "row") for index in indices])


def our_samples(folder: Path) -> Callable[[list[int]], Any]:
    from lightning_vlm import VLMDataModule
    from lightning_vlm.data.collate import PaddedCollate
    from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
    from lightning_vlm.processing.processor import NemotronVLProcessor
    from lightning_vlm.processing.tiny import tiny_tokenizer

    processor = NemotronVLProcessor(NemotronVLImageProcessor(), tiny_tokenizer())
    data = VLMDataModule(f"{folder}/rows.jsonl", processor=processor, cache_dir=str(folder))
    (dataset, _), collate = data.dataset_to_check("train"), PaddedCollate(processor.pad_token_id)
    return lambda indices: collate([dataset[index] for index in indices])


def their_patches(folder: Path) -> Callable[[list[int]], Any]:
    declare_operators()
    from transformers import NemotronH_Omni_Reasoning_V3ImageProcessor

    decode, processor = decoding(folder), NemotronH_Omni_Reasoning_V3ImageProcessor()
    return lambda indices: processor(decode(indices))["pixel_values"]


def their_samples(folder: Path) -> Callable[[list[int]], Any]:
    """As its loader does it: a row in memory, its image opened and converted, then the collate function."""
    declare_operators()
    import transformers
    from nemo_automodel.components.datasets.vlm.collate_fns import nemotron_omni_collate_fn
    from PIL import Image

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    parts = {
        "image_processor": transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(),
        "video_processor": transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        "feature_extractor": transformers.WhisperFeatureExtractor(),  # of any kind: nothing is heard here
    }
    processor = transformers.NemotronH_Omni_Reasoning_V3Processor(tokenizer=tokenizer, **parts)

    def example(row: dict[str, Any]) -> dict[str, Any]:
        question, answer = (turn["value"].removeprefix("<image>") for turn in row["conversations"])
        image = Image.open(folder / row["image"]).convert("RGB")
        user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        return {"conversation": [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}

    return lambda indices: nemotron_omni_collate_fn([example(rows[index]) for index in indices], processor)


def declare_operators() -> None:
    """Lets a torchvision that was built for CUDA be imported beside a CPU build of torch; nothing here calls these."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        KEPT.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            KEPT[0].define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")


KEPT: list[Any] = []
CONTESTANTS: dict[str, tuple[str, Callable[[Path], Callable[[list[int]], Any]]]] = {
    "decode alone (Pillow)": (OURS, decoding),
    "ours, uint8": (OURS, our_patches),
    "ours, uint8, static tiles": (OURS, lambda folder: our_patches(folder, mode="static")),
    "ours, float32 (exact)": (OURS, lambda folder: our_patches(folder, do_normalize=True)),
    "transformers": (THEIRS, their_patches),
    "ours, row to batch": (OURS, our_samples),
    "NeMo AutoModel's collate": (THEIRS, their_samples),
}


def serve(name: str, folder: str) -> None:
    """Answers each line of indices with the CPU seconds that they took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    import torch

    torch.set_num_threads(1)
    run = CONTESTANTS[name][1](Path(folder))
    answers.write("ready\n")
    for line in sys.stdin:
        indices, start = json.loads(line), time.process_time()
        run(indices)  # kept by nobody: freeing it counts
        answers.write(f"{time.process_time() - start}\n")


class Contestant:
    """A process that works when it is asked to, or the reason why there is none."""

    def __init__(self, name: str, python: str, folder: str) -> None:
        self.name, self.rounds, self.obstacle = name, [], ""
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        self.process = subprocess.Popen([python, __file__, "--serve", name, folder], text=True, **pipes)
        if self.process.stdout.readline() != "ready\n":
            self.process.wait()
            errors.seek(0)
            self.obstacle = "not measured: " + errors.read().strip().splitlines()[-1]

    def ask(self, indices: list[int]) -> float:
        """CPU seconds for these rows."""
        self.process.stdin.write(json.dumps(indices) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def race(title: str, contestants: list[Contestant], turns: list[list[int]], rounds: int) -> None:
    """Every round has all turns, every turn all contestants, each time another one first. The second is ours."""
    running = [contestant for contestant in contestants if not contestant.obstacle]
    for number in range(rounds + 1):
        seconds = dict.fromkeys(running, 0.0)
        for at, turn in enumerate(turns):
            first = (number + at) % len(running)
            for contestant in running[first:] + running[:first]:
                seconds[contestant] += contestant.ask(turn)
        for contestant, total in seconds.items() if number else ():  # the first round warms up
            contestant.rounds.append(total)
    print(f"\n{title:<38}{'per s':>8}{'time / decoding':>18}{'time / ours':>14}{'lowest..highest':>18}")
    for contestant in contestants:
        if contestant.obstacle:
            print(f"{contestant.name:<38}{contestant.obstacle}")
            continue
        times = contestant.rounds
        decoding, ours = ([own / base for own, base in zip(times, running[at].rounds)] for at in (0, 1))
        row = f"{contestant.name:<38}{sum(map(len, turns)) / statistics.median(times):>8.1f}"
        row += f"{statistics.median(decoding):>18.2f}{statistics.median(ours):>14.2f}"
        print(f"{row}{f'{min(ours):.2f}..{max(ours):.2f}':>18}")
        contestant.process.communicate()


def images(quick: bool, rounds: int, pythons: dict[str, str]) -> None:
    """Prints images and samples per second."""
    count = 4 if quick else 2 * len(SHAPES)
    with tempfile.TemporaryDirectory() as folder:
        print(f"\n{in_own_process('write', folder, str(count), str(count), 'mixed')}")
        names, every = list(CONTESTANTS), list(range(count))
        batches = [every[at : at + BATCH] for at in range(0, count, BATCH)]
        make = lambda name: Contestant(name, pythons[CONTESTANTS[name][0]], folder)  # noqa: E731
        race("images, one core", [*map(make, names[:5])], [[index] for index in every], rounds)
        race(f"samples, one core, batches of {BATCH}", [*map(make, [names[0], *names[5:]])], batches, rounds)


def waiting(quick: bool, rounds: int) -> None:
    """Prints how long the demo waits for its data."""
    config = str(Path(__file__).parents[1] / "configs/experiment/digits.yaml")
    configured = re.search(r"^  num_workers: (\d+)", Path(config).read_text(), re.M)
    steps, ways = (20, ["0"]) if quick else (200, ["0", "1", "2"])
    found: dict[str, list[tuple[list[float], float, float]]] = {workers: [] for workers in ways}
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "lightning_vlm.data.synthetic", "data/digits"], folder)
        for number, workers in [(number, workers) for number in range(rounds) for workers in ways]:
            out, before = f"{number}-{workers}", os.times()
            given = f"--trainer.max_steps {steps} --trainer.default_root_dir {out} --data.cache_dir {out} "
            given += f"--data.num_workers {workers} --trainer.logger {CSV} --trainer.logger.save_dir {out}"
            run([sys.executable, "-m", "lightning_vlm.cli", "fit", "--config", config, *given.split()], folder)
            after = os.times()
            cpu = sum(after[2:4]) - sum(before[2:4])  # user and system time of finished children, workers included
            with next(Path(folder, out).rglob("metrics.csv")).open() as file:
                shares = [row.get("perf/data_wait_frac") for row in csv.DictReader(file)]
            windows = [float(share) for share in shares if share]
            found[workers].append((windows, after.elapsed - before.elapsed, cpu))
    title = f"waiting in the demo, {steps} steps"
    print(f"\n{title:<38}{'share':>8}{'lowest..highest':>18}{'first window':>14}{'run s':>8}{'CPU s':>8}")
    for workers, runs in found.items():
        later = [share for windows, *_ in runs for share in windows[1:]]
        medians = [statistics.median(windows[1:]) for windows, *_ in runs]
        first, wall, cpu = map(statistics.median, zip(*((windows[0], wall, cpu) for windows, wall, cpu in runs)))
        as_is = " (as configured)" * (workers == (configured[1] if configured else "0"))
        row = f"{f'workers: {workers}{as_is}':<38}{statistics.median(later):>8.2%}"
        print(f"{row}{f'{min(medians):.2%}..{max(medians):.2%}':>18}{first:>14.2%}{wall:>8.1f}{cpu:>8.1f}")
    print("(share: perf/data_wait_frac, all time from the end of one batch to the start of the next, logging included:")
    print(f" the median over all windows of 10 steps of {rounds} run(s) in turn, without the first of each, in which")
    print(" workers start; beside it the medians of single runs. Run and CPU: medians, whole command. Goal: under 2 %)")


def check(quick: bool, rounds: int) -> None:
    """Prints rows per second of looking at data."""
    rows, pictures = (200, 20) if quick else (20_000, 2_000)
    ways = [("rows", 0), ("rows", 2), ("headers", 1), ("headers", 2), ("decode", 1), ("decode", 2)]
    found: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        in_own_process("write", folder, str(rows), str(pictures), "small")
        for what, workers in ways * rounds:
            found[what, workers].append(rows / in_own_process("check", folder, what, str(workers)))
    print(f"\n{f'check, {rows:,} rows, {pictures:,} images':<38}{'workers':>8}{'rows/s':>18}{'lowest..highest':>18}")
    for (what, workers), rates in found.items():
        row = f"{what:<38}{workers or 'none':>8}{statistics.median(rates):>18,.0f}"
        print(f"{row}{f'{min(rates):,.0f}..{max(rates):,.0f}':>18}")


def measure_check(folder: str, what: str, workers: str) -> float:
    """Seconds; nothing was looked at before. Reading rows is what every start of training does."""
    from lightning_vlm import VLMDataModule
    from lightning_vlm.commands.check import check_data
    from lightning_vlm.processing.tiny import tiny_processor

    with tempfile.TemporaryDirectory() as cache:
        options: dict[str, Any] = {"processor": tiny_processor(), "num_workers": int(workers), "strict": True}
        data = VLMDataModule(f"{folder}/rows.jsonl", cache_dir=cache, **options)
        begin = time.perf_counter()
        data.setup("fit") if what == "rows" else check_data(data, decode=what == "decode")
        return time.perf_counter() - begin


def start(quick: bool, pythons: dict[str, str]) -> None:
    """Prints the time and memory of a start."""
    print(f"\n{'start':<38}{'rows':>10}{'seconds':>10}{'peak MiB':>12}{'above before':>14}")
    for rows in (1_000,) if quick else (100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder, "rows.jsonl"), rows, [f"images/{index:06d}.jpg" for index in range(2_000)])
            meta = {"rows": {"file_name": "rows.jsonl", "columns": {"messages": "conversations"}}}
            Path(folder, "meta.json").write_text(json.dumps(meta))
            for label, way, cache, python in (
                ("ours, cold, no workers", "0", "a", OURS),
                ("ours, cold, 2 workers", "2", "b", OURS),
                ("ours, warm", "2", "b", OURS),
                ("datasets.load_dataset, cold", "datasets", "c", OURS),
                ("datasets.load_dataset, warm", "datasets", "c", OURS),
                ("json.loads of every line, in a list", "json", "", OURS),
                ("NeMo AutoModel's make_meta_dataset", "automodel", "", THEIRS),
            ):
                try:
                    found = in_own_process("start", folder, way, f"{folder}/{cache}", python=pythons[python])
                    figures = f"{found['seconds']:>10.2f}{found['peak']:>12.0f}{found['peak'] - found['before']:>14.0f}"
                except RuntimeError as error:
                    figures = f"  not measured: {str(error).splitlines()[-1]}"
                print(f"{label:<38}{rows:>10,}{figures}")


def measure_start(folder: str, way: str, cache: str) -> dict[str, float]:
    """Seconds and peak memory of the process, its workers not included."""
    file = f"{folder}/rows.jsonl"
    begin: Callable[[], Any] = lambda: [json.loads(line) for line in open(file, "rb")]  # noqa: E731, SIM115
    if way == "datasets":
        import datasets

        begin = lambda: datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)  # noqa: E731
    elif way == "automodel":
        declare_operators()
        from nemo_automodel.components.datasets.vlm.datasets import make_meta_dataset

        begin = lambda: make_meta_dataset(f"{folder}/meta.json")  # noqa: E731
    elif way != "json":
        from lightning_vlm import VLMDataModule
        from lightning_vlm.processing.tiny import tiny_processor

        data = VLMDataModule(file, processor=tiny_processor(), num_workers=int(way), cache_dir=cache)
        begin = lambda: data.setup("fit")  # noqa: E731
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    before, at = peak(), time.perf_counter()
    kept = begin()  # noqa: F841 (in memory until the peak is read)
    return {"seconds": time.perf_counter() - at, "peak": peak(), "before": before}


def measure_write(folder: str, num_rows: str, num_images: str, kind: str) -> str:
    """Writes rows, images (at most 50, and other names for them) and a tokenizer; says what the images are."""
    from lightning_vlm.processing.tiny import tiny_tokenizer

    shapes = (SHAPES * 2 if kind == "mixed" else SHAPES[:1] * 50)[: int(num_images)]
    Path(folder, "images").mkdir()
    files = [Path(folder, f"images/{index:05d}.{shapes[index % len(shapes)][2]}") for index in range(int(num_images))]
    for index, file in enumerate(files):
        if index < len(shapes):
            write_photo(file, *shapes[index][:2], index)
        else:
            os.link(files[index % len(shapes)], file)
    write_rows(Path(folder, "rows.jsonl"), int(num_rows), [f"images/{file.name}" for file in files])
    tiny_tokenizer().save_pretrained(f"{folder}/tokenizer")
    pixels = sum(width * height for width, height, _ in shapes)
    bits = 8 * sum(file.stat().st_size for file in files[: len(shapes)]) / pixels
    sizes = ", ".join(f"{width} x {height} {kind}" for width, height, kind in dict.fromkeys(shapes))
    return f"{len(files)} images, {pixels / len(shapes) / 1e6:.2f} million pixels and {bits:.1f} bits/pixel: {sizes}"


MEASURES: dict[str, Callable[..., Any]] = {"write": measure_write, "check": measure_check, "start": measure_start}


def run(command: list[str], folder: str | None = None) -> str:
    """What a command printed; its errors are shown only if it fails."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def in_own_process(*arguments: str, python: str = sys.executable) -> Any:
    return json.loads(run([python, __file__, "--measure", *arguments]).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has nemo_automodel, torchvision")
    parser.add_argument("--sections", nargs="+", default=["images", "waiting", "check", "start"])
    parser.add_argument("--quick", action="store_true", help="a smoke test: numbers without meaning")
    parser.add_argument("--rounds", type=int, default=5, help="of images; half as many of waiting and check")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pythons, rounds = {OURS: sys.executable, THEIRS: options.peer_python}, 1 if options.quick else options.rounds
    if options.serve:
        serve(*options.serve)
    elif options.measure:
        print(json.dumps(MEASURES[options.measure[0]](*options.measure[1:])))
    else:
        half = ((rounds + 1) // 2,)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        for section, arguments in {images: (rounds, pythons), waiting: half, check: half, start: (pythons,)}.items():
            if section.__name__ in options.sections:
                section(options.quick, *arguments)


if __name__ == "__main__":
    main()
