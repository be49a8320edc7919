"""The isolation measure: silent on a model that isolates, loud on every way to leak, without a trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from lightning_vlm import NemotronVL, NemotronVLProcessor
from lightning_vlm.models import packed_mamba
from lightning_vlm.ops.attention import ATTENTION, document_attention
from lightning_vlm.schema import Conversation, ImageRef, Sample, Text, Turn
from lightning_vlm.segments import documents_from_lengths
from lightning_vlm.training.isolation import TOLERANCE, Isolation, IsolationError, _altered, measure_isolation

CPU = torch.device("cpu")


@pytest.fixture
def samples(processor: NemotronVLProcessor, write_image: Callable[..., str], tmp_path: Any) -> list[Sample]:
    """An image and text, then text alone, then two images."""
    from PIL import Image

    made = []
    for row, (images, text) in enumerate([(1, "what is this? " * 5), (0, "hello"), (2, "and these?")]):
        opened = [Image.open(tmp_path / write_image(f"{row}-{k}.png", 24, 16, 3 * row + k)) for k in range(images)]
        asked = Turn("user", (*(ImageRef("i") for _ in range(images)), Text(text)))
        made.append(processor.encode(Conversation((asked, Turn("assistant", (Text("ok"),))), f"r:{row}"), opened))
    return made


@pytest.mark.parametrize("pattern", ["M*", "MME*-M"])
def test_a_sound_model_holds(make_model: Callable[..., NemotronVL], samples: list[Sample], pattern: str) -> None:
    model = make_model(pattern=pattern)
    for some in (samples, samples[:2], samples[1:]):
        found = measure_isolation(model, some, CPU)
        assert found.holds
        assert found.difference < 1e-5  # measured: 4.9e-7
        assert found.changed == 0.0
        assert (found.ssd, found.attention) == ("torch", "sdpa")
        assert str(found).startswith("packing isolation: max|d| = ")
        assert str(found).endswith(" OK (ssd=torch, attn=sdpa)")


def as_one(documents: Any) -> Any:
    """The same tokens without boundaries."""
    return documents_from_lengths([sum(documents.lengths)], documents.seq_idx.device)


def mixed(right: Tensor, wrong: Tensor, share: float) -> Tensor:
    return right + share * (wrong - right)


@pytest.fixture
def leak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, float], None]]:
    """Makes one of the three operations that mix tokens ignore boundaries, wholly or by a small share."""

    def make(where: str, share: float) -> None:
        if where == "attention":

            def attend(module: Any, *args: Any, documents: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
                right, _ = document_attention(module, *args, documents=documents, **kwargs)
                if documents is None:
                    return right, None
                return mixed(right, document_attention(module, *args, documents=as_one(documents), **kwargs)[0],
                             share), None  # fmt: skip

            AttentionInterface.register(ATTENTION, attend)
        else:
            sound = getattr(packed_mamba, where)

            def run(*args: Any) -> Tensor:
                *tensors, documents, choice = args
                return mixed(sound(*args), sound(*tensors, as_one(documents), choice), share)

            monkeypatch.setattr(packed_mamba, where, run)

    yield make
    AttentionInterface.register(ATTENTION, document_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["M*", "MME*-M"])
@pytest.mark.parametrize("where", ["conv_and_silu", "scan", "attention"])
def test_every_leak_is_found_also_where_rounding_is_allowed_for(
    make_model: Callable[..., NemotronVL],
    samples: list[Sample],
    leak: Callable[[str, float], None],
    where: str,
    pattern: str,
    dtype: torch.dtype,
) -> None:
    model = make_model(pattern=pattern)
    leak(where, 1.0)
    for some in (samples, samples[1:]):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = measure_isolation(model, some, CPU)
        # Least measured over three seeds: differences 0.74, 7e-5, 0.3; changes 0.022, 0.15, 0.27.
        assert found.difference > {"conv_and_silu": 0.5, "scan": 2e-5, "attention": 0.2}[where]
        assert found.changed > {"conv_and_silu": 0.015, "scan": 0.1, "attention": 0.2}[where]
        assert not found.holds
        assert not replace(found, difference=0.0, change_tolerance=TOLERANCE[dtype] / 10).holds, "on a GPU"
        assert " LEAK (ssd=torch, attn=sdpa); another document's text changes this one by " in str(found)


@pytest.mark.parametrize("where", ["conv_and_silu", "scan", "attention"])
def test_a_leak_below_the_tolerance_is_found_by_the_change_it_makes(
    make_model: Callable[..., NemotronVL], samples: list[Sample], leak: Callable[[str, float], None], where: str
) -> None:
    model = make_model(pattern="M*")
    leak(where, 1e-4)
    found = measure_isolation(model, samples, CPU)
    assert found.difference < found.tolerance
    assert found.changed > 0
    assert not found.holds


def test_a_leak_is_found_in_half_precision(
    make_model: Callable[..., NemotronVL], samples: list[Sample], leak: Callable[[str, float], None]
) -> None:
    model = make_model(pattern="M*")
    with torch.autocast("cpu", torch.bfloat16):
        found = measure_isolation(model, samples, CPU)
    assert found.holds
    assert found.tolerance == TOLERANCE[torch.bfloat16]
    half = measure_isolation(make_model(pattern="M*").to(torch.bfloat16), samples, CPU)
    assert half.holds
    assert half.tolerance == TOLERANCE[torch.bfloat16]
    leak("scan", 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not measure_isolation(model, samples, CPU).holds


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_as_they_were(
    make_model: Callable[..., NemotronVL],
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    training: bool,
    fails: bool,
) -> None:
    model = make_model(pattern="M*").train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, hooks = torch.get_rng_state(), len(model.language_model.model.norm_f._forward_hooks)
    if fails:
        monkeypatch.setenv("LIGHTNING_VLM_SSD", "fla")
        with pytest.raises(IsolationError):
            measure_isolation(model, samples, CPU)
    else:
        measure_isolation(model, samples, CPU)
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(model.language_model.model.norm_f._forward_hooks) == hooks


@pytest.mark.parametrize(
    ("selected", "words"),
    [
        ("mamba_ssm", "LIGHTNING_VLM_SSD=mamba_ssm cannot run: runs on NVIDIA GPUs only, this is cpu"),
        ("fla", "LIGHTNING_VLM_SSD=fla cannot run: runs on NVIDIA GPUs only, this is cpu"),
        ("triton", "LIGHTNING_VLM_SSD is 'triton'; expected one of mamba_ssm, fla, torch"),
    ],
)
def test_what_cannot_run_says_why_and_what_runs(
    make_model: Callable[..., NemotronVL],
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    selected: str,
    words: str,
) -> None:
    monkeypatch.setenv("LIGHTNING_VLM_SSD", selected)
    with pytest.raises(IsolationError) as caught:
        measure_isolation(make_model(pattern="M*"), samples, CPU)
    assert str(caught.value).startswith(f"a packed row cannot run on cpu: {words}")
    assert str(caught.value).endswith("LIGHTNING_VLM_SSD=torch selects the one that runs anywhere")


def test_one_document_is_no_question(make_model: Callable[..., NemotronVL], samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="expected at least 2 samples, got 1"):
        measure_isolation(make_model(pattern="M*"), samples[:1], CPU)


def test_a_nan_is_no_proof() -> None:
    sound = Isolation(0.0, 0.0, 1e-3, 0.0, "torch", "sdpa")
    assert sound.holds
    assert not replace(sound, difference=float("nan")).holds
    assert not replace(sound, changed=float("nan")).holds
    assert not replace(sound, changed=1e-30).holds
    assert not replace(sound, difference=1.1e-3).holds


def test_the_other_text_changes_every_token_but_images_and_what_opens_them(
    make_model: Callable[..., NemotronVL], samples: list[Sample]
) -> None:
    model = make_model(pattern="M*")
    image = model.config.image_token_id
    for sample in samples:
        other = _altered(model, sample)
        same = other.input_ids == sample.input_ids
        opens = int(sample.input_ids[list(sample.input_ids).index(image) - 1]) if image in sample.input_ids else image
        kept = torch.tensor([image, opens])
        assert torch.equal(same, torch.isin(sample.input_ids, kept))
        assert torch.equal(same, torch.isin(other.input_ids, kept))
        assert int(other.input_ids.max()) < model.config.text_config.vocab_size
