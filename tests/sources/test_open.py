"""What users write for a source, and tables, shards and lists: all become the same conversations."""

from __future__ import annotations

import copy
import datetime
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm import NemotronVLProcessor, VLMDataModule
from lightning_vlm.schema import AudioRef, DataError, FileSlice, ImageRef, Text, VideoRef, file_of
from lightning_vlm.sources.formats import RowFormat, parse_row
from lightning_vlm.sources.open import DataSource, group_names, open_sources
from lightning_vlm.sources.rows import FirstRows, ListSource
from lightning_vlm.sources.tables import TableSource

BOT = {"role": "assistant", "content": "ho"}
COLUMNS = {"question": "q", "answer": "a", "image": "photo"}


def png(seed: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    def write(members: list[tuple[str, bytes]], name: str = "shard.tar", mode: str = "w") -> Path:
        with tarfile.open(tmp_path / name, mode) as shard:  # type: ignore[call-overload]
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
        return tmp_path / name

    return write


class TestTables:
    @pytest.fixture
    def table(self) -> Any:
        rows = [{"q": f"what {i}?", "a": f"no {i}", "photo": {"bytes": png(i), "path": None}} for i in range(5)]
        return datasets.Dataset.from_list(rows).cast_column("photo", datasets.Image())

    @pytest.mark.parametrize("kind", ["parquet", "folder"])
    def test_are_read_by_number_with_media_still_encoded(self, table: Any, tmp_path: Path, kind: str) -> None:
        path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows")
        table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
        (source,) = open_sources([{"path": str(path), "columns": COLUMNS}], cache_dir=tmp_path / "cache")
        assert len(source) == 5
        conversation = source.conversation(3)
        assert conversation.turns[0].parts == (ImageRef(png(3)), Text("what 3?"))
        assert conversation.turns[1].parts == (Text("no 3"),)
        assert (conversation.source, source.name) == (f"{path}:4", "rows")
        assert not source.has_changed()

    def test_are_known_by_what_they_hold_wherever_they_lie(self, table: Any, tmp_path: Path) -> None:
        for name in ("one.parquet", "two.parquet"):
            table.to_parquet(tmp_path / name)
        given = [{"path": str(tmp_path / name), "columns": COLUMNS} for name in ("one.parquet", "two.parquet")]
        one, two = open_sources(given, cache_dir=tmp_path / "cache")
        assert one.fingerprint == two.fingerprint
        table.select(range(3)).to_parquet(tmp_path / "two.parquet")
        assert two.has_changed()
        (other,) = open_sources(
            [{"path": str(tmp_path / "two.parquet"), "columns": COLUMNS}], cache_dir=tmp_path / "cache"
        )
        assert len(other) == 3
        assert other.fingerprint != one.fingerprint

    def test_with_images_deep_in_messages(self, tmp_path: Path) -> None:
        features = datasets.Features(
            {
                "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
                "images": datasets.List(datasets.Image()),
            }
        )
        row = {
            "messages": [{"role": "user", "content": "<image><image>"}, BOT],
            "images": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}],
        }
        datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "hf")
        (source,) = open_sources([tmp_path / "hf"], cache_dir=tmp_path / "cache")
        assert [image.ref for image in source.conversation(0).images] == [png(1), png(2)]

    def test_of_several_splits_want_one_named(self, table: Any, tmp_path: Path) -> None:
        datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(tmp_path / "hf")
        with pytest.raises(DataError, match=r"the folder holds the splits train, test, expected one to be named"):
            open_sources([tmp_path / "hf"], cache_dir=tmp_path)
        given = [{"path": str(tmp_path / "hf"), "split": split, "columns": COLUMNS} for split in ("train", "test")]
        sources = open_sources(given, cache_dir=tmp_path)
        assert [len(source) for source in sources] == [5, 2]
        # Places and scores tell them apart, and a place is a path that is there.
        assert [source.place(1) for source in sources] == [f"{tmp_path}/hf/train:2", f"{tmp_path}/hf/test:2"]
        assert group_names(given) == {f"{tmp_path}/hf/train": "hf_train", f"{tmp_path}/hf/test": "hf_test"}
        assert [source.name for source in sources] == ["hf_train", "hf_test"]
        assert [source.path for source in sources] == list(group_names(given))
        assert group_names([TableSource(tmp_path / "hf", split=split) for split in ("train", "test")]) == group_names(
            given
        )
        assert Path(file_of(sources[1].place(0))).is_dir()
        assert not any(source.has_changed() for source in sources)

    def test_of_several_splits_may_be_named_by_their_folders(self, table: Any, tmp_path: Path) -> None:
        datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(tmp_path / "hf")
        given = [{"path": f"{tmp_path}/hf/{name}/", "columns": COLUMNS} for name in ("train", "test")]
        sources = open_sources(given, cache_dir=tmp_path)
        assert [source.place(0) for source in sources] == [f"{tmp_path}/hf/train:1", f"{tmp_path}/hf/test:1"]
        assert group_names(given) == {f"{tmp_path}/hf/train": "train", f"{tmp_path}/hf/test": "test"}

    @pytest.mark.parametrize("name", ["rows.parquet", "rows", "rows.jsonl"])
    def test_without_splits_none_may_be_named(self, table: Any, tmp_path: Path, name: str) -> None:
        """It would be ignored: train and test would be the same rows."""
        path = tmp_path / name
        {"rows.parquet": table.to_parquet, "rows": table.save_to_disk}.get(name, lambda path: path.write_text("{}"))(
            path
        )
        with pytest.raises(DataError, match=r"the split 'test' was named, expected none: .* holds no splits") as caught:
            open_sources([{"path": str(path), "split": "test", "columns": COLUMNS}], cache_dir=tmp_path)
        assert str(caught.value).startswith(f"{path}: ")

    def test_with_cells_of_a_path_and_no_bytes_read_the_path(
        self, table: Any, tmp_path: Path, processor: NemotronVLProcessor
    ) -> None:
        """As `datasets` writes them without embedding, and as some exports do: no bytes, or empty ones."""
        (tmp_path / "x.png").write_bytes(png(7))
        rows = [{"q": "what?", "a": "no", "photo": {"bytes": content, "path": "x.png"}} for content in (None, b"")]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "hf")
        source = {"path": str(tmp_path / "hf"), "columns": COLUMNS, "media_root": str(tmp_path)}
        data = VLMDataModule(train=[source], processor=processor, batch_size=2, strict=True)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert batch.num_images.tolist() == [1, 1]

    def test_that_are_damaged_or_empty_say_so(self, table: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DataError, match=r"rows.parquet: the table cannot be read \(.*expected Parquet") as caught:
            open_sources([tmp_path / "rows.parquet"], cache_dir=tmp_path)
        assert caught.value.kind == "damaged table"
        table.select([]).to_parquet(tmp_path / "none.parquet")
        with pytest.raises(DataError, match=r"none.parquet: the table (has no rows|cannot be read)"):
            open_sources([tmp_path / "none.parquet"], cache_dir=tmp_path)


LLAVA = {"conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "ho"}]}


class TestShards:
    def test_are_read_at_random_through_an_index(self, write_shard: Callable[..., Path], tmp_path: Path) -> None:
        members = [
            (f"part/{i:03}.{kind}", content)
            for i in range(4)
            for kind, content in (("jpg", png(i)), ("json", json.dumps(LLAVA).encode()))
        ]
        path = write_shard([*members, ("part/._junk.jpg", b"x"), ("readme", b"x")])
        for _ in range(2):  # scanned, then mapped
            (source,) = open_sources([path], cache_dir=tmp_path / "cache")
            assert len(source) == 4
            conversation = source.conversation(2)
            (image,) = conversation.images
            assert isinstance(image.ref, FileSlice)
            content = path.read_bytes()[image.ref.offset : image.ref.offset + image.ref.size]
            assert content == png(2)
            assert conversation.source == f"{path}:3"

    def test_name_members_by_extension_or_list_them(self, write_shard: Callable[..., Path], tmp_path: Path) -> None:
        row = {"images": ["right.png", "left.png"], "messages": [{"role": "user", "content": "<image><image>"}, BOT]}
        path = write_shard([("0.left.png", png(0)), ("0.right.png", png(1)), ("0.json", json.dumps(row).encode())])
        (source,) = open_sources([path], cache_dir=tmp_path)
        assert [image.ref.name for image in source.conversation(0).images] == ["right.png", "left.png"]

    def test_hold_captions_as_columns(self, write_shard: Callable[..., Path], tmp_path: Path) -> None:
        path = write_shard([("0.jpg", png(0)), ("0.txt", "a cat é".encode())])
        settings = {"path": str(path), "columns": {"answer": "txt", "image": "images"}, "prompt": "Describe."}
        (source,) = open_sources([settings], cache_dir=tmp_path)
        asked, answered = source.conversation(0).turns
        assert asked.text == "Describe."
        assert isinstance(asked.parts[0], ImageRef)
        assert answered.text == "a cat é"

    @pytest.mark.parametrize(
        ("members", "mode", "words", "kind"),
        [
            ([("0.json", b"{}")], "w:gz", "expected an uncompressed tar file", "damaged shard"),
            ([], "w", "the shard has no samples", "no rows"),
            ([("0.json", b"{}"), ("1.json", b"{}"), ("0.jpg", b"x")], "w", "stands apart", "damaged shard"),
        ],
    )
    def test_that_cannot_be_read_say_so(
        self, write_shard: Callable[..., Path], tmp_path: Path, members: Any, mode: str, words: str, kind: str
    ) -> None:
        with pytest.raises(DataError) as caught:
            open_sources([write_shard(members, mode=mode)], cache_dir=tmp_path / "cache")
        assert words in str(caught.value)
        assert caught.value.kind == kind

    @pytest.mark.parametrize("damage", ["a header in the middle", "cut at a member", "two joined"])
    def test_that_lost_their_end_say_so(self, write_shard: Callable[..., Path], tmp_path: Path, damage: str) -> None:
        path = write_shard([(f"{index}.json", json.dumps(LLAVA).encode()) for index in range(6)])
        content = bytearray(path.read_bytes())
        if damage == "a header in the middle":
            content[2 * 1024 + 10] ^= 0xFF  # each member is a header and a block
        elif damage == "cut at a member":
            content = content[: 3 * 1024]
        else:
            content = content + content
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"expected one whole tar file"):
            open_sources([path], cache_dir=tmp_path / "cache")

    def test_with_links_say_so(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "shard.tar", "w") as shard:
            info = tarfile.TarInfo("0.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "1.jpg"
            shard.addfile(info)
        with pytest.raises(DataError, match=r"the member '0.jpg' is a link, expected files only"):
            open_sources([tmp_path / "shard.tar"], cache_dir=tmp_path / "cache")

    def test_of_other_words_have_another_fingerprint(self, write_shard: Callable[..., Path], tmp_path: Path) -> None:
        prints = [
            open_sources([write_shard([("0.txt", word)], f"{word.decode()}.tar")], cache_dir=tmp_path)[0].fingerprint
            for word in (b"cat", b"dog")
        ]
        assert prints[0] != prints[1]

    def test_have_media_as_columns_too(self, write_shard: Callable[..., Path], tmp_path: Path) -> None:
        path = write_shard([("0.jpg", png(0)), ("0.txt", b"what?"), ("0.cls", b"7")])
        settings = {"path": str(path), "columns": {"question": "txt", "answer": "cls", "image": "jpg"}}
        (source,) = open_sources([settings], cache_dir=tmp_path / "cache")
        asked, answered = source.conversation(0).turns
        assert [type(part) for part in asked.parts] == [ImageRef, Text]
        assert answered.text == "7"

    def test_with_a_damaged_member_name_the_sample(self, write_shard: Callable[..., Path], tmp_path: Path) -> None:
        path = write_shard([("0.json", b'{"a"'), ("1.bin", b"\xff\xfe")])
        (source,) = open_sources([path], cache_dir=tmp_path / "cache")
        with pytest.raises(DataError, match=r"shard.tar:1: the row is not JSON"):
            source.row(0)
        with pytest.raises(DataError, match=r"shard.tar:2: the member 'bin' is not text in UTF-8"):
            source.row(1)


class TestSettings:
    def test_may_be_a_path_an_object_or_a_mapping(self, write_rows: Callable[..., Path], tmp_path: Path) -> None:
        path = write_rows([{"messages": [{"role": "user", "content": "hi"}, BOT]}] * 3)
        given = [
            path,
            str(path),
            DataSource(str(path), weight=2.0, name="mine", media_root="elsewhere"),
            {"path": str(path), "max_samples": 2},
        ]
        plain, same, named, first = open_sources(given, cache_dir=tmp_path)
        assert plain.fingerprint == same.fingerprint == named.fingerprint != first.fingerprint
        assert (named.weight, named.name, named.media_root) == (2.0, "mine", "elsewhere")
        assert (len(plain), len(first)) == (3, 2)
        assert plain.media_root == str(tmp_path)
        assert open_sources([path], media_root="root", cache_dir=tmp_path)[0].media_root == "root"

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"path": "a.jsonl", "wieght": 1}, "unknown setting 'wieght'; expected path, format"),
            ({"weight": 1}, "no path"),
            ({"path": "a.jsonl", "weight": 0}, "the weight of a.jsonl is 0, expected a number above 0"),
            ({"path": "a.jsonl", "format": "lava"}, "format='lava' is unknown; expected auto or one of messages"),
            ({"path": "a.jsonl", "format": "columns"}, "map columns.question or set prompt"),
            ({"path": "a.jsonl", "columns": {"querry": "q"}}, "columns maps querry, which is unknown"),
        ],
    )
    def test_that_are_wrong_are_told(self, given: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            open_sources([given])

    def test_compressed_files_are_refused_by_name(self, tmp_path: Path) -> None:
        for name in ("a.tar.gz", "a.tgz", "a.jsonl.gz"):
            (tmp_path / name).write_bytes(b"x")
            with pytest.raises(DataError, match=r"the file is compressed, expected one that can be read at any place"):
                open_sources([tmp_path / name])

    def test_more_files_than_a_process_may_open_are_read(self, tmp_path: Path) -> None:
        paths = []
        for index in range(200):
            paths.append(tmp_path / f"{index}.jsonl")
            paths[-1].write_text(json.dumps({"number": index}) + "\n")
        sources = open_sources(paths, cache_dir=tmp_path / "cache")
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        assert [source.row(0)["number"] for source in sources] == list(range(200))
        assert [source.row(0)["number"] for source in sources[:3]] == [0, 1, 2], "closed and opened again"
        if before:
            assert len(os.listdir("/proc/self/fd")) - before <= 70

    def test_groups_are_told_apart(self) -> None:
        given = ["a/rows.jsonl", "b/rows.jsonl", {"path": "c.jsonl", "name": "mine"}, ListSource([{}], name="mem")]
        assert group_names(given) == {
            "a/rows.jsonl": "a_rows",
            "b/rows.jsonl": "b_rows",
            "c.jsonl": "mine",
            "mem": "mem",
        }


class TestLists:
    def test_rows_in_memory_train_like_files(self, processor: NemotronVLProcessor) -> None:
        picture = Image.new("RGBA", (24, 16), (255, 0, 0, 128))
        before = picture.copy()
        rows = [
            {"images": [picture], "messages": [{"role": "user", "content": "<image>what?"}, BOT]},
            {"image": png(1), "messages": [{"role": "user", "content": "<image>what?"}, BOT]},
        ]
        data = VLMDataModule(train=ListSource(rows), processor=processor, batch_size=2, sampler="sequential")
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert batch.num_images.tolist() == [1, 1]
        assert batch.sources == ["rows:1", "rows:2"]
        assert picture.mode == "RGBA"
        assert picture.tobytes() == before.tobytes()
        assert rows[0]["images"][0] is picture

    def test_the_fingerprint_follows_pixels(self) -> None:
        def source(colour: int) -> ListSource:
            return ListSource([{"image": Image.new("L", (4, 4), colour), "text": "a"}])

        assert source(1).fingerprint == source(1).fingerprint != source(2).fingerprint

    def test_rows_to_answer_need_no_answer_and_the_users_source_stays_as_it_is(
        self, processor: NemotronVLProcessor
    ) -> None:
        asked = ListSource([{"messages": [{"role": "user", "content": "what?"}]}])
        data = VLMDataModule(predict=asked, processor=processor)
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert batch.sources == ["rows:1"]
        assert batch.prompts[0].endswith("<|im_start|>assistant\n")
        assert asked.layout.needs_answer
        with pytest.raises(DataError, match=r"rows:1: the 1 turn\(s\) hold no assistant turn"):
            VLMDataModule(train=asked, processor=processor).setup("fit")

    def test_media_start_where_the_data_module_says_unless_the_source_does(
        self, processor: NemotronVLProcessor, write_image: Callable[..., str], tmp_path: Path
    ) -> None:
        write_image("pictures/a.png", 32, 16)
        write_image("others/a.png", 48, 16)
        rows = [{"image": "a.png", "messages": [{"role": "user", "content": "<image>"}, BOT]}]
        pictures, others = str(tmp_path / "pictures"), str(tmp_path / "others")
        for source, width in ((ListSource(rows), 32), (ListSource(rows, media_root=others), 48)):
            before = source.media_root
            data = VLMDataModule(train=source, processor=processor, media_root=pictures, strict=True)
            data.setup("fit")
            (batch,) = data.train_dataloader()
            assert batch.image_grid_hw[0, 1] * 8 == width
            assert source.media_root == before

    def test_max_samples_of_other_sources_are_read_alike(self, processor: NemotronVLProcessor) -> None:
        rows = [{"messages": [{"role": "user", "content": f"what {index}?"}]} for index in range(3)]
        data = VLMDataModule(predict=FirstRows(ListSource(rows), 2), processor=processor)
        data.setup("predict")
        assert [batch.sources for batch in data.predict_dataloader()] == [["rows:1", "rows:2"]]


class TestFingerprints:
    """Of rows in memory: equal for equal content in any process, different for any other."""

    @staticmethod
    def of(value: Any) -> str:
        return ListSource([{"image": value, "text": "a"}]).fingerprint

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (torch.arange(3000), torch.arange(3000).index_fill(0, torch.tensor([1500]), 0)),  # repr shows the ends only
            (torch.zeros(2, 3), torch.zeros(3, 2)),
            (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
            (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
            (np.arange(3000), np.arange(3000) // 2),
            (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8)),
            (np.zeros(4, np.uint8), np.zeros(1, np.int32)),
            (np.array(["a", None], object), np.array(["b", None], object)),
            ([b"ab", b"c"], [b"a", b"bc"]),
            ([["a"], "b"], [["a", "b"]]),
            ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}),
            ("1", 1),
            (1, True),
            (datetime.date(2020, 1, 2), datetime.date(2020, 1, 3)),
            (FileSlice("a.tar", 0, 9, "x.png"), FileSlice("a.tar", 0, 8, "x.png")),
            (Path("a.png"), Path("b.png")),
        ],
        ids=str,
    )
    def test_follow_content(self, one: Any, other: Any) -> None:
        assert self.of(one) == self.of(copy.deepcopy(one)) != self.of(other)

    def test_of_an_image_follow_what_it_shows(self) -> None:
        grey = Image.new("P", (4, 4))
        grey.putpalette([value for value in range(256) for _ in range(3)])
        red = grey.copy()
        red.putpalette([255, 0, 0] * 256)
        assert self.of(grey) == self.of(grey.copy()) != self.of(red)

    def test_of_an_opened_image_are_those_of_its_pixels_and_it_stays_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(1, (300, 300)))
        (tmp_path / "b.png").write_bytes(png(2, (300, 300)))
        lazy, loaded, other = (Image.open(tmp_path / name) for name in ("a.png", "a.png", "b.png"))
        loaded.load()
        tile = list(lazy.tile)
        assert self.of(lazy) == self.of(loaded) == self.of(Image.open(io.BytesIO(png(1, (300, 300))))) != self.of(other)
        assert lazy.tile == tile, "not decoded in place: pixels of all rows would stay in memory"
        assert lazy.tobytes() == loaded.tobytes(), "and can be read yet"

    def test_of_a_damaged_image_are_those_of_its_bytes(self, processor: NemotronVLProcessor) -> None:
        """It is a bad sample like any other, not the end of the list."""
        content = png(1, (300, 300))
        cut = [Image.open(io.BytesIO(content[: len(content) // part])) for part in (2, 2, 3)]
        assert self.of(cut[0]) == self.of(cut[1]) != self.of(cut[2])
        with Image.open(io.BytesIO(content)) as closed:
            pass
        assert self.of(closed) not in {self.of(image) for image in cut}
        rows = [{"image": cut[0], "messages": [{"role": "user", "content": "<image>"}, BOT]}]
        data = VLMDataModule(train=ListSource(rows), processor=processor, strict=True)
        data.setup("fit")
        with pytest.raises(DataError, match=r"rows:1: .*cannot be decoded"):
            next(iter(data.train_dataloader()))

    @pytest.mark.parametrize("value", [object(), iter(()), lambda: None], ids=["object", "iterator", "function"])
    def test_of_what_has_no_content_to_compare_are_refused(self, value: Any) -> None:
        with pytest.raises(DataError) as caught:
            ListSource([{"text": "a"}, {"text": "a", "image": [value]}], name="mine")
        message = str(caught.value)
        assert message.startswith(f"mine:2: the row holds an object of the type {type(value).__name__}, whose content ")
        assert "expected text, numbers, bytes, arrays, tensors or PIL images" in message


class TestFileAddresses:
    def test_work_like_the_paths_they_name(
        self, write_rows: Callable[..., Path], write_image: Callable[..., str], processor: NemotronVLProcessor
    ) -> None:
        row = {"image": write_image("my data/a.png").partition("/")[2], "messages": LLAVA_LIKE}
        path = write_rows([row], "my data/rows.jsonl")
        address = path.as_uri()
        assert "%20" in address
        (plain,) = open_sources([path])
        for given in (address, f"file://localhost{path}".replace(" ", "%20"), {"path": address}):
            (source,) = open_sources([given])
            assert (source.path, source.media_root, source.name) == (plain.path, plain.media_root, plain.name)
            assert source.fingerprint == plain.fingerprint
            assert group_names([given]) == {str(path): "rows"}
        (rooted,) = open_sources([address], media_root=path.parent.as_uri())
        assert rooted.media_root == str(path.parent)
        data = VLMDataModule(train=address, processor=processor, strict=True)
        data.setup("fit")
        assert next(iter(data.train_dataloader())).num_images.tolist() == [1]

    @pytest.mark.parametrize("address", ["file://rows.jsonl", "file://data/rows.jsonl"])
    def test_of_another_host_or_without_a_root_are_refused(self, address: str) -> None:
        with pytest.raises(DataError, match=r"names the host '\w+(\.\w+)?', expected file:///absolute/path") as caught:
            VLMDataModule(train=address)
        assert str(caught.value).startswith(f"{address}: ")


LLAVA_LIKE = [{"role": "user", "content": "<image>hi"}, BOT]


class TestFormats:
    def test_the_only_image_without_a_slot_goes_first_and_is_noted(self) -> None:
        row = {
            "image": "a.png",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, BOT],
        }
        conversation = parse_row(row, "f:1")
        assert conversation.turns[1].parts == (ImageRef("a.png"), Text("q"))
        assert conversation.notes == ("image placed before the first user turn",)

    def test_video_and_audio_fill_their_slots(self) -> None:
        row = {
            "videos": ["v.mp4", ["1.png", "2.png"]],
            "audio": "a.wav",
            "conversations": [{"from": "human", "value": "<video>a<audio>b<video>"}, {"from": "gpt", "value": "x"}],
        }
        assert parse_row(row, "f:1").turns[0].parts == (
            VideoRef("v.mp4"), Text("a"), AudioRef("a.wav"), Text("b"), VideoRef(("1.png", "2.png"))
        )  # fmt: skip

    def test_html_is_text_where_no_such_media_are_listed(self) -> None:
        row = {"messages": [{"role": "user", "content": "write <video> and <audio> tags"}, BOT]}
        assert parse_row(row, "f:1").turns[0].parts == (Text("write <video> and <audio> tags"),)

    def test_parts_of_every_kind(self) -> None:
        content = [
            {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
            {"type": "video_url", "video_url": {"url": "v.mp4"}},
            {"type": "image", "image": {"bytes": b"PNG", "path": "x.png"}},
            {"type": "image", "image": {"bytes": "", "path": "x.png"}},
            {"type": "image", "image": {"bytes": b"", "path": "x.png"}},
            {"type": "image", "image": {"bytes": None, "path": "x.png"}},
            {"type": "audio", "audio": {"array": [0.0], "sampling_rate": 8000}},
            "plain",
        ]
        row = {"messages": [{"role": "user", "content": content}, BOT]}
        assert parse_row(row, "f:1").turns[0].parts == (
            AudioRef("data:audio/mp3;base64,QUJD"), VideoRef("v.mp4"), ImageRef(b"PNG"), *[ImageRef("x.png")] * 3,
            AudioRef(([0.0], 8000)), Text("plain"),
        )  # fmt: skip

    def test_a_system_text_beside_the_turns_comes_first(self) -> None:
        turns = parse_row({"system": "be short", **LLAVA, "image": "a.png"}, "f:1").turns
        assert [turn.role for turn in turns] == ["system", "user", "assistant"]
        assert turns[0].text == "be short"

    def test_tool_turns_are_kept(self) -> None:
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "42"}, BOT]}
        assert [turn.role for turn in parse_row(row, "f:1").turns] == ["user", "tool", "assistant"]

    def test_plain_columns(self) -> None:
        layout = RowFormat(columns={"question": "q", "answer": "a", "image": "i", "system": "s", "answers": "all"})
        row = {"q": "what <image>?", "a": 7, "i": ["1.png", "2.png"], "s": "be short", "all": ["7", "seven"]}
        conversation = parse_row(row, "f:1", layout)
        system, asked, answered = conversation.turns
        assert system.text == "be short"
        assert asked.parts == (ImageRef("1.png"), ImageRef("2.png"), Text("what <image>?"))
        assert answered.text == "7"
        assert conversation.references == ("7", "seven")

    @pytest.mark.parametrize(
        ("row", "words", "kind"),
        [
            ({"q": "x"}, "expected 'a' for the answer; correct columns.answer", "missing column"),
            ({"a": "x"}, "expected 'q' for the question", "missing column"),
            (
                {"q": ["x"], "a": "y"},
                "the column 'q' is a list, expected the question as a text",
                "column of another type",
            ),
        ],
    )
    def test_columns_that_are_wrong(self, row: dict[str, Any], words: str, kind: str) -> None:
        with pytest.raises(DataError) as caught:
            parse_row(row, "f:1", RowFormat(columns={"question": "q", "answer": "a"}))
        assert words in str(caught.value)
        assert caught.value.kind == kind
