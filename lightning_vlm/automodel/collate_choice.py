"""Which collate function a run uses: the processor's own, one by name, or one of the user's by its import path.

A function that is named in a config is imported and called: whoever writes the config chooses the code, no row does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from lightning_vlm.automodel import collate_fns
from lightning_vlm.processing.registry import family_of

COLLATE_NAMES: dict[str, Callable[..., Any]] = {
    "default": collate_fns.default_collate_fn,
    "qwen2_5": collate_fns.qwen2_5_collate_fn,
    "qwen3_omni": collate_fns.qwen3_omni_collate_fn,
    "kimi_vl": collate_fns.kimi_vl_collate_fn,
    "kimi_k25_vl": collate_fns.kimi_k25_vl_collate_fn,
    "llava_onevision": collate_fns.llava_onevision_collate_fn,
    "nemotron_omni": collate_fns.nemotron_omni_collate_fn,
    "nemotron_parse": collate_fns.nemotron_parse_collate_fn,
    "phi4_mm": collate_fns.phi4_mm_collate_fn,
    "gemma4_prefix": collate_fns.gemma4_prefix_collate_fn,
    "pad": collate_fns.pad_collate_fn,
    "neat_packed": collate_fns.neat_packed_vlm_collater,
    "neat_packed_thd": collate_fns.packed_sequence_thd_vlm_collater,
}
"""Functions by short name; their own names are known too."""


def collate_for(processor: Any, selection: str = "auto", **options: Any) -> Callable[[list[Any]], dict[str, Any]]:
    """The collate function of a run, ready for a DataLoader.

    Args:
        processor: The run's processor; it is handed to functions that take one.
        selection: ``auto`` (by the class of the processor, see `processing.registry`), a key of `COLLATE_NAMES` or the
            function's own name, or the import path ``package.module.function`` of any function
            ``(examples, processor)`` or ``(examples)``.
        **options: Further arguments of the function, e.g. ``max_length``.

    Returns:
        ``examples -> batch``. It can be sent to workers if the processor can.

    Raises:
        ValueError: If there is no such function, or it takes no such option; the text says what was found.
    """
    function = _find(processor, selection)
    parameters = inspect.signature(function).parameters
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    if unknown := [name for name in options if name not in parameters and not takes_all]:
        raise ValueError(f"{_name(function)} takes no {unknown[0]!r}; it takes {', '.join(parameters)}")
    given = {"processor": processor, **options} if "processor" in parameters or takes_all else options
    return partial(function, **given)


def _find(processor: Any, selection: str) -> Callable[..., Any]:
    if selection == "auto":
        return COLLATE_NAMES[family_of(processor)]
    by_name = {**COLLATE_NAMES, **{_name(function): function for function in COLLATE_NAMES.values()}}
    if selection in by_name:
        return by_name[selection]
    module_name, _, name = selection.rpartition(".")
    if not module_name:
        raise ValueError(
            f"collate is {selection!r}; expected 'auto', one of {', '.join(COLLATE_NAMES)}, or package.module.function"
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"collate is {selection!r}, but {module_name!r} cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = (key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name)
        functions = [key for key in own if callable(getattr(module, key)) and not key.startswith("_")]
        what = "has nothing of that name" if found is None else f"holds {type(found).__name__} there"
        raise ValueError(
            f"collate is {selection!r}, but {module_name} {what}; found: {', '.join(functions[:20]) or 'none'}"
        )
    return found


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
