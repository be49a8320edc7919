"""Loading media: a bad reference is one clear sentence, a good one is upright RGB of the announced size."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import re
import socket
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from lightning_vlm.media import open as open_module
from lightning_vlm.media.load import MediaError, MediaPolicy, image_size, load_image, looks_truncated, verify_image
from lightning_vlm.schema import FileSlice

SOURCE = "file.jsonl:12"
BOTH = pytest.mark.parametrize("load", [load_image, image_size], ids=lambda function: function.__name__)

Load = Callable[[str, MediaPolicy, str], object]


@pytest.fixture
def policy(tmp_path: Path) -> MediaPolicy:
    root = tmp_path / "media"
    root.mkdir()
    return MediaPolicy(root)


def assert_refused(load: Load, ref: str, policy: MediaPolicy, *, found: str, fix: str) -> MediaError:
    """Loads, expects an error, and checks that it is one sentence with everything that a user needs."""
    with pytest.raises(MediaError) as caught:
        load(ref, policy, SOURCE)
    text = str(caught.value)
    assert text.startswith(f"{SOURCE}: ")
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", text), text  # one sentence
    assert found in text
    assert "expected" in caught.value.problem
    assert fix in caught.value.fix
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel at all."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def png_bytes(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


class TestPaths:
    @BOTH
    def test_missing_file(self, load: Load, policy: MediaPolicy) -> None:
        assert_refused(
            load,
            "no.png",
            policy,
            found="'no.png' does not exist under the media root",
            fix="correct the path",
        )

    @BOTH
    def test_folder(self, load: Load, policy: MediaPolicy) -> None:
        (policy.media_root / "album").mkdir()
        assert_refused(load, "album", policy, found="'album' is a folder", fix="correct the path")

    @BOTH
    @pytest.mark.parametrize("ref", ["", "a\x00.png"], ids=["empty", "null byte"])
    def test_no_name(self, load: Load, policy: MediaPolicy, ref: str) -> None:
        assert_refused(load, ref, policy, found="image path is", fix="name the image file")

    @pytest.mark.parametrize("ref", ["x" * 300, "iVBORw0KGgo" * 5000], ids=["one name", "bare base64"])
    def test_name_that_no_file_can_have_is_not_printed_in_full(self, policy: MediaPolicy, ref: str) -> None:
        error = assert_refused(load_image, ref, policy, found="too long", fix="correct the path")
        assert len(str(error)) < 500

    @pytest.mark.parametrize("ref", ["\ud800.png", "circle"], ids=["lone surrogate", "links in a circle"])
    def test_name_that_cannot_be_looked_up(self, policy: MediaPolicy, ref: str) -> None:
        (policy.media_root / "circle").symlink_to(policy.media_root / "circle")
        assert_refused(load_image, ref, policy, found="cannot be looked up", fix="correct the path")

    @BOTH
    @pytest.mark.parametrize("way", ["dots", "dots inside", "absolute", "link", "link to a folder"])
    def test_outside_the_media_root(self, load: Load, policy: MediaPolicy, tmp_path: Path, way: str) -> None:
        secret = tmp_path / "secret.png"
        Image.new("RGB", (4, 4)).save(secret)
        (policy.media_root / "link.png").symlink_to(secret)
        (policy.media_root / "folder").symlink_to(tmp_path)
        refs = {
            "dots": "../secret.png",
            "dots inside": "sub/../../secret.png",
            "absolute": str(secret),
            "link": "link.png",
            "link to a folder": "folder/secret.png",
        }
        assert_refused(load, refs[way], policy, found="outside the media root", fix="under the media root")

    def test_root_whose_name_only_begins_alike_is_outside(self, policy: MediaPolicy, tmp_path: Path) -> None:
        (tmp_path / "media2").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "media2" / "a.png")
        assert_refused(
            load_image, "../media2/a.png", policy, found="outside the media root", fix="under the media root"
        )

    @pytest.mark.parametrize("way", ["relative", "dots that stay", "absolute", "link", "link to the root"])
    def test_inside_the_media_root(self, policy: MediaPolicy, tmp_path: Path, way: str) -> None:
        (policy.media_root / "a").mkdir()
        Image.new("RGB", (5, 3)).save(policy.media_root / "a" / "b.png")
        (policy.media_root / "link.png").symlink_to("a/b.png")
        (tmp_path / "alias").symlink_to(policy.media_root)
        if way == "link to the root":
            policy = MediaPolicy(tmp_path / "alias")
        refs = {
            "relative": "a/b.png",
            "dots that stay": "a/../a/b.png",
            "absolute": str(policy.media_root / "a" / "b.png"),
            "link": "link.png",
            "link to the root": "a/b.png",
        }
        assert load_image(refs[way], policy, SOURCE).size == (5, 3)
        assert image_size(refs[way], policy, SOURCE) == (3, 5)

    @BOTH
    @pytest.mark.parametrize("ref", ["file:///etc/passwd", "s3://bucket/a.png", "ftp://host/a.png", "gs://a[b"])
    def test_other_schemes(self, load: Load, policy: MediaPolicy, ref: str) -> None:
        scheme = ref.partition(":")[0]
        assert_refused(load, ref, policy, found=f"scheme {scheme!r}", fix="relative path")

    def test_colon_in_a_file_name_is_no_scheme(self, policy: MediaPolicy) -> None:
        Image.new("RGB", (5, 3)).save(policy.media_root / "page:1.png")
        assert load_image("page:1.png", policy, SOURCE).size == (5, 3)


class TestDamagedFiles:
    @BOTH
    @pytest.mark.parametrize("content", [b"", b"hello", b"<html></html>"], ids=["empty", "text", "html"])
    def test_not_an_image(self, load: Load, policy: MediaPolicy, content: bytes) -> None:
        (policy.media_root / "a.png").write_bytes(content)
        assert_refused(load, "a.png", policy, found="'a.png' cannot be decoded (not an image)", fix="replace the file")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
    def test_truncated(self, policy: MediaPolicy, kind: str) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, kind)
        (policy.media_root / "a").write_bytes(content.getvalue()[: content.tell() * 2 // 3])
        assert_refused(load_image, "a", policy, found="'a' cannot be decoded", fix="replace the file")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "ICO", "PPM", "TGA", "JPEG2000"])
    @pytest.mark.filterwarnings("ignore:Image was not the expected size")
    def test_any_damaged_byte_raises_nothing_else(self, policy: MediaPolicy, kind: str) -> None:
        if (plugin := {"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)) and not features.check(plugin):
            pytest.skip(f"this Pillow is built without {kind}")
        content = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(content, kind)
        for place in range(min(content.tell(), 300)):
            damaged = bytearray(content.getvalue())
            damaged[place] ^= 255
            (policy.media_root / "a").write_bytes(damaged)
            for load in (load_image, image_size):
                with contextlib.suppress(MediaError):
                    load("a", policy, SOURCE)

    @pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow is built without JPEG 2000")
    def test_reason_that_is_a_sentence_does_not_end_ours(self, policy: MediaPolicy) -> None:
        content = io.BytesIO()
        Image.new("RGB", (8, 8)).save(content, "JPEG2000")
        (policy.media_root / "a").write_bytes(content.getvalue()[:14])
        assert_refused(load_image, "a", policy, found="(Expected to read 8 bytes but only got 2)", fix="replace")


class TestSize:
    @BOTH
    @pytest.mark.parametrize("side", [9000, 10_000, 100_000], ids=str)  # Pillow warns from 9460, refuses from 13,378
    def test_too_many_pixels_are_refused_from_the_header(self, load: Load, policy: MediaPolicy, side: int) -> None:
        (policy.media_root / "a.png").write_bytes(png_header(side, side))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            error = assert_refused(load, "a.png", policy, found="max_image_pixels = 64,000,000", fix="max_image_pixels")
        assert "pixels, expected at most" in str(error)

    def test_same_file_with_fewer_pixels_gets_as_far_as_decoding(self, policy: MediaPolicy) -> None:
        # The counterpart that shows that the test above never decoded: there is nothing to decode in these
        # files.
        (policy.media_root / "a.png").write_bytes(png_header(8000, 8000))
        assert_refused(load_image, "a.png", policy, found="cannot be decoded", fix="replace the file")
        assert image_size("a.png", policy, SOURCE) == (8000, 8000)

    @BOTH
    def test_limit_itself_is_allowed(self, load: Load, policy: MediaPolicy) -> None:
        Image.new("RGB", (20, 10)).save(policy.media_root / "a.png")
        load("a.png", MediaPolicy(policy.media_root, max_image_pixels=200), SOURCE)
        strict = MediaPolicy(policy.media_root, max_image_pixels=199)
        assert_refused(load, "a.png", strict, found="20 x 10 = 200 pixels", fix="raise data.max_image_pixels")

    @BOTH
    def test_limit_beyond_pillows_own_names_pillows(self, load: Load, policy: MediaPolicy) -> None:
        (policy.media_root / "a.png").write_bytes(png_header(20_000, 20_000))
        generous = MediaPolicy(policy.media_root, max_image_pixels=10**9)
        error = assert_refused(load, "a.png", generous, found="Pillow's own limit", fix="PIL.Image.MAX_IMAGE_PIXELS")
        assert "1,000,000,000" not in str(error)

    def test_damage_behind_the_header_does_not_matter_for_the_size(self, policy: MediaPolicy) -> None:
        (policy.media_root / "a.png").write_bytes(png_header(30, 20))
        assert image_size("a.png", policy, SOURCE) == (20, 30)


class TestPixels:
    # Upright: red on the left, blue on the right, three times as wide as high.
    upright = Image.new("RGB", (48, 16), "red")
    upright.paste("blue", (24, 0, 48, 16))
    undo: dict[int, Image.Transpose] = {  # noqa: RUF012  what a camera's sensor did, by EXIF orientation
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_are_upright_and_of_the_announced_size(self, policy: MediaPolicy, kind: str, orientation: int) -> None:
        stored = self.upright.transpose(self.undo[orientation]) if orientation in self.undo else self.upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(policy.media_root / "a", kind, exif=exif)
        image = load_image("a", policy, SOURCE)
        assert image_size("a", policy, SOURCE) == (image.height, image.width) == (16, 48)
        red, _, blue = image.getpixel((4, 8))
        assert red > 200 > 50 > blue
        red, _, blue = image.getpixel((44, 8))
        assert blue > 200 > 50 > red

    def test_orientation_behind_the_pixels_is_ignored_by_size_and_image_alike(self, policy: MediaPolicy) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        content = io.BytesIO()
        self.upright.save(content, "PNG", exif=exif)
        raw = content.getvalue()
        start = raw.index(b"eXIf") - 4
        end = start + 12 + struct.unpack(">I", raw[start : start + 4])[0]
        tail = raw.index(b"IEND") - 4
        (policy.media_root / "a.png").write_bytes(raw[:start] + raw[end:tail] + raw[start:end] + raw[tail:])
        image = load_image("a.png", policy, SOURCE)
        assert image_size("a.png", policy, SOURCE) == (image.height, image.width) == (16, 48)

    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            *itertools.product(["1", "L", "LA", "P", "RGBA", "I;16"], ["PNG", "TIFF"]),
            ("CMYK", "TIFF"),
            ("YCbCr", "TIFF"),
        ],
    )
    def test_become_rgb_of_the_same_colour(self, policy: MediaPolicy, mode: str, kind: str) -> None:
        if mode == "I;16":
            image = Image.fromarray(np.full((3, 5), 65535, dtype=np.uint16))
        else:
            image = Image.new("RGB", (5, 3), "white").convert(mode)
        image.save(policy.media_root / "a", kind)
        loaded = load_image("a", policy, SOURCE)
        assert loaded.mode == "RGB"
        assert loaded.size == (5, 3)
        assert loaded.getpixel((2, 1)) == (255, 255, 255)

    def test_colours_of_a_palette_and_of_cmyk_are_kept(self, policy: MediaPolicy) -> None:
        self.upright.convert("P").save(policy.media_root / "p.png")
        self.upright.convert("RGBA").save(policy.media_root / "a.png")
        self.upright.convert("CMYK").save(policy.media_root / "c.tiff")
        for name in ("p.png", "a.png", "c.tiff"):
            assert np.array_equal(np.asarray(load_image(name, policy, SOURCE)), np.asarray(self.upright)), name

    def test_sixteen_bit_grey_is_scaled_not_clipped(self, policy: MediaPolicy) -> None:
        ramp = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
        Image.fromarray(ramp).save(policy.media_root / "a.png")
        assert np.asarray(load_image("a.png", policy, SOURCE))[0, :, 0].tolist() == [0, 1, 128, 255]

    @pytest.mark.parametrize("value", [-1.0, 0.5, 256.0, float("nan")])
    def test_float_image_outside_0_to_255_is_refused(self, policy: MediaPolicy, value: float) -> None:
        Image.fromarray(np.full((3, 5), value, dtype=np.float32)).save(policy.media_root / "a.tiff")
        assert_refused(load_image, "a.tiff", policy, found="expected pixels in 0..255", fix="replace the file")

    def test_loading_changes_neither_file_nor_later_loads(self, policy: MediaPolicy) -> None:
        path = policy.media_root / "a.png"
        self.upright.convert("P").save(path)
        before, modified = path.read_bytes(), path.stat().st_mtime_ns
        first = load_image("a.png", policy, SOURCE)
        expected = np.array(first)
        first.paste("green", (0, 0, 48, 16))
        assert np.array_equal(np.asarray(load_image("a.png", policy, SOURCE)), expected)
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, modified)


class TestDataUri:
    @pytest.mark.parametrize("prefix", ["data:image/png;base64,", "DATA:image/png;base64,", "data:;base64,"])
    def test_is_decoded(self, policy: MediaPolicy, prefix: str) -> None:
        ref = prefix + base64.b64encode(png_bytes(Image.new("RGB", (5, 3), "red"))).decode()
        assert load_image(ref, policy, SOURCE).getpixel((0, 0)) == (255, 0, 0)
        assert image_size(ref, policy, SOURCE) == (3, 5)

    @BOTH
    @pytest.mark.parametrize(
        "ref",
        [
            "data:image/png;base64,@@@",
            "data:image/png;base64,abcde",
            "data:image/png;base64,äöü",
            "data:image/png,abcd",
            "data:",
        ],
        ids=["letters", "length", "not ASCII", "not base64", "nothing"],
    )
    def test_broken_encoding(self, load: Load, policy: MediaPolicy, ref: str) -> None:
        assert_refused(load, ref, policy, found="expected 'data:image/...;base64,...'", fix="base64")

    @BOTH
    def test_broken_image_is_not_printed_in_full(self, load: Load, policy: MediaPolicy) -> None:
        ref = "data:image/png;base64," + base64.b64encode(b"no image " * 1000).decode()
        error = assert_refused(load, ref, policy, found="not an image", fix="replace")
        assert len(str(error)) < 500

    @BOTH
    def test_too_many_pixels(self, load: Load, policy: MediaPolicy) -> None:
        ref = "data:image/png;base64," + base64.b64encode(png_header(10_000, 10_000)).decode()
        assert_refused(load, ref, policy, found="10000 x 10000 = 100,000,000 pixels", fix="max_image_pixels")


class TestUrls:
    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """Serves ``/image.png`` (5 x 3, red) and ``/page.html`` on 127.0.0.1; anything else is 404."""
        monkeypatch.setenv("no_proxy", "*")
        pages = {"/image.png": png_bytes(Image.new("RGB", (5, 3), "red")), "/page.html": b"<html></html>"}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = pages.get(self.path)
                self.send_response(404 if content is None else 200)
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
            thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield f"http://127.0.0.1:{httpd.server_port}"
            httpd.shutdown()
            thread.join()

    @BOTH
    @pytest.mark.parametrize("scheme", ["http", "https", "HTTP"])
    def test_are_refused_by_default(self, load: Load, policy: MediaPolicy, scheme: str) -> None:
        assert_refused(load, f"{scheme}://127.0.0.1:1/a.png", policy, found="is a URL", fix="allow_urls: true")

    def test_are_downloaded_if_allowed(self, policy: MediaPolicy, server: str) -> None:
        assert_refused(load_image, f"{server}/image.png", policy, found="is a URL", fix="allow_urls: true")
        allowed = MediaPolicy(policy.media_root, allow_urls=True)
        assert load_image(f"{server}/image.png", allowed, SOURCE).getpixel((4, 2)) == (255, 0, 0)
        assert image_size(f"{server}/image.png", allowed, SOURCE) == (3, 5)

    def test_limits_hold_for_downloads(self, policy: MediaPolicy, server: str) -> None:
        allowed = MediaPolicy(policy.media_root, allow_urls=True, max_image_pixels=14)
        assert_refused(load_image, f"{server}/image.png", allowed, found="5 x 3 = 15 pixels", fix="max_image_pixels")

    @pytest.mark.parametrize(
        ("path", "found"),
        [("/none.png", "404"), ("/page.html", "not an image"), ("/a b.png", "cannot be downloaded")],
        ids=["missing", "a web page", "a space"],
    )
    def test_that_give_no_image(self, policy: MediaPolicy, server: str, path: str, found: str) -> None:
        allowed = MediaPolicy(policy.media_root, allow_urls=True)
        assert_refused(load_image, server + path, allowed, found=found, fix="file")

    def test_that_are_malformed_or_unreachable(self, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "*")
        allowed = MediaPolicy(policy.media_root, allow_urls=True)
        with socket.socket() as bound:  # bound and not listening: nobody answers at this port
            bound.bind(("127.0.0.1", 0))
            for ref in (f"http://127.0.0.1:{bound.getsockname()[1]}/a.png", "http://[abc", "http://"):
                assert_refused(load_image, ref, allowed, found="cannot be downloaded", fix="check the URL")

    def test_server_that_speaks_no_http(self, policy: MediaPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "*")
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def answer() -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 mail.example.org ready\r\n\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            allowed = MediaPolicy(policy.media_root, allow_urls=True)
            ref = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
            assert_refused(load_image, ref, allowed, found="cannot be downloaded", fix="check the URL")
            thread.join()


def test_formats_that_run_external_programs_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(MediaError, match=r"file.jsonl:12: image 'a.eps' cannot be decoded"):
        load_image("a.eps", MediaPolicy(tmp_path), "file.jsonl:12")


class TestGivenByValue:
    """A reader may hand over bytes, a member of a shard, or an image itself."""

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8))

    @pytest.mark.parametrize("way", ["bytes", "slice", "path object", "PIL", "numpy", "tensor", "channels first"])
    def test_gives_the_same_image(self, policy: MediaPolicy, tmp_path: Path, way: str) -> None:
        content = png_bytes(self.picture)
        (tmp_path / "shard.tar").write_bytes(b"x" * 512 + content + b"y" * 700)
        self.picture.save(Path(policy.media_root) / "a.png")
        array = np.array(self.picture)
        ref: Any = {
            "bytes": content,
            "slice": FileSlice(str(tmp_path / "shard.tar"), 512, len(content), "a.png"),
            "path object": Path("a.png"),
            "PIL": self.picture,
            "numpy": array,
            "tensor": torch.from_numpy(array),
            "channels first": torch.from_numpy(array).permute(2, 0, 1),
        }[way]
        image = load_image(ref, policy, SOURCE)
        assert image_size(ref, policy, SOURCE) == verify_image(ref, policy, SOURCE, decode=True) == (3, 5)
        assert np.array_equal(np.asarray(image), array)
        image.paste("red", (0, 0, 5, 3))
        assert np.array_equal(np.asarray(load_image(ref, policy, SOURCE)), array), "what was given is left alone"

    @pytest.mark.parametrize("opened", [False, True], ids=["made", "opened"])
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    @pytest.mark.parametrize("loaded", [False, True], ids=["header", "decoded"])
    def test_image_object_is_turned_in_the_copy_only(
        self, policy: MediaPolicy, kind: str, loaded: bool, opened: bool
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        content = io.BytesIO()
        self.picture.save(content, kind, exif=exif)
        image = Image.open(content)
        if loaded:
            image.load()
        if not opened:
            image = image.copy()
        size = image_size(image, policy, SOURCE)
        assert load_image(image, policy, SOURCE).size == size[::-1]
        assert image_size(image, policy, SOURCE) == size
        if kind != "TIFF":  # which Pillow turns itself while decoding
            assert size == (5, 3)
            assert image.size == (5, 3)
            assert image.getexif()[0x0112] == 6

    @BOTH
    def test_limit_holds_for_images_and_arrays(self, load: Load, policy: MediaPolicy) -> None:
        strict = MediaPolicy(policy.media_root, max_image_pixels=14)
        for ref in (self.picture, np.array(self.picture), png_bytes(self.picture)):
            error = assert_refused(load, ref, strict, found="5 x 3 = 15 pixels", fix="max_image_pixels")
            assert error.kind == "too many pixels"

    def test_size_of_a_member_reads_its_header_only(
        self, policy: MediaPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(noise).save(content, "JPEG", quality=95)
        (tmp_path / "shard.tar").write_bytes(b"x" * 512 + content.getvalue())
        read = []
        original = open_module._Window.readinto

        def counted(window: Any, buffer: Any) -> int:
            read.append(original(window, buffer))
            return read[-1]

        monkeypatch.setattr(open_module._Window, "readinto", counted)
        member = FileSlice(str(tmp_path / "shard.tar"), 512, content.tell(), "a.jpg")
        assert image_size(member, policy, SOURCE) == (800, 800)
        assert sum(read) < 20_000 < content.tell()
        assert verify_image(member, policy, SOURCE) == (800, 800)
        assert sum(read) < 60_000 < content.tell()
        read.clear()
        load_image(member, policy, SOURCE)
        assert sum(read) >= content.tell() - 20_000

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_first_frame_of_an_animation(self, policy: MediaPolicy, kind: str) -> None:
        frames = [Image.new("RGB", (5, 3), colour) for colour in ("red", "lime", "blue")]
        content = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(content, kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(content).n_frames == 3
        assert load_image(content.getvalue(), policy, SOURCE).getpixel((2, 1)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_transparent_part_of_a_file_shows_white(self, policy: MediaPolicy, kind: str) -> None:
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (2, 2, 6, 6))
        content = io.BytesIO()
        image.save(content, kind, **({"lossless": True} if kind == "WEBP" else {}))
        loaded = load_image(content.getvalue(), policy, SOURCE)
        assert loaded.getpixel((0, 0)) == (255, 255, 255)
        assert loaded.getpixel((4, 4)) == (0, 0, 0)

    @pytest.mark.parametrize(("colour_type", "channels"), [(4, 2), (6, 4)], ids=["grey", "RGB"])
    def test_sixteen_bits_with_opacity(self, policy: MediaPolicy, colour_type: int, channels: int) -> None:
        pixels = np.array([[[0] * (channels - 1) + [alpha] for alpha in (0, 32768, 65535)]], dtype=">u2")

        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, colour_type, 0, 0, 0))
        content += chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes())) + chunk(b"IEND", b"")
        image = load_image(content, policy, SOURCE)
        assert [image.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, (127,) * 3, (0,) * 3]


class TestVerify:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def content(self, kind: str) -> bytes:
        stream = io.BytesIO()
        self.noise.save(stream, kind)
        return stream.getvalue()

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
    def test_finds_a_missing_end_without_being_asked_to_decode(self, policy: MediaPolicy, kind: str) -> None:
        content = self.content(kind)
        assert verify_image(content, policy, SOURCE) == (64, 64)
        assert not looks_truncated(io.BytesIO(content), kind)
        for kept in range(len(content) // 3, len(content) - 100, len(content) // 50):
            cut = content[:kept]
            assert image_size(cut, policy, SOURCE) == (64, 64), "the header is there"
            if looks_truncated(io.BytesIO(cut), kind):
                error = assert_refused(verify_image, cut, policy, found="cannot be decoded", fix="replace the file")
                assert error.kind == "damaged image"
            else:  # a GIF that happens to be cut behind a byte like its last
                assert (kind, cut[-1:]) == ("GIF", b";")

    @pytest.mark.parametrize("lossless", [False, True])
    def test_cut_webp_is_refused_with_its_header(self, policy: MediaPolicy, lossless: bool) -> None:
        content = io.BytesIO()
        self.noise.save(content, "WEBP", lossless=lossless)
        for kept in range(12, content.tell(), 7):
            with pytest.raises(MediaError):
                image_size(content.getvalue()[:kept], policy, SOURCE)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
    def test_does_not_decode_a_whole_file(
        self, policy: MediaPolicy, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content = self.content(kind)
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
        assert verify_image(content, policy, SOURCE) == (64, 64)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
    def test_bytes_behind_the_end_are_no_damage(self, policy: MediaPolicy, kind: str) -> None:
        content = self.content(kind) + b"\0" * 500
        assert not looks_truncated(io.BytesIO(content), kind)
        assert load_image(content, policy, SOURCE).size == verify_image(content, policy, SOURCE) == (64, 64)

    def test_a_suspect_that_decodes_is_accepted(self, policy: MediaPolicy) -> None:
        content = self.content("PNG")[:-12]  # all pixels, no IEND
        assert looks_truncated(io.BytesIO(content), "PNG")
        assert verify_image(content, policy, SOURCE) == (64, 64)
        assert load_image(content, policy, SOURCE).size == (64, 64)

    def test_keeps_the_position(self) -> None:
        for kind in ("JPEG", "GIF"):
            stream = io.BytesIO(self.content(kind))
            stream.seek(17)
            looks_truncated(stream, kind)
            assert stream.tell() == 17

    def test_damage_in_the_middle_is_found_by_decoding_alone(self, policy: MediaPolicy) -> None:
        damaged = bytearray(self.content("PNG"))
        damaged[len(damaged) // 2] ^= 255
        assert verify_image(bytes(damaged), policy, SOURCE) == (64, 64)
        with pytest.raises(MediaError, match="cannot be decoded"):
            verify_image(bytes(damaged), policy, SOURCE, decode=True)

    def test_numbers_out_of_range_are_found_without_being_asked(self, policy: MediaPolicy) -> None:
        Image.fromarray(np.full((3, 5), 0.5, dtype=np.float32)).save(Path(policy.media_root) / "a.tiff")
        assert image_size("a.tiff", policy, SOURCE) == (3, 5)
        assert_refused(verify_image, "a.tiff", policy, found="expected pixels in 0..255", fix="replace the file")
