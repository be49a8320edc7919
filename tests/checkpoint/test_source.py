"""A name is a folder or a repository asked for by its full name; a typo is neither and reaches no network."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_vlm.checkpoint.source import pretrained_source
from lightning_vlm.schema import DataError


def test_folders_and_full_repository_names_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "model").mkdir(parents=True)
    for name in ("data/model", "./data/model", str(tmp_path), "nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16"):
        assert pretrained_source(name, "model_id") == name
    assert pretrained_source(tmp_path / "data", "model_id") == str(tmp_path / "data")


@pytest.mark.parametrize("name", ["modle", "data/modle", "data/digits/modle", "./modle", "/nowhere/model", "../x", ""])
def test_a_mistyped_folder_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError) as caught:
        pretrained_source(name, "model.model_id")
    message = str(caught.value)
    assert message.startswith(f"model.model_id: {name!r} is not a folder")
    assert message.endswith("correct model.model_id.")
