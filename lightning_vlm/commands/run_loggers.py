"""The loggers of a run: W&B logged in, logged out and absent."""

from __future__ import annotations

import importlib.util
import netrc
import os
import urllib.parse
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info


def usable_loggers(loggers: Any, folder: str) -> Any:
    """Makes a configured WandbLogger work when nobody is logged in (offline) or wandb is absent (a CSV file).

    Args:
        loggers: ``trainer.logger`` of a config.
        folder: Of the run.
    """
    if not isinstance(loggers, list) and not hasattr(loggers, "class_path"):
        return loggers
    kept = []
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not getattr(logger, "class_path", "").endswith("WandbLogger"):
            kept.append(logger)
        elif importlib.util.find_spec("wandb") is None:
            rank_zero_info("wandb is not installed: the run is logged without it (pip install wandb)")
        else:
            if "WANDB_MODE" not in os.environ and not _logged_in_to_wandb():
                rank_zero_info("nobody is logged in to W&B: the run is logged offline (wandb login; wandb sync)")
                os.environ["WANDB_MODE"] = "offline"
                os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would use the network all the same
            kept.append(logger)
    if not kept:
        rank_zero_info(f"the metrics go to CSV files under {folder}/metrics")
        init_args = Namespace(save_dir=folder, name="metrics")
        kept.append(Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=init_args))
    return kept


def _logged_in_to_wandb() -> bool:
    """Whether W&B would find a key: in the environment, or in the netrc file that ``wandb login`` writes."""
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return path.is_file() and host in netrc.netrc(path).hosts
    except netrc.NetrcParseError as error:
        rank_zero_info(f"{path} cannot be read ({error}): W&B is taken as logged out")
        return False
