"""The selections of a data module: what may be chosen, what goes together, and what a list of sources may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_vlm.sources.open import DataSource, SourceLike
from lightning_vlm.sources.rows import RowSource

Files = str | DataSource | list[str | DataSource] | None

OUR_COLLATES = ("auto", "padded", "packed")
"""Those of `NemotronVLProcessor`; any other name is that of a collate function."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "sampler": ("shuffle", "sequential", "length_grouped", "token_budget"),
    "packing": (False, True),
    "overlong": ("error", "drop", "truncate_text", "downscale_images"),
    "verify": ("rows", "headers", "decode"),
}


def check_selections(collate: str, **selections: Any) -> None:
    """Refuses what is unknown or does not go together.

    Args:
        collate: The selection of that name.
        **selections: ``sampler``, ``packing``, ``overlong``, ``verify``.

    Raises:
        ValueError: With what was found and what was expected.
    """
    for name, value in selections.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name}={value!r} is unknown; expected {' or '.join(map(repr, _CHOICES[name]))}")
    if selections["packing"] and collate not in ("auto", "packed"):
        raise ValueError(
            f"packing=True makes rows without padding; expected collate='auto' or 'packed', not {collate!r}"
        )
    if selections["packing"] and selections["sampler"] in ("length_grouped", "token_budget"):
        raise ValueError(
            f"packing=True fills rows by itself; expected sampler='shuffle' or 'sequential', not "
            f"{selections['sampler']!r}"
        )


def check_examples(name: str, **selections: Any) -> None:
    """Refuses what needs lengths, which only `NemotronVLProcessor` can tell before a sample is made.

    Args:
        name: What makes the batches.
        **selections: The selections that are not at their default, by name.

    Raises:
        ValueError: If there is one.
    """
    for selection, value in selections.items():
        raise ValueError(
            f"{selection}={value!r} needs the length of every sample, which {name} cannot tell; leave it out"
            + ", or pack with lightning_vlm.automodel.neat_packing_vlm" * (selection == "packing")
        )


def listed(files: Any) -> list[SourceLike]:
    """One source or several as a list."""
    if isinstance(files, (str, Path, DataSource, RowSource, Mapping)):
        files = [files]
    return [str(file) if isinstance(file, Path) else file for file in files or []]
