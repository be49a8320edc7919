"""Broken rows, each with the exact sentence that it must give: the sentence is what a user has to go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_vlm.schema import DataError
from lightning_vlm.sources.open import open_sources
from tests.fixtures.broken_rows import ROWS


@pytest.mark.parametrize(
    ("line", "settings", "sentence", "kind"), [row[1:] for row in ROWS], ids=[what for what, *_ in ROWS]
)
def test_gives_its_sentence(tmp_path: Path, line: str, settings: dict[str, Any], sentence: str, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    (source,) = open_sources([{"path": str(path), **settings}], cache_dir=tmp_path / "cache")
    with pytest.raises(DataError) as caught:
        source.conversation(0)
    assert str(caught.value) == f"{path}:2: {sentence}"
    assert caught.value.kind == kind


def test_kinds_do_not_depend_on_the_row() -> None:
    kinds = {kind for *_, kind in ROWS}
    assert len(ROWS) >= 40
    assert len(kinds) < len(ROWS) / 2
