"""The function of a run: by processor, by name, by import path; and what is said where there is none."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lightning_vlm.automodel import collate_fns
from lightning_vlm.automodel.collate_choice import COLLATE_NAMES, collate_for
from lightning_vlm.processing import registry
from lightning_vlm.processing.registry import ENCODERS, FAMILIES, family_of
from lightning_vlm.processing.tiny import tiny_processor

Dict = dict[str, Any]


def chosen(processor: Any, selection: str = "auto") -> Any:
    return collate_for(processor, selection).func  # type: ignore[attr-defined]


STAND_INS = {"kimi_vl", "kimi_k25", "nemotron_parse", "phi4_remote", "nemotron_omni_remote"}


def said(name: Any) -> str:
    """The name of a processor in a test's name, and whether it is a stand-in."""
    return f"{name} stand-in" if name in STAND_INS else str(name)


def test_every_family_has_a_function_and_an_encoder() -> None:
    assert set(FAMILIES.values()) <= set(ENCODERS) <= set(COLLATE_NAMES)


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("qwen2_5", "qwen2_5_collate_fn"),
        ("qwen3_vl", "default_collate_fn"),
        ("qwen3_omni", "qwen3_omni_collate_fn"),
        ("llava_onevision", "default_collate_fn"),
        ("gemma3", "default_collate_fn"),
        ("gemma4", "default_collate_fn"),
        ("phi4", "phi4_mm_collate_fn"),
        ("nemotron_omni", "nemotron_omni_collate_fn"),
        ("kimi_vl", "kimi_vl_collate_fn"),
        ("kimi_k25", "kimi_k25_vl_collate_fn"),
        ("nemotron_parse", "nemotron_parse_collate_fn"),
        ("phi4_remote", "phi4_mm_collate_fn"),
        ("nemotron_omni_remote", "nemotron_omni_collate_fn"),
    ],
    ids=said,
)
def test_a_processor_has_its_function(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    assert chosen(request.getfixturevalue(fixture)) is getattr(collate_fns, name)


def test_nemos_map_is_followed() -> None:
    for name, function in collate_fns.COLLATE_FNS.items():
        if name != "default":
            assert chosen(type(name, (), {})()) is function


def test_our_own_processor_has_one() -> None:
    assert chosen(tiny_processor()) is collate_fns.nemotron_omni_collate_fn


def test_an_unknown_processor_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class NewProcessor:
        pass

    registry._unknown.clear()
    with caplog.at_level(logging.WARNING):
        assert [family_of(NewProcessor()) for _ in range(3)] == ["default"] * 3
    assert caplog.text.count("nothing is known of NewProcessor") == 1


def test_a_function_has_a_short_name_its_own_and_a_path(qwen2_5: Any) -> None:
    for selection in ("kimi_vl", "kimi_vl_collate_fn", "lightning_vlm.automodel.collate_fns.kimi_vl_collate_fn"):
        assert chosen(qwen2_5, selection) is collate_fns.kimi_vl_collate_fn


def test_the_function_is_ready_for_a_loader(qwen2_5: Any, example: Callable[..., Dict]) -> None:
    batch = collate_for(qwen2_5, "default", max_length=60)([example(), example()])
    assert batch["input_ids"].shape == (2, 59)
    assert collate_for(qwen2_5, "neat_packed", padding_idx=3)([]) == {}
    processor = tiny_processor()
    assert pickle.loads(pickle.dumps(collate_for(processor)))([example()])["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ("qwen", "collate is 'qwen'; expected 'auto', one of default, qwen2_5"),
        ("nowhere.at.all", "'nowhere.at' cannot be imported"),
        ("lightning_vlm.automodel.collate_fns.none", "has nothing of that name; found: .*default_collate_fn"),
        ("lightning_vlm.automodel.collate_fns.COLLATE_FNS", "holds dict there"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(selection: str, reason: str, qwen2_5: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        collate_for(qwen2_5, selection)


def test_an_option_that_a_function_does_not_take_is_an_error(qwen2_5: Any) -> None:
    with pytest.raises(ValueError, match="qwen2_5_collate_fn takes no 'max_length'; it takes examples, processor"):
        collate_for(qwen2_5, "auto", max_length=5)
