"""What other libraries say in a run: once what matters, and nothing of what would mislead."""

from __future__ import annotations

import logging
import warnings


def quiet_other_libraries() -> None:
    """Says once what transformers says once per Mamba function, and drops what tells the user nothing.

    Lightning advises to synchronise numbers that are logged once per epoch: those of ours are summed up over the ranks
    before. PyTorch tells of every folder of shards that it is read by a single process where that is what we ask for.
    """
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('(data/|val/gen/|test/gen/)")
    warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    said: list[str] = []

    def once(record: logging.LogRecord) -> bool:
        if "falling back to its reference PyTorch implementation" not in record.getMessage():
            return True
        if said:
            return False
        said.append("mamba")
        record.msg, record.args = (
            "generation runs Mamba layers on transformers' PyTorch path (correct, slow): mamba-ssm or causal-conv1d is "
            "missing",
            (),
        )
        return True

    logging.getLogger("transformers.integrations.hub_kernels").addFilter(once)
