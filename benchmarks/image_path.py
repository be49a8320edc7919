"""Images to patches: uint8 with Pillow (the default) beside the float path, and transformers' processor where it runs.

    python benchmarks/image_path.py

One process, one thread, the same decoded photographs-sized images of mixed sizes. The difference is that of the
normalised values which the vision tower sees; the uint8 path clamps what a bicubic resize overshoots and rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from lightning_vlm.ops.pixels import normalize_patches
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor

SIZES = [(640, 480), (1024, 768), (1280, 720), (800, 1200), (500, 500), (1600, 1200)]


def pictures(count: int) -> list[Image.Image]:
    """Smooth noise with hard edges: both what a resize keeps and what it overshoots."""
    generator = np.random.default_rng(0)
    images = []
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        noise = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image = image.filter(ImageFilter.GaussianBlur(2))
        image.paste((255, 255, 255), (width // 4, height // 4, width // 2, height // 2))
        images.append(image)
    return images


def rate(function: Callable[[Image.Image], Tensor], images: list[Image.Image]) -> float:
    """Images per second, best of three passes."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for image in images:
            function(image)
        seconds.append(time.perf_counter() - start)
    return len(images) / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    images = pictures(parser.parse_args().images)
    torch.set_num_threads(1)

    fast = NemotronVLImageProcessor()
    exact = NemotronVLImageProcessor(do_normalize=True)
    ways: dict[str, Callable[[Image.Image], Tensor]] = {
        "ours, float32 (exact)": lambda image: exact.patchify([image])[0],
        "ours, uint8 (default)": lambda image: fast.patchify([image])[0],
    }
    try:
        from transformers import NemotronH_Omni_Reasoning_V3ImageProcessor

        theirs = NemotronH_Omni_Reasoning_V3ImageProcessor()
        ways = {"transformers (torchvision)": lambda image: theirs([image])["pixel_values"], **ways}
    except ImportError:
        print("transformers' processor needs torchvision, which is not installed: left out")

    base = None
    print(f"{'':28} {'images/s':>9} {'ratio':>6} {'MiB/image':>10}")
    for name, function in ways.items():
        speed = rate(function, images)
        base = base or speed
        size = np.mean([function(image).nbytes for image in images[: len(SIZES)]]) / 2**20
        print(f"{name:28} {speed:9.1f} {speed / base:6.2f} {size:10.2f}")

    mean, std = torch.tensor(exact.image_mean), torch.tensor(exact.image_std)
    differences = [
        (normalize_patches(fast.patchify([image])[0], mean, std) - exact.patchify([image])[0]).abs() for image in images
    ]
    everything = torch.cat([difference.flatten() for difference in differences])
    print(
        f"uint8 against float, in normalised units (1/255 = {1 / 255 / float(std.mean()):.4f}): "
        f"mean {everything.mean():.4f}, 99.9th percentile {np.quantile(everything.numpy(), 0.999):.4f}, "
        f"max {everything.max():.3f}"
    )


if __name__ == "__main__":
    main()
