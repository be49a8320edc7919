"""Who reads video files: torchcodec where it can be imported, else PyAV; and what either must tell of a file.

A run must not depend on which of them is installed, so torchcodec answers only where it is sure to answer as PyAV does
(`video_torchcodec` says where) and every other file, damaged ones among them, is read by PyAV: an installation of
torchcodec alone reads fewer files. The environment variable ``LIGHTNING_VLM_VIDEO_BACKEND`` names one explicitly.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from PIL import Image

from lightning_vlm.media.open import open_media
from lightning_vlm.media.policy import MediaError, MediaPolicy, describe

VARIABLE = "LIGHTNING_VLM_VIDEO_BACKEND"
_NAMES = ("torchcodec", "pyav")
_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video says of itself.

    Attributes:
        num_frames: How many frames it shows.
        height: Of a frame, upright.
        width: Of a frame, upright.
        fps: Frames per second, on average; ``None`` where nothing tells (a list of images). A Matroska file of variable
            frame rate may say a nominal one (25 for 30 frames in eight seconds): times that are counted by it, as vLLM
            counts them too, are then not those of the clock.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None

    @property
    def duration_s(self) -> float | None:
        """Its length in seconds, ``None`` where nothing tells."""
        return self.num_frames / self.fps if self.fps else None


class VideoFile(Protocol):
    """A video file that was opened and accepted.

    Attributes:
        info: What its header says.
    """

    info: VideoInfo

    def decode(self, indices: list[int]) -> tuple[list[Image.Image], tuple[float, ...] | None]:
        """Frames of these numbers, rising, upright; and when each is shown.

        Returns:
            The frames, fewer where the file ends early; their times in seconds from the first frame of the video,
            ``None`` where nothing tells.
        """


def video_choice() -> tuple[str, str]:
    """Which backend reads video files, and why.

    Returns:
        ``torchcodec`` or ``pyav``, which need not be installed; and the reason.

    Raises:
        RuntimeError: If ``LIGHTNING_VLM_VIDEO_BACKEND`` names one that is unknown, or torchcodec that cannot run here.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted not in _NAMES:
        raise RuntimeError(f"{VARIABLE} is {wanted!r}; expected one of {', '.join(_NAMES)}")
    if wanted == "pyav":
        return "pyav", f"named by {VARIABLE}"
    obstacle = torchcodec_obstacle()
    if wanted and obstacle:
        raise RuntimeError(f"{VARIABLE}=torchcodec cannot run: {obstacle}; mend that or unset {VARIABLE}")
    if obstacle:
        return "pyav", obstacle
    return "torchcodec", f"named by {VARIABLE}" if wanted else "it can be imported"


@functools.cache
def torchcodec_obstacle() -> str:
    """Why torchcodec cannot be used, empty if it can; tried once, and told once in the log."""
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed"
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception:  # RuntimeError or OSError, with a page of tracebacks: one for each version of FFmpeg
        obstacle = (
            "torchcodec is installed but cannot load its libraries: it needs FFmpeg's (4 to 8) on the system and its "
            "own build for this PyTorch, for CPU or CUDA"
        )
        _log.info("Videos are read by PyAV: %s.", obstacle)
        return obstacle
    return ""


def read_video(
    ref: Any, policy: MediaPolicy, source: str, use: Callable[[VideoFile], Answer], header_only: bool = False
) -> Answer:
    """Opens a video file and hands it to ``use``.

    Args:
        ref: As for `open_media`.
        policy: What is allowed.
        source: ``file:line`` of the row, for the error.
        use: What is done with it. May be called twice: where torchcodec gives up half way, PyAV begins anew.
        header_only: Nothing is decoded: PyAV reads it where it is installed, for torchcodec passes over the whole file.

    Returns:
        What ``use`` returns.

    Raises:
        MediaError: If the file is missing, not allowed, unreadable or empty, if its backend is not installed, or what
            ``use`` raises.
        RuntimeError: As for `video_choice`.
    """
    from lightning_vlm.media.video_pyav import opened_by_pyav
    from lightning_vlm.media.video_torchcodec import TorchcodecFile

    what = describe(ref, "video")
    name, _ = video_choice()
    with open_media(ref, policy, source, "video") as file:
        given_up = None
        if name == "torchcodec" and not (header_only and importlib.util.find_spec("av")):
            try:
                return use(TorchcodecFile(file, policy, what, source))
            except MediaError:
                raise
            except Exception as error:  # whatever it stumbles over: what is wrong, PyAV tells
                _log.debug("%s: %s is read by PyAV: %s", source, what, error)
                given_up = error
                file.seek(0)
        with opened_by_pyav(file, policy, what, source, given_up) as video:
            return use(video)


def empty_video(what: str, found: str, source: str) -> MediaError:
    """The error of a video without frames.

    Args:
        what: As `describe` names it.
        found: What it has instead.
        source: ``file:line`` of the row.
    """
    return MediaError(
        source,
        f"{what} has {found}, expected a video of at least one frame",
        "replace the file or remove the row",
        "empty video",
    )
