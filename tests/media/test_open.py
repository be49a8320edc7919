"""Where bytes come from: stores behind an address, shards, redirects; and what no name can reach."""

from __future__ import annotations

import io
import pickle
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_vlm.media.audio import load_audio
from lightning_vlm.media.load import image_size, load_image
from lightning_vlm.media.open import _Window, open_media
from lightning_vlm.media.policy import MediaError, MediaPolicy
from lightning_vlm.media.video import load_video
from lightning_vlm.schema import FileSlice

SOURCE = "file.jsonl:12"


def png(colour: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (5, 3), colour).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def store() -> Iterator[Any]:
    """fsspec's store in memory, with an image inside and outside the root ``memory://bucket/images``."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/images/a/b.png", png())
    memory.pipe("/bucket/secret.png", png("blue"))
    memory.pipe("/bucket/images2/c.png", png("blue"))
    yield memory
    memory.rm("/bucket", recursive=True)


class TestRemoteRoot:
    policy = MediaPolicy("memory://bucket/images")

    @pytest.mark.parametrize("ref", ["a/b.png", "a/../a/b.png", "./a//b.png"])
    def test_names_are_joined_under_it(self, store: Any, ref: str) -> None:
        assert load_image(ref, self.policy, SOURCE).getpixel((0, 0)) == (255, 0, 0)
        assert image_size(ref, MediaPolicy("memory://bucket/images/"), SOURCE) == (3, 5)

    @pytest.mark.parametrize(
        "ref",
        [
            "../secret.png",
            "a/../../secret.png",
            "../images2/c.png",
            "/bucket/secret.png",
            "..",
            "%2e%2e/secret.png",
            "..\\secret.png",
        ],
    )
    def test_no_name_leaves_it(self, store: Any, ref: str) -> None:
        with pytest.raises(MediaError, match="leads outside the media root 'memory://bucket/images'") as caught:
            load_image(ref, self.policy, SOURCE)
        assert caught.value.kind == "outside the media root"

    def test_a_name_is_never_an_address(self, store: Any, tmp_path: Path) -> None:
        (tmp_path / "secret.png").write_bytes(png())
        for ref in (f"x::file://{tmp_path}/secret.png", "memory://bucket/secret.png", f"file://{tmp_path}/secret.png"):
            with pytest.raises(MediaError) as caught:
                load_image(ref, self.policy, SOURCE)
            assert caught.value.kind == "URL not allowed"
        with pytest.raises(MediaError, match="does not exist") as caught:
            load_image(f"x::file:{tmp_path}/secret.png", self.policy, SOURCE)
        assert caught.value.kind == "missing file"

    def test_missing_file_names_the_root(self, store: Any) -> None:
        with pytest.raises(MediaError, match=r"image 'no\.png' does not exist under the media root 'memory:") as e:
            load_image("no.png", self.policy, SOURCE)
        assert e.value.kind == "missing file"

    def test_without_the_stores_package_it_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(address: str) -> None:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
        with pytest.raises(MediaError, match=r"cannot be fetched \(Install s3fs to access S3\)") as caught:
            load_image("a.png", MediaPolicy("s3://bucket"), SOURCE)
        assert caught.value.kind == "extra not installed"

    def test_without_fsspec_it_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(MediaError, match="needs fsspec, which is not installed") as caught:
            load_image("a.png", self.policy, SOURCE)
        assert caught.value.kind == "extra not installed"

    def test_store_that_fails_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(address: str) -> None:
            raise RuntimeError("no credentials\nsecond line")

        monkeypatch.setattr(fsspec.core, "url_to_fs", failing)
        with pytest.raises(MediaError, match=r"'a.png' cannot be downloaded \(no credentials\), expected") as caught:
            load_image("a.png", self.policy, SOURCE)
        assert caught.value.kind == "download failed"


class TestFolder:
    def test_is_resolved_once_for_all_of_its_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "alias").symlink_to("images")
        (tmp_path / "images" / "a.png").write_bytes(png())
        resolved: list[Path] = []
        resolve = Path.resolve
        monkeypatch.setattr(Path, "resolve", lambda path: resolved.append(path) or resolve(path))
        policy = MediaPolicy(tmp_path / "alias")
        for _ in range(3):
            assert load_image("a.png", policy, SOURCE).size == (5, 3)
        assert resolved.count(tmp_path / "alias") == 1

    def test_link_made_after_the_first_image_leads_nowhere_else(self, tmp_path: Path) -> None:
        root = tmp_path / "images"
        (root / "in").mkdir(parents=True)
        (tmp_path / "secret").mkdir()
        for file in (root / "a.png", root / "in" / "a.png", tmp_path / "secret" / "a.png"):
            file.write_bytes(png())
        policy = MediaPolicy(root)
        load_image("in/a.png", policy, SOURCE)
        (root / "in").rename(root / "moved")
        (root / "in").symlink_to(tmp_path / "secret")
        with pytest.raises(MediaError, match="leads outside"):
            load_image("in/a.png", policy, SOURCE)
        root.rename(tmp_path / "old")
        root.symlink_to(tmp_path / "secret")  # the root itself, turned to another place
        with pytest.raises(MediaError, match="leads outside"):
            load_image("a.png", policy, SOURCE)

    def test_policy_is_equal_hashed_and_sent_as_before(self, tmp_path: Path) -> None:
        used, fresh = MediaPolicy(tmp_path), MediaPolicy(tmp_path)
        (tmp_path / "a.png").write_bytes(png())
        load_image("a.png", used, SOURCE)
        assert used == fresh
        assert hash(used) == hash(fresh)
        assert pickle.loads(pickle.dumps(used)) == used
        (tmp_path / "b").mkdir()
        assert replace(used, media_root=tmp_path / "b").folder == (tmp_path / "b").resolve()


class TestAllowedSchemes:
    def test_are_read_through_fsspec(self, store: Any, tmp_path: Path) -> None:
        ref = "memory://bucket/secret.png"
        with pytest.raises(MediaError, match="has the scheme 'memory'"):
            load_image(ref, MediaPolicy(tmp_path, allow_urls=True), SOURCE)
        assert load_image(ref, MediaPolicy(tmp_path, allow_urls=("memory",)), SOURCE).size == (5, 3)
        with pytest.raises(MediaError, match="is a URL"):
            load_image("http://127.0.0.1:1/a.png", MediaPolicy(tmp_path, allow_urls=("memory",)), SOURCE)

    def test_no_other_scheme_hides_behind_one(self, store: Any, tmp_path: Path) -> None:
        (tmp_path / "secret.png").write_bytes(png())
        policy = MediaPolicy(tmp_path, allow_urls=("memory", "simplecache"))
        for ref in (f"simplecache::file://{tmp_path}/secret.png", f"memory://x::file://{tmp_path}/secret.png"):
            with pytest.raises(MediaError):
                load_image(ref, policy, SOURCE)

    def test_redirect_goes_no_further_than_the_row_may(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "*")
        target = {"/a.png": "ftp://127.0.0.1:1/a.png", "/b.png": "/c.png"}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302 if self.path in target else 200)
                if self.path in target:
                    self.send_header("Location", target[self.path])
                self.end_headers()
                self.wfile.write(b"" if self.path in target else png())

            def log_message(self, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
            thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            address, policy = f"http://127.0.0.1:{httpd.server_port}", MediaPolicy(tmp_path, allow_urls=True)
            assert load_image(f"{address}/b.png", policy, SOURCE).size == (5, 3)
            with pytest.raises(MediaError, match="redirected to the scheme 'ftp', which is not allowed"):
                load_image(f"{address}/a.png", policy, SOURCE)
            httpd.shutdown()
            thread.join()


class TestPolicy:
    @pytest.mark.parametrize("root", ["file:///data", "local://data"])
    def test_root_that_would_follow_links_is_refused(self, root: str) -> None:
        with pytest.raises(ValueError, match="expected the folder's path"):
            MediaPolicy(root)

    @pytest.mark.parametrize("allowed", [("file",), ("https", "local"), ("s3://",), ("",), ("S3",)])
    def test_schemes_are_checked(self, allowed: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="expected schemes like 'https' or 's3', never 'file'"):
            MediaPolicy(".", allow_urls=allowed)

    def test_text_for_schemes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected true, false or a list of schemes"):
            MediaPolicy(".", allow_urls="s3")  # type: ignore[arg-type]

    def test_root_key_does_not_depend_on_how_it_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert MediaPolicy(".").root_key == MediaPolicy(tmp_path).root_key == str(tmp_path.resolve())
        assert MediaPolicy("s3://bucket/a").root_key == "s3://bucket/a"


class TestSlices:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_reads_as_its_bytes_alone_would(self, data: st.DataObject) -> None:
        content = data.draw(st.binary(max_size=60))
        before, after = data.draw(st.binary(max_size=9)), data.draw(st.binary(max_size=9))
        window = _Window(io.BytesIO(before + content + after), len(before), len(content))
        alone = io.BytesIO(content)
        for _ in range(6):
            whence = data.draw(st.sampled_from([0, 1, 2]))
            offset = data.draw(st.integers(0 if whence == 0 else -5, 70))
            if {1: alone.tell(), 2: len(content)}.get(whence, 0) + offset < 0:
                continue
            assert window.seek(offset, whence) == alone.seek(offset, whence)
            count = data.draw(st.integers(-1, 30))
            assert window.read(count) == alone.read(count)
            assert window.tell() == alone.tell()

    def test_seeking_before_its_start_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="expected 0 or more"):
            _Window(io.BytesIO(b"secret"), 3, 2).seek(-1)

    def test_closes_the_shard(self, tmp_path: Path) -> None:
        (tmp_path / "shard.tar").write_bytes(b"xxabcyy")
        stream = open_media(FileSlice(str(tmp_path / "shard.tar"), 2, 3, "a"), MediaPolicy(tmp_path), SOURCE)
        whole = stream.raw._whole  # type: ignore[attr-defined]
        assert stream.read() == b"abc"
        stream.close()
        assert whole.closed

    def test_of_a_shard_in_a_store(self, store: Any, tmp_path: Path) -> None:
        store.pipe("/bucket/shard.tar", b"x" * 512 + png() + b"y" * 512)
        member = FileSlice("memory://bucket/shard.tar", 512, len(png()), "a.png")
        assert load_image(member, MediaPolicy(tmp_path), SOURCE).size == (5, 3)


@pytest.mark.parametrize("load", [load_image, load_video, load_audio], ids=lambda function: function.__name__)
@settings(max_examples=150, deadline=None)
@given(ref=st.one_of(st.text(max_size=40), st.binary(max_size=40), st.integers(), st.none(), st.tuples(st.text())))
def test_whatever_a_row_holds_is_refused_in_one_sentence(load: Any, ref: Any) -> None:
    with pytest.raises(MediaError) as caught:
        load(ref, MediaPolicy(Path(__file__).parent / "no such folder"), SOURCE)
    assert caught.value.kind
    assert "expected" in caught.value.problem
