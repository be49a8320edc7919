"""Which errors are answers to the user, and which are defects of this package: these keep their traceback."""

from __future__ import annotations

import linecache
import traceback


def is_refusal(error: BaseException) -> bool:
    """Whether this package raised an error itself, in a sentence about its settings.

    What Python or another library raises under it, or an operation of ours that went wrong, is none.

    Args:
        error: Caught.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    ours = str(frame.f_globals.get("__name__", "")).startswith("lightning_vlm.")
    return ours and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
