"""Measures whether packed documents see each other, on real samples and the model as it is about to be trained.

Two questions, both asked of the hidden states in front of the head. Does a document come out of a packed row as it
comes out alone? Other shapes round differently, so up to a tolerance. And does anything in one document change when the
other's text changes? Shapes are equal, so on a CPU not a bit may, which finds a leak however small; GPU kernels may sum
over a chunk of several documents and subtract again, so there rounding is allowed for. Mamba layers with random weights
hand on little through their state, less than half precision rounds: while the second question is asked their memory is
long and is all they answer from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.packed_mamba import PackedMamba2Mixer
from lightning_vlm.ops.attention import ATTENTION, attention_choice
from lightning_vlm.ops.mamba import mamba_choice
from lightning_vlm.schema import Sample, join_media, token_types
from lightning_vlm.segments import cu_seqlens_from_lengths

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference relative to the largest value; the second question allows a tenth of it on GPUs, nothing on CPUs.
Rounding measured: 6e-7 in float32, 1e-3 in bfloat16. A leak measured 0.7 or more through the convolution, 0.3 through
attention, but 7e-5 to 6e-3 through the scan alone of a model with random weights. By the second question it measured
0.02 or more through the convolution, 0.27 through attention and 0.15 through the scan, in both precisions."""


class IsolationError(RuntimeError):
    """Packed documents see each other, or an implementation that should keep them apart cannot run."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What was measured.

    Attributes:
        difference: Largest difference between a document packed and alone, relative to the largest value.
        changed: Largest change of a document when another one's text changes, relative to the same.
        tolerance: What ``difference`` may be in this precision.
        change_tolerance: What ``changed`` may be on this device: 0 on a CPU.
        ssd: Which implementation ran the Mamba layers.
        attention: Which implementation ran the attention layers.
    """

    difference: float
    changed: float
    tolerance: float
    change_tolerance: float
    ssd: str
    attention: str

    @property
    def holds(self) -> bool:
        """Whether documents are isolated."""
        return self.difference <= self.tolerance and self.changed <= self.change_tolerance  # a NaN is neither

    def __str__(self) -> str:
        verdict = "OK" if self.holds else "LEAK"
        text = f"packing isolation: max|d| = {self.difference:.1e} {verdict} (ssd={self.ssd}, attn={self.attention})"
        return text if self.holds else f"{text}; another document's text changes this one by {self.changed:.1e}"


@torch.no_grad()
def measure_isolation(model: NemotronVL, samples: Sequence[Sample], device: torch.device) -> Isolation:
    """Packs samples and compares.

    Args:
        model: The model, on ``device``; its mode is put back.
        samples: At least two.
        device: Where the model is.

    Raises:
        IsolationError: If an implementation fails to run.
        ValueError: If there are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"isolation is between documents: expected at least 2 samples, got {len(samples)}")
    was_training, precision = model.training, _precision(model, device)
    model.eval()
    try:
        ssd = mamba_choice(device)
        alone = [_hidden(model, [sample], device) for sample in samples]
        packed = _hidden(model, samples, device)
        with _long_memory(model):
            before = _hidden(model, samples, device)
            after = _hidden(model, [_altered(model, samples[0]), *samples[1:]], device)
    except (RuntimeError, ImportError) as error:
        raise IsolationError(
            f"a packed row cannot run on {device}: {' '.join(str(error).split())}; lightning-vlm doctor tells which "
            "implementations are installed, and LIGHTNING_VLM_SSD=torch selects the one that runs anywhere"
        ) from error
    finally:
        model.train(was_training)
    lengths = [len(sample) for sample in samples]
    scale = max(max(float(states.abs().max()) for states in alone), torch.finfo(torch.float32).tiny)
    difference = max(float((a - b).abs().max()) for a, b in zip(alone, packed.split(lengths)))
    changed = float((after - before)[lengths[0] :].abs().max())
    chosen = model.config.text_config._attn_implementation
    return Isolation(
        difference / scale,
        changed / max(float(before.abs().max()), torch.finfo(torch.float32).tiny),
        TOLERANCE[precision],
        0.0 if device.type == "cpu" else TOLERANCE[precision] / 10,
        ssd.name,
        attention_choice(device, precision).name if chosen == ATTENTION else chosen,
    )


def _hidden(model: NemotronVL, samples: Sequence[Sample], device: torch.device) -> Tensor:
    """``(T, D)`` float32 states in front of the head: of a packed row, or of a single sample the ordinary way."""
    inputs = {"input_ids": torch.cat([sample.input_ids for sample in samples])[None], **join_media(samples)}
    if (types := token_types(samples)) is not None:
        inputs["mm_token_type_ids"] = torch.cat(types)[None]
    if len(samples) > 1:
        inputs["cu_seqlens"] = cu_seqlens_from_lengths([len(sample) for sample in samples])
    if (staged := getattr(model, "states_before_head", None)) is not None:  # cut into the stages of a pipeline
        return staged(**{name: value.to(device) for name, value in inputs.items()})[0].float()
    states: list[Tensor] = []
    norm = model.language_model.model.norm_f
    hook = norm.register_forward_hook(lambda module, args, output: states.append(output[0].float()))
    try:
        model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return states[0]


@contextmanager
def _long_memory(model: NemotronVL) -> Iterator[None]:
    """Mamba layers forget one percent per token and pass nothing by their state; then their own parameters again."""
    mixers = [module for module in model.modules() if isinstance(module, PackedMamba2Mixer)]
    values = {"A_log": math.log(0.01), "dt_bias": math.log(math.e - 1), "D": 0.0}  # softplus(dt_bias) = 1
    parameters = [(getattr(mixer, name), value) for mixer in mixers for name, value in values.items()]
    saved = [parameter.detach().clone() for parameter, _ in parameters]
    try:
        for parameter, value in parameters:
            parameter.fill_(value)
        yield
    finally:
        for (parameter, _), own in zip(parameters, saved):
            parameter.copy_(own)


def _altered(model: NemotronVL, sample: Sample) -> Sample:
    """The same sample with other text; its media and their places stay, and so do the tokens that open them."""
    ids, size = sample.input_ids, model.config.text_config.vocab_size
    placeholders = [model.config.image_token_id, model.config.audio_token_id]
    tokens = torch.tensor([token for token in placeholders if token is not None], dtype=ids.dtype)
    opens = torch.isin(ids[1:], tokens) & ~torch.isin(ids[:-1], tokens)
    kept = torch.cat([tokens, ids[:-1][opens]])
    changed = (ids + 1) % size
    while (taken := torch.isin(changed, kept)).any():
        changed = changed.where(~taken, (changed + 1) % size)
    return replace(sample, input_ids=ids.where(torch.isin(ids, kept), changed))


def _precision(model: NemotronVL, device: torch.device) -> torch.dtype:
    """What the layers compute in."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
