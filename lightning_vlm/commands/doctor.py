"""``lightning-vlm doctor``: which implementations run on this machine and why, and a packed row that proves it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from PIL import Image

from lightning_vlm.media.video_backend import VARIABLE as VIDEO_VARIABLE
from lightning_vlm.media.video_backend import video_choice
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.ops.attention import attention_choice
from lightning_vlm.ops.mamba import VARIABLE, mamba_choice
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import Conversation, ImageRef, Sample, Text, Turn
from lightning_vlm.training.isolation import IsolationError, measure_isolation

_PACKAGES = ("lightning-vlm", "torch", "lightning", "transformers", "pillow", "jsonargparse")
_OPTIONAL = {
    "mamba-ssm": "Mamba kernels",
    "causal-conv1d": "Mamba kernels",
    "flash-linear-attention": "Mamba kernels in Triton",
    "flash-attn": "attention chosen by attn_implementation: flash_attention_2",
    "peft": "LoRA",
    "av": "video files",
    "torchcodec": "video files, with FFmpeg on the system",
    "wandb": "logging",
    "matplotlib": "pictures of plans",
}


def examine() -> bool:
    """Prints what is here and tries it.

    Returns:
        Whether packed rows run and are isolated on every device, and no implementation is named that cannot run.
    """
    print(f"{'python':<24}{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        print(f"{name:<24}{_version(name) or 'not installed'}")
    for name, purpose in _OPTIONAL.items():
        print(f"{name:<24}{_version(name) or 'not installed'} ({purpose})")
    held = [_examine_video(), *(_examine_device(device) for device in _devices())]
    return all(held)


def _examine_video() -> bool:
    try:
        name, reason = video_choice()
    except RuntimeError as error:
        print(f"{'video files':<24}ERROR {error}")
        return False
    if name == "pyav" and not _version("av"):
        name, reason = "not read", f"install lightning-vlm[video]; {reason}"
    print(f"{'video files':<24}{name}: {reason} ({VIDEO_VARIABLE} selects another)")
    return True


def _devices() -> list[torch.device]:
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *cuda]


def _examine_device(device: torch.device) -> bool:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{device} ({name})")
    try:
        choice = mamba_choice(device)
        print(f"  {'ssd':<10}{choice.name:<10}{choice.reason} ({VARIABLE} selects another)")
    except RuntimeError as error:
        print(f"  {'ssd':<10}{'ERROR':<10}{error}")
        return False
    for dtype in (torch.float32, torch.bfloat16):
        attention = attention_choice(device, dtype)
        print(f"  {'attention':<10}{attention.name:<10}{str(dtype).removeprefix('torch.')}: {attention.reason}")
    torch.manual_seed(0)
    held = True
    for dtype in (torch.float32, torch.bfloat16):
        model = NemotronVL(NemotronVLConfig.tiny(pattern="M*E-M")).to(device, dtype)
        try:
            isolation = measure_isolation(model, _samples(), device)
            print(f"  {str(dtype).removeprefix('torch.'):<10}{isolation}")
            held = held and isolation.holds
        except IsolationError as error:
            print(f"  {str(dtype).removeprefix('torch.'):<10}ERROR {error}")
            held = False
    return held


def _samples() -> list[Sample]:
    """Two documents: one with an image and longer than a chunk, one of a few tokens."""
    processor = tiny_processor()
    question = Turn("user", (ImageRef("gradient"), Text("what is this? " * 8)))
    asked = Conversation((question, Turn("assistant", (Text("a gradient"),))), "doctor:1")
    greeting = Conversation((Turn("user", (Text("hi"),)), Turn("assistant", (Text("hello"),))), "doctor:2")
    return [processor.encode(asked, [Image.linear_gradient("L").convert("RGB")]), processor.encode(greeting, [])]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
