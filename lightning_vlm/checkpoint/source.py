"""What a model or processor name stands for: a local folder, or a repository that the user asked for by its full name.

A mistyped folder must not become a download: only ``organisation/name`` may reach the network, and only where no folder
of that first part exists here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lightning_vlm.processing.load import load_processor
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import DataError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether a name is a repository's, and cannot be a folder's here.

    Args:
        name: Any.
    """
    return _REPOSITORY.fullmatch(name) is not None and not Path(name.split("/")[0]).is_dir()


def pretrained_source(name: str | os.PathLike[str], option: str) -> str:
    """Checks a name before any library may look it up on a hub.

    Args:
        name: A folder, or ``organisation/name``.
        option: What the user set it by, for the error.

    Returns:
        The name.

    Raises:
        DataError: If it is neither an existing folder nor a repository's full name.
    """
    name = os.fspath(name)
    if name and (Path(name).is_dir() or is_repository(name)):
        return name
    raise DataError(
        option,
        f"{name!r} is not a folder (from {os.getcwd()!r}), expected a folder with a saved model and processor, or a "
        "repository's full name, organisation/name",
        f"correct {option}",
    )


def open_processor(processor: Any, options: dict[str, Any] | None = None) -> Any:
    """The processor that a data module is given, loaded where only its name is.

    Args:
        processor: A processor, the folder or repository of one, or ``None``.
        options: In place of what was saved with it.

    Raises:
        DataError: If there is none, or it cannot be loaded.
    """
    if processor is None:
        raise DataError(
            "data.processor",
            "VLMDataModule has no processor",
            "name one: processor='folder', or pass a NemotronVLProcessor",
        )
    if not isinstance(processor, (str, Path)):
        if options:
            raise DataError(
                "data.processor_options",
                f"options {', '.join(options)} were given beside a {type(processor).__name__} that is made already",
                "make it with them, or give the name of its folder",
            )
        return processor
    name = pretrained_source(str(processor), "data.processor (by default model.model_id)")
    try:
        processor = load_processor(name, options)
    except TypeError as error:
        raise DataError(
            "data.processor_options", f"{sorted(options or {})} do not fit: {error}", "correct data.processor_options"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            "data.processor",
            f"{name!r} holds no processor that can be loaded ({str(error).splitlines()[0]})",
            "save one there with NemotronVLProcessor.save_pretrained, or name another folder",
        ) from error
    if isinstance(processor, NemotronVLProcessor) and not processor.chat_template:
        raise DataError(
            "data.processor",
            f"{name!r} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
            "put the model's own there: with a guessed one it would be trained on turns that it is never served",
        )
    return processor
