"""A Mamba2 layer that knows document boundaries: transformers' mixer with our convolution and scan.

The parameters, their names and their initialisation are transformers'. Only the forward pass without a cache is ours,
for packed rows and padded batches alike; with a cache (generation) transformers' own code runs. The output projection
stays a module of its own, so that an adapter on it is applied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from lightning_vlm.ops.mamba import conv_and_silu, mamba_choice, scan
from lightning_vlm.segments import Documents, documents_from_rows


class PackedMamba2Mixer(NemotronHMamba2Mixer):
    """transformers' mixer; instances of it become ours by their class, which adds no state."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mixes tokens along each document.

        Args:
            hidden_states: ``(B, T, D)``; ``B`` is 1 with ``documents``.
            cache_params: Cache of a generation in progress.
            attention_mask: ``(B, T)``, 0 at the padding of a padded batch.
            documents: Boundaries of a packed row; without them each row of the batch is a document.
            **kwargs: Passed to transformers with a cache, else ignored.

        Returns:
            ``(B, T, D)``.

        Raises:
            ValueError: If a cache is given for a packed row: it would carry state from one document to the next.
        """
        if cache_params is not None:
            if documents is not None:
                raise ValueError("a packed row cannot use a cache; pass use_cache=False with cu_seqlens")
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        rows, columns, _ = hidden_states.shape
        if documents is None:
            documents = documents_from_rows(rows, columns, hidden_states.device)
        kept = None if attention_mask is None else attention_mask.reshape(-1, 1)
        tokens = hidden_states.flatten(0, 1)
        if kept is not None:
            tokens = (tokens * kept).to(tokens.dtype)
        choice = mamba_choice(hidden_states.device)
        gate, conv_input, dt = self.in_proj(tokens).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        mixed = conv_and_silu(conv_input, self.conv1d.weight[:, 0], self.conv1d.bias, documents, choice)
        if kept is not None:
            mixed = (mixed * kept).to(mixed.dtype)
        states = self.n_groups * self.ssm_state_size
        x, B, C = mixed.split([self.intermediate_size, states, states], dim=-1)
        dt = torch.nn.functional.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
        y = scan(
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt,
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            C.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            self.D,
            documents,
            choice,
        )
        y = self.norm(y.flatten(1), gate).to(hidden_states.dtype)
        return self.out_proj(y).unflatten(0, (rows, columns))
