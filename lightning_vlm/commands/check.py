"""``lightning-vlm check``: reads all data before a model or an accelerator is touched, and says all that is wrong."""

from __future__ import annotations

import io
import json
import sys

from lightning_vlm.data.checking import SplitCheck, check_samples, summarize_checks
from lightning_vlm.datamodule import VLMDataModule


def check_data(datamodule: VLMDataModule, decode: bool = False, as_json: bool = False, examples: int = 3) -> bool:
    """Checks every split that has files, and prints a report.

    Args:
        datamodule: The data as configured.
        decode: Read media in full, not their headers alone.
        as_json: Print for machines: one JSON object, all errors in it.
        examples: Errors of each kind that are written out for people.

    Returns:
        Whether nothing is wrong.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    checks = []
    for name in datamodule.splits:
        if not datamodule.files[name]:
            continue
        dataset, unopened = datamodule.dataset_to_check(name)
        check = SplitCheck(name)
        if dataset is not None:
            show_progress = sys.stderr.isatty() or not as_json
            check = check_samples(
                name, dataset, decode, datamodule.num_workers, datamodule.cache_dir, show_progress=show_progress
            )
        checks.append(SplitCheck(name, check.sources, (*unopened, *check.errors)))
    holds = bool(checks) and not any(check.errors for check in checks)
    if as_json:
        splits = {check.name: check.as_data() for check in checks}
        print(json.dumps({"ok": holds, "splits": splits}, ensure_ascii=False, indent=2))
        return holds
    for check in checks:
        print(check.text(examples) + "\n")
    print(summarize_checks(checks) if checks else "there are no files to check; set data.train")
    return holds
