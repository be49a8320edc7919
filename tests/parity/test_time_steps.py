"""Mamba's time steps: where transformers departs from the released code, and what we compute.

The released configs have ``time_step_limit: [0, inf]`` beside ``time_step_min: 0.001``. NVIDIA's published model and
vLLM limit time steps by the former; the latter is where random initial values begin. transformers 5.23 takes it as the
lower limit (its pull request #48989 would change that), which takes from heads that remember longest what they do.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import softplus
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from lightning_vlm import NemotronVLConfig
from lightning_vlm.models.language import make_language_model
from lightning_vlm.ops.mamba import conv_and_silu, mamba_choice
from lightning_vlm.segments import documents_from_rows


def slow_mixer():
    """A layer of which half of the heads take steps of about 0.0003, its config, and states."""
    config = NemotronVLConfig.tiny(pattern="M", hidden_size=32).text_config
    torch.manual_seed(0)
    mixer = make_language_model(config).double().model.layers[0].mixer
    with torch.no_grad():
        mixer.dt_bias[::2] = math.log(math.expm1(3e-4))
        mixer.A_log.zero_()
        mixer.D.zero_()  # it hands on what is there without any time step
    return config, mixer, torch.randn(1, 40, 32, dtype=torch.float64)


def token_by_token(mixer, states):
    """The recurrence as it is written: ``h = exp(dt A) h + dt B x``, ``y = C h + D x``, with no limit to ``dt``."""
    gate, conv_input, dt = mixer.in_proj(states[0]).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    documents = documents_from_rows(1, states.shape[1], states.device)
    mixed = conv_and_silu(
        conv_input, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, documents, mamba_choice(states.device)
    )
    size = mixer.n_groups * mixer.ssm_state_size
    x, B, C = mixed.split([mixer.intermediate_size, size, size], dim=-1)
    x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    heads = mixer.num_heads // mixer.n_groups
    B, C = (part.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(heads, dim=1) for part in (B, C))
    dt = softplus(dt + mixer.dt_bias)
    h = torch.zeros(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, dtype=states.dtype)
    rows = []
    for t in range(states.shape[1]):
        decay = torch.exp(-dt[t] * mixer.A_log.exp())
        h = decay[:, None, None] * h + (dt[t][:, None] * x[t])[:, :, None] * B[t][:, None, :]
        rows.append((h * C[t][:, None, :]).sum(-1) + mixer.D[:, None] * x[t])
    return mixer.out_proj(mixer.norm(torch.stack(rows).flatten(1), gate).to(states.dtype))[None]


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@torch.no_grad()
def test_small_time_steps_stay_small():
    config, mixer, states = slow_mixer()
    expected = token_by_token(mixer, states)
    assert difference(mixer(states), expected) < 1e-6  # the scan keeps dt in float32

    theirs = NemotronHMamba2Mixer(config, 0).double()
    theirs.load_state_dict(mixer.state_dict())
    assert difference(theirs(states), expected) > 1e-3, "transformers' limit matters here"
    theirs.time_step_limit = tuple(config.time_step_limit)
    assert difference(theirs(states), expected) < 1e-6


@torch.no_grad()
def test_a_config_may_set_limits():
    config, _, states = slow_mixer()
    config.time_step_limit = [0.05, 0.06]
    mixer = make_language_model(config).double().model.layers[0].mixer
    mixer.D.zero_()
    theirs = NemotronHMamba2Mixer(config, 0).double()
    theirs.load_state_dict(mixer.state_dict())
    theirs.time_step_limit = (0.05, 0.06)
    assert difference(mixer(states), theirs(states)) < 1e-6
    theirs.time_step_limit = (0.0, math.inf)
    assert difference(mixer(states), theirs(states)) > 1e-3
