"""Which backend reads video files; and every test of video files once more with torchcodec.

torchcodec needs FFmpeg's libraries when the process starts, and takes those that PyAV brings: hence a second process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from lightning_vlm.media.video_backend import VARIABLE, torchcodec_obstacle, video_choice

ROOT = Path(__file__).parents[2]
LIBRARY = re.compile(r"(lib(?:avcodec|avdevice|avfilter|avformat|avutil|swresample|swscale))-\w+(\.so\.\d+)\..*")


def loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]


@pytest.fixture
def _looks_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchcodec was found to be is forgotten, before and after."""
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    torchcodec_obstacle.cache_clear()
    yield
    torchcodec_obstacle.cache_clear()
    for name in loaded():
        del sys.modules[name]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A package of that name, in front of any other."""
    (folder / "torchcodec").mkdir()
    (folder / "torchcodec" / "__init__.py").touch()
    (folder / "torchcodec" / "decoders.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.usefixtures("_looks_again")
class TestChoice:
    def test_is_torchcodec_where_it_can_be_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, monkeypatch, "")
        assert video_choice() == ("torchcodec", "it can be imported")
        monkeypatch.setenv(VARIABLE, "torchcodec")
        assert video_choice() == ("torchcodec", f"named by {VARIABLE}")
        monkeypatch.setenv(VARIABLE, "pyav")
        assert video_choice() == ("pyav", f"named by {VARIABLE}")

    def test_is_pyav_where_it_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchcodec", None)
        assert video_choice() == ("pyav", "torchcodec is not installed")
        monkeypatch.setenv(VARIABLE, "torchcodec")
        with pytest.raises(
            RuntimeError, match=f"^{VARIABLE}=torchcodec cannot run: torchcodec is not installed; mend "
        ):
            video_choice()

    def test_is_pyav_where_it_lacks_libraries_which_is_told_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        install(tmp_path, monkeypatch, "raise RuntimeError('Could not load libtorchcodec. Likely causes:')")
        with caplog.at_level(logging.INFO, logger="lightning_vlm"):
            name, reason = video_choice()
            assert video_choice() == (name, reason)
        assert name == "pyav"
        assert reason.startswith("torchcodec is installed but cannot load its libraries: it needs FFmpeg's (4 to 8)")
        assert [record.getMessage() for record in caplog.records] == [f"Videos are read by PyAV: {reason}."]

    def test_of_an_unknown_one_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "decord")
        with pytest.raises(RuntimeError, match=f"^{VARIABLE} is 'decord'; expected one of torchcodec, pyav$"):
            video_choice()


@pytest.fixture
def library_path(tmp_path: Path) -> str:
    """Where FFmpeg's libraries are found by the names that the system would give them."""
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed")
    bundled = Path(av.__file__).parents[1] / "av.libs"
    found = [match for path in bundled.glob("*") if (match := LIBRARY.fullmatch(path.name))]
    if not found:
        pytest.skip("this build of PyAV brings no libraries that could be linked to")
    for match in found:
        (tmp_path / f"{match[1]}{match[2]}").symlink_to(bundled / match[0])
    return f"{tmp_path}:{bundled}"


def test_torchcodec_passes_the_tests_of_video_files(library_path: str) -> None:
    names = ("test_video.py", "test_video_torchcodec.py", "test_broken_media.py")
    tests = [str(Path(__file__).parent / name) for name in names]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # Named, torchcodec that cannot be loaded is an error: were it silently PyAV, the tests would fail.
    environment |= {"LD_LIBRARY_PATH": library_path, VARIABLE: "torchcodec"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", "-rs", *tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.rstrip().splitlines()[-1]
    assert "skipped" not in summary, run.stdout
    passed = re.match(r"(\d+) passed", summary)
    assert passed, summary
    assert int(passed[1]) > 150
