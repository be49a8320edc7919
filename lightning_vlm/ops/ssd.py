"""The Mamba2 recurrence (state-space duality) over packed documents: the state starts from zero in each of them.

    state_t = exp(A dt_t) state_{t-1} + dt_t B_t x_t        y_t = C_t state_t + D x_t

`naive_ssd` says exactly that, token by token. `chunked_ssd` is the block form of Dao and Gu, "Transformers are SSMs"
(arXiv 2405.21060), section 6, in plain PyTorch: attention-like inside a chunk, a recurrence between chunks, and both
cut at document boundaries, which may fall anywhere in a chunk. What another document holds is multiplied by an exact
zero, so no finite value in it can change a bit of this one. The backward pass is written by hand: it keeps one
state per chunk and recomputes the quadratic part, which autograd would keep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_vlm.segments import lengths_from_cu_seqlens

CHUNK_SIZE = 64
"""Tokens per chunk of the torch path. The result does not depend on it; on CPUs 64 was faster than 32 and 128."""

_BLOCK_ELEMENTS = 2**19
"""Decay-matrix elements (chunk x chunk x heads) that are alive at a time: bounds the memory of long rows. On a CPU
2 MiB stay in its cache (2**23 took a third longer and three times the memory); a GPU, where launches cost, takes 16
times as many."""


def naive_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The recurrence itself, the plain truth beside `chunked_ssd`.

    Args:
        x: ``(T, heads, head_dim)``, documents one after another.
        dt: ``(T, heads)`` step sizes, positive.
        A: ``(heads,)`` decay rates, negative.
        B: ``(T, groups, state_size)``; heads are divided among groups in order.
        C: ``(T, groups, state_size)``.
        D: ``(heads,)`` weight of the input in the output.
        cu_seqlens: ``(num_documents + 1,)`` boundaries.

    Returns:
        ``(T, heads, head_dim)``.
    """
    heads, groups = x.shape[1], B.shape[1]
    B, C = (matrix.repeat_interleave(heads // groups, dim=1) for matrix in (B, C))
    outputs = []
    start = 0
    for length in lengths_from_cu_seqlens(cu_seqlens).tolist():
        state = x.new_zeros(heads, x.shape[2], B.shape[2])
        for t in range(start, start + length):
            state = torch.exp(A * dt[t])[:, None, None] * state + (dt[t, :, None] * x[t])[..., None] * B[t, :, None]
            outputs.append((state * C[t, :, None]).sum(-1) + D[:, None] * x[t])
        start += length
    return torch.stack(outputs) if outputs else x


def chunked_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The recurrence in chunks, on any device, in float32 (float64 if x is).

    Args:
        x: As for `naive_ssd`.
        dt: As for `naive_ssd`.
        A: As for `naive_ssd`.
        B: As for `naive_ssd`.
        C: As for `naive_ssd`.
        D: As for `naive_ssd`.
        seq_idx: ``(T,)`` index of each token's document, see `lightning_vlm.segments`.
        chunk_size: Tokens per chunk; a matter of speed only.

    Returns:
        ``(T, heads, head_dim)`` float32 (float64 if x is).
    """
    with torch.autocast(x.device.type, enabled=False):
        return _ChunkedSSD.apply(x, dt, A, B, C, D, seq_idx, chunk_size)


def _precision(x: Tensor) -> torch.dtype:
    """What is computed in: sums over a document need float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


class _Chunks(NamedTuple):
    """A block of chunks. Letters: c chunks, l tokens of a chunk, g groups, r heads per group, p head_dim, n state."""

    x: Tensor  # (c, g, l, r, p)
    dt: Tensor  # (c, g, l, r)
    B: Tensor  # (c, g, l, n)
    C: Tensor  # (c, g, l, n)
    same: Tensor  # (c, l, l) query and earlier key belong to one document
    ends: Tensor  # (c, l) belongs to the document at the chunk's end, whose state is carried on
    enters: Tensor  # (c, l) belongs to the document whose state was carried in
    passes: Tensor  # (c,) one document covers the chunk, and the one before goes on in it
    log_decay: Tensor  # (c, g, r, l) sum of A dt from the document's (or chunk's) start to the token


class _Decays(NamedTuple):
    """Decay factors of a block, all in [0, 1], and 0 between documents."""

    inside: Tensor  # (c, g, r, l, l) from key to query
    to_end: Tensor  # (c, g, l, r) from token to the chunk's end
    from_start: Tensor  # (c, g, l, r) from the chunk's start to token
    across: Tensor  # (c, g, 1, r, 1) from the chunk's start to its end


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor, chunk_size: int
    ) -> Tensor:
        dtype = _precision(x)
        state = x.new_zeros(B.shape[1], B.shape[2], x.shape[1] // B.shape[1] * x.shape[2], dtype=dtype)
        y = x.new_empty(x.shape, dtype=dtype)
        states = []
        for start, stop in _blocks(x, chunk_size):
            block = _load(x, dt, A, B, C, seq_idx, start, stop, chunk_size)
            decays = _decays(block)
            entering, state = _carry(block, decays, state)
            within = _weights(block, decays) @ (block.x * block.dt[..., None]).transpose(2, 3)  # (c, g, r, l, p)
            carried = (block.C @ entering).view_as(block.x) * decays.from_start[..., None]
            y[start:stop] = _to_tokens(carried.add_(within.transpose(2, 3)), stop - start).flatten(1, 2)
            states.append(entering)
        y.addcmul_(D.to(dtype)[:, None], x.to(dtype))
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, *states)
        ctx.chunk_size = chunk_size
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):  # backward() may be called inside autocast
            return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, seq_idx, *states = ctx.saved_tensors
    dtype = _precision(x)
    dx, ddt, dB, dC = (t.new_empty(t.shape, dtype=dtype) for t in (x, dt, B, C))
    dA = torch.zeros_like(A, dtype=dtype)
    dstate = torch.zeros_like(states[0][0]) if states else x.new_zeros(0)  # no tokens, no block
    blocks = _blocks(x, ctx.chunk_size)
    for (start, stop), entering in zip(reversed(blocks), reversed(states)):
        block = _load(x, dt, A, B, C, seq_idx, start, stop, ctx.chunk_size)
        grads, dstate = _block_backward(block, _to_chunks(dy[start:stop], block.x), entering, dstate)
        size = stop - start
        da = _to_tokens(grads.da, size).flatten(1, 2)
        dx[start:stop] = _to_tokens(grads.dx, size).flatten(1, 2)
        ddt[start:stop] = torch.addcmul(_to_tokens(grads.ddt, size).flatten(1, 2), da, A.to(dtype))
        dB[start:stop], dC[start:stop] = _to_tokens(grads.dB, size), _to_tokens(grads.dC, size)
        dA += (da * dt[start:stop].to(dtype)).sum(0)
    dD = (dy * x).sum((0, 2))
    dx.addcmul_(D.to(dtype)[:, None], dy)
    dtypes = (x.dtype, dt.dtype, A.dtype, B.dtype, C.dtype, D.dtype)
    found = (dx, ddt, dA, dB, dC, dD)
    return *(grad.to(dtype) for grad, dtype in zip(found, dtypes)), None, None


class _BlockGrads(NamedTuple):
    dx: Tensor  # (c, g, l, r, p)
    ddt: Tensor  # (c, g, l, r) through dt x alone
    da: Tensor  # (c, g, l, r) of A dt
    dB: Tensor  # (c, g, l, n)
    dC: Tensor  # (c, g, l, n)


def _block_backward(block: _Chunks, dy: Tensor, entering: Tensor, dstate: Tensor) -> tuple[_BlockGrads, Tensor]:
    """Gradients of a block.

    Args:
        block: Its inputs.
        dy: ``(c, g, l, r, p)`` gradient of its outputs.
        entering: ``(c, g, n, r p)`` state at each chunk's start.
        dstate: ``(g, n, r p)`` gradient of the state after the block.

    Returns:
        The gradients, and the gradient of the state before the block.
    """
    decays = _decays(block)
    flat = (*block.x.shape[:3], -1)
    xdt = block.x * block.dt[..., None]

    # From the state that entered.
    dy_carried = dy * decays.from_start[..., None]
    dentering = block.C.transpose(-1, -2) @ dy_carried.reshape(flat)
    dC = dy_carried.reshape(flat) @ entering.transpose(-1, -2)
    dlog = ((block.C @ entering).view_as(dy) * dy_carried).sum(-1)  # (c, g, l, r)

    # The recurrence between chunks, backwards: dleaving[i] is the gradient of the state after chunk i.
    across = decays.across.expand(*decays.across.shape[:4], block.x.shape[4]).flatten(3)  # (c, g, 1, r p)
    leaving = []
    for index in reversed(range(len(entering))):
        leaving.append(dstate)
        dstate = torch.addcmul(dentering[index], dstate, across[index])
    dleaving = torch.stack(leaving[::-1])
    dlog_end = (dleaving * entering).sum(2).view(*decays.across.shape[:2], -1, block.x.shape[4]).sum(-1)
    dlog_end = dlog_end * decays.across[:, :, 0, :, 0]  # (c, g, r)

    # Into the state that is carried on.
    x_end = xdt * decays.to_end[..., None]
    dx_end = (block.B @ dleaving).view_as(xdt)
    dB = x_end.reshape(flat) @ dleaving.transpose(-1, -2)
    dto_end = (dx_end * x_end).sum(-1)
    dlog -= dto_end
    dlog_end = dlog_end + dto_end.sum(2)
    dxdt = dx_end.mul_(decays.to_end[..., None])

    # Inside the chunks.
    dy_heads, weights = dy.transpose(2, 3), _weights(block, decays)
    dxdt += (weights.transpose(-1, -2) @ dy_heads).transpose(2, 3)
    dweights = dy_heads @ xdt.transpose(2, 3).transpose(-1, -2)  # (c, g, r, l, l)
    dinside = weights.mul_(dweights)
    dinside.diagonal(dim1=-2, dim2=-1).zero_()  # cancels in the next line, but for its rounding
    dlog += (dinside.sum(-1) - dinside.sum(-2)).transpose(2, 3)
    dscores = dweights.mul_(decays.inside).sum(2)
    dC += dscores @ block.B
    dB += dscores.transpose(-1, -2) @ block.C

    dlog[:, :, -1] += dlog_end
    # log_decay = same @ (A dt): the transpose brings the gradient back to each token of the same document.
    da = (block.same.transpose(-1, -2).to(dlog.dtype)[:, None] @ dlog).contiguous()
    return _BlockGrads(dxdt * block.dt[..., None], (dxdt * block.x).sum(-1), da, dB, dC), dstate


def _blocks(x: Tensor, chunk_size: int) -> list[tuple[int, int]]:
    """(start, stop) tokens of blocks of whole chunks, none larger than `_BLOCK_ELEMENTS` allows."""
    tokens, heads, _ = x.shape
    elements = _BLOCK_ELEMENTS * (1 if x.device.type == "cpu" else 16)
    size = max(elements // (chunk_size * chunk_size * heads), 1) * chunk_size
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _load(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor, start: int, stop: int, chunk_size: int
) -> _Chunks:
    """Cuts tokens ``start:stop`` into chunks, in `_precision`; the last one is padded by a document of its own."""
    dtype, groups = _precision(x), B.shape[1]
    padding = -(stop - start) % chunk_size
    chunks = (stop - start + padding) // chunk_size

    def cut(values: Tensor, *shape: int) -> Tensor:  # (T, g r ...) -> (c, g, l, r, ...)
        values = values[start:stop].to(dtype)
        if padding:
            values = torch.cat([values, values.new_zeros(padding, *values.shape[1:])])
        return values.view(chunks, chunk_size, groups, *shape).transpose(1, 2).contiguous()

    index = torch.nn.functional.pad(seq_idx[start:stop], (0, padding), value=-1).view(chunks, chunk_size)
    before = seq_idx.new_full((1,), -2) if start == 0 else seq_idx[start - 1 : start]
    last = index[:, -1]
    carried = torch.cat([before, last[:-1]])  # the document whose state enters each chunk
    same = (index[:, :, None] == index[:, None, :]).tril()
    steps = cut(dt, -1)
    # A matrix product with zeros and ones instead of a running sum: a sum over other documents, subtracted again,
    # would leave their rounding behind.
    log_decay = same.to(dtype)[:, None] @ (steps * A.to(dtype).view(groups, 1, -1))
    return _Chunks(
        x=cut(x, x.shape[1] // groups, x.shape[2]),
        dt=steps,
        B=cut(B, B.shape[2]),
        C=cut(C, C.shape[2]),
        same=same,
        ends=index == last[:, None],
        enters=index == carried[:, None],
        passes=carried == last,
        log_decay=log_decay.transpose(2, 3).contiguous(),
    )


def _decays(block: _Chunks) -> _Decays:
    log = block.log_decay
    # Masked before the exponential: between documents the difference may be large and positive.
    inside = (log[..., :, None] - log[..., None, :]).masked_fill_(~block.same[:, None, None], -torch.inf).exp_()
    to_end = (log[..., -1:] - log).masked_fill_(~block.ends[:, None, None], -torch.inf).exp_()
    from_start = log.masked_fill(~block.enters[:, None, None], -torch.inf).exp_()
    across = log[..., -1].masked_fill(~block.passes[:, None, None], -torch.inf).exp_()
    return _Decays(inside, to_end.transpose(2, 3), from_start.transpose(2, 3), across[:, :, None, :, None])


def _weights(block: _Chunks, decays: _Decays) -> Tensor:
    """``(c, g, r, l, l)`` what each token of a chunk takes of each earlier one: C B^T, decayed."""
    return (block.C @ block.B.transpose(-1, -2))[:, :, None] * decays.inside


def _carry(block: _Chunks, decays: _Decays, state: Tensor) -> tuple[Tensor, Tensor]:
    """``(c, g, n, r p)`` states at the chunks' starts, and the state ``(g, n, r p)`` after the last one."""
    scaled = block.x * (block.dt * decays.to_end)[..., None]
    added = block.B.transpose(-1, -2) @ scaled.flatten(3)
    across = decays.across.expand(*decays.across.shape[:4], block.x.shape[4]).flatten(3)
    entering = []
    for index in range(len(added)):
        entering.append(state)
        state = torch.addcmul(added[index], state, across[index])
    return torch.stack(entering), state


def _to_chunks(values: Tensor, like: Tensor) -> Tensor:
    """``(T, heads, head_dim)`` -> ``(c, g, l, r, p)`` like the block's x, padded with zeros."""
    chunks, groups, size, per_group, width = like.shape
    if padding := chunks * size - len(values):
        values = torch.cat([values, values.new_zeros(padding, *values.shape[1:])])
    return values.to(like.dtype).reshape(chunks, size, groups, per_group, width).transpose(1, 2).contiguous()


def _to_tokens(values: Tensor, tokens: int) -> Tensor:
    """``(c, g, l, ...)`` -> ``(tokens, g, ...)``, padding cut off."""
    chunks, groups, size, *rest = values.shape
    return values.transpose(1, 2).reshape(chunks * size, groups, *rest)[:tokens]
