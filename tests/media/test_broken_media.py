"""Broken media, each with the exact sentence that it must give: the sentence is what a user has to go by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.schema import FileSlice
from tests.fixtures.broken_media import ALL, FILES, SOURCE, picture


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    root = folder / "media"
    for path in (root / "album", folder / "outside"):
        path.mkdir(parents=True)
    for name, content in FILES.items():
        (root / name).write_bytes(content())
    (folder / "outside" / "secret.png").write_bytes(picture("PNG"))
    (root / "link.png").symlink_to(folder / "outside" / "secret.png")
    os.mkfifo(root / "pipe")
    Image.new("RGB", (4, 4)).save(root / "ok.png")
    Image.new("RGB", (9, 4)).save(root / "wide.png")
    return root


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("load", "ref", "sentence", "kind"),
    [(load, ref, sentence, kind) for load, _, ref, sentence, kind in ALL],
    ids=[f"{load.__name__.removeprefix('load_')}: {what}" for load, what, *_ in ALL],
)
def test_gives_its_sentence(root: Path, load: Any, ref: Any, sentence: str, kind: str) -> None:
    def filled(text: str) -> str:
        return text.replace("{root}", str(root)).replace("{outside}", str(root.parent / "outside"))

    if isinstance(ref, str):
        ref = filled(ref)
    if isinstance(ref, FileSlice):
        ref = FileSlice(filled(ref.path), ref.offset, ref.size, ref.name)
    with pytest.raises(MediaError) as caught:
        load(ref, MediaPolicy(root), SOURCE)
    assert str(caught.value) == f"{SOURCE}: {filled(sentence)}"
    assert caught.value.kind == kind


def test_kinds_do_not_depend_on_the_row() -> None:
    kinds = {kind for *_, kind in ALL}
    assert len(kinds) < len(ALL) / 2
    assert all(len(kind) < 30 and kind[0].isalpha() for kind in kinds)
