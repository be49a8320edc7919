"""Memory of a long video in the vision tower: transformers' way beside ours, forward and backward, in one run.

    python benchmarks/video_memory.py [--frames 128] [--layers 4] [--width 256]

A video of 512 x 512 frames in two-frame tubelets, 1,024 patches each, through a RADIO tower of the given size (the
released one has 32 layers of width 1280) and a loss on its features. Each way runs in its own process: time of one
forward and backward, and the most memory that PyTorch had allocated for them at once, by its profiler's record (what a
process is given by the system says more of its allocator). Ours begins with the pixels of a batch, uint8, and makes
them floats; transformers' begins with the floats that its processor makes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time

WAYS = {
    "transformers, all tubelets at once": "transformers",
    "ours, all at once": "whole",
    "ours, vision_micro_batch 16": "parts",
    "ours, gradient checkpointing": "recomputed",
    "ours, vision_micro_batch 16, checkpointing": "parts recomputed",
    "ours, frozen": "frozen",
    "ours, frozen, vision_micro_batch 16": "frozen parts",
}
PATCH, SIDE = 16, 512


def measure(way: str, frames: int, layers: int, width: int) -> dict[str, float]:
    """Runs one way in this process."""
    import torch
    from transformers import RadioConfig, RadioModel

    from lightning_vlm.models.vision import make_vision_model

    torch.manual_seed(0)
    config = RadioConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        patch_size=PATCH,
        max_img_size=2 * SIDE,
        video_temporal_patch_size=2,
    )
    rows, tubelets = SIDE // PATCH, frames // 2
    if way == "transformers":
        model = RadioModel(config).train()
        model.make_preprocessor_external()
        pixels = torch.randn(tubelets, 6, SIDE, SIDE)

        def features() -> torch.Tensor:
            return model(pixels).features
    else:
        model = make_vision_model(config).train()
        model.requires_grad_("frozen" not in way)
        if "parts" in way:
            model.micro_batch = 16
        if "recomputed" in way:
            model.activation_checkpointing_enable({"use_reentrant": False})
        patches = torch.randint(0, 256, (tubelets * rows * rows, 2 * 3 * PATCH**2), dtype=torch.uint8)

        def features() -> torch.Tensor:
            return model(patches, [(rows, rows)] * tubelets).features

    projector = torch.nn.Linear(width, 8)  # what is behind the tower is trained, also where the tower is not
    for parameter in model.parameters():  # the gradients themselves are every way's cost
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        projector(features()).square().mean().backward()
    seconds = time.perf_counter() - start
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return {"seconds": seconds, "mib": max(itertools.accumulate(changes)) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.frames, arguments.layers, arguments.width)
    if arguments.way:
        print(json.dumps(measure(arguments.way, *sizes)))
        return
    print(f"{sizes[0]} frames of {SIDE} x {SIDE} pixels, {sizes[1]} layers of width {sizes[2]}")
    print(f"{'way':44} {'seconds':>8} {'MiB':>8} {'memory':>8}")
    first = None
    for name, way in WAYS.items():
        flags = [f"--{key}={value}" for key, value in zip(("frames", "layers", "width"), sizes)]
        output = subprocess.run(
            [sys.executable, __file__, f"--way={way}", *flags], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        found = json.loads(output.splitlines()[-1])
        first = first or found["mib"]
        print(f"{name:44} {found['seconds']:8.1f} {found['mib']:8.0f} {found['mib'] / first:8.2f}", flush=True)


if __name__ == "__main__":
    main()
