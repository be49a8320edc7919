"""The entry of ``lightning-vlm`` and ``python -m lightning_vlm``: sets what PyTorch reads when it is imported.

GNU OpenMP, which PyTorch computes with on CPUs, lets idle threads spin. Where another process wants the same cores (a
worker that loads data, a second run) they spin against it, and a step of 0.1 s was seen to take 4 s. Threads that sleep
while they wait do not. Whoever sets the variable keeps their value.
"""

from __future__ import annotations

import logging
import os
import sys


def main() -> int | None:
    """Runs the command line; returns its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("torchao", "torch.utils._pytree"):  # torchao tells of each GPU kernel that a machine has no use for
        logging.getLogger(name).setLevel(logging.ERROR)
    from lightning_vlm.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
