"""``lightning-vlm export``: a checkpoint of a run -> a folder in the layout of the released checkpoints.

It needs the checkpoint and the model that the training began with, no GPU, no config of the run, and little memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lightning_vlm.checkpoint.opening import local_folder
from lightning_vlm.checkpoint.release import Release, release, release_adapter
from lightning_vlm.checkpoint.source import pretrained_source
from lightning_vlm.checkpoint.trained import find_checkpoint, open_trained
from lightning_vlm.checkpoint.verify import verify

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(arguments: list[str]) -> int:
    """Runs the command.

    Args:
        arguments: Those after ``export``.

    Returns:
        Exit code.

    Raises:
        DataError: If the model cannot be written as it was trained.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.adapter and (options.dtype or options.verify):
        parser.error("--adapter goes with neither --dtype nor --verify: adapters are written as they are")
    checkpoint = find_checkpoint(options.checkpoint)
    trained = open_trained(checkpoint)
    out = Path(options.out).resolve()
    base = None if options.base is None else local_folder(pretrained_source(options.base, "--base"), "--base")
    sample = trained.record.get("sample")
    logit = []
    if options.adapter:
        result = release_adapter(trained, out, base, options.overwrite)
    else:
        dtype = None if options.dtype is None else DTYPES[options.dtype]
        check = (lambda weights, folder: logit.append(verify(weights, folder, sample))) if options.verify else None
        result = release(trained, out, base, dtype, options.overwrite, check)
    print(_told(checkpoint, result))
    if logit:
        of = "a sample of the training data" if sample is not None else "a few tokens of text: the run left no sample"
        print(f"verified: logits of {of} are equal bit by bit (largest {logit[0]:.4g})")
    return 0


def _told(checkpoint: Path, result: Release) -> str:
    base = "" if result.base is None else f", the rest from {result.base}"
    lines = [f"{checkpoint} -> {result.folder}: {result.num_bytes / 1e9:.2f} GB in {result.files} file(s){base}"]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-vlm export",
        description="Write a trained model as a folder in the layout of the released checkpoints.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a checkpoint (file or folder of shards), or a run's folder: its last.ckpt")
    parser.add_argument("out", help="folder to write; it appears when it is complete")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights; by default as the base model has them")
    parser.add_argument("--base", help="the model that the training began with, if it is no longer where it was")
    parser.add_argument(
        "--verify", action="store_true", help="compare logits with the checkpoint's; keep nothing if they differ"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="of a LoRA run, write its adapters alone (peft's format)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is in the folder")
    return parser
