"""What of a folder of weights does not fit a model, in one table that a person can read.

Thousands of tensors differ in a few ways: layers and experts of the same name are one line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_vlm.models.architecture import aligned
from lightning_vlm.schema import DataError

_LINES = 20
_NUMBER = re.compile(r"\b(layers|blocks|layer|experts)\.\d+")

Shape = tuple[int, ...]


class Difference(NamedTuple):
    """One tensor that does not fit.

    Attributes:
        kind: What is wrong.
        key: Released name.
        model: Shape that the model expects; ``None`` where it has no such tensor.
        files: Shape in the files; ``None`` where they have none.
    """

    kind: Literal["missing", "unexpected", "other shape"]
    key: str
    model: Shape | None
    files: Shape | None


def differences_error(folder: str, differences: Sequence[Difference]) -> DataError:
    """One error for all differences.

    Args:
        folder: Of the weights.
        differences: At least one.
    """
    shown = differences_table(differences)
    return DataError(
        folder,
        f"{len(differences):,} of its tensors do not fit the model of the config, expected all to:\n{shown}\n",
        "correct the config, or name the parts that may be new in model.from_scratch, e.g. [projector]",
        "weights do not fit",
    )


def differences_table(differences: Sequence[Difference]) -> str:
    """The table.

    Args:
        differences: What differs.

    Returns:
        A header and a line per kind, name without numbers, and shapes; at most 20.
    """
    groups: dict[tuple[str, str, str, str], int] = {}
    for kind, key, model, files in differences:
        line = (kind, _NUMBER.sub(r"\1.*", key), _text(model), _text(files))
        groups[line] = groups.get(line, 0) + 1
    lines = [
        ("what", "tensors", "name in the files", "model", "files"),
        *((kind, f"{count:,}", key, model, files) for (kind, key, model, files), count in groups.items()),
    ]
    hidden = len(lines) - 1 - _LINES
    text = textwrap.indent(aligned(lines[: _LINES + 1], left=(0, 2, 3, 4)), "  ")
    return text + (f"\n  and {hidden:,} more lines" if hidden > 0 else "")


def _text(shape: Shape | None) -> str:
    return "-" if shape is None else str(shape).replace(",)", ")")
