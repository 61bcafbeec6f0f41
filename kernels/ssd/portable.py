"""State-space duality in plain PyTorch: matrix products, in float32 at least, for a state is a sum over the whole map.

The non-causal form goes one image at a time, so that its tokens stay in cache.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scan import linear_scan


def _wide(x: torch.Tensor, *rest: torch.Tensor | None) -> list[torch.Tensor | None]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return [t if t is None else t.to(wide) for t in (x, *rest)]


def _groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(L, heads, P) to (groups, L, heads of a group * P)."""
    return x.reshape(len(x), groups, -1).transpose(0, 1)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_groups`."""
    return x.transpose(0, 1).reshape(x.shape[1], heads, -1)


def ssd(x, dt, A, B, C, D) -> torch.Tensor:
    """The non-causal op without autograd: x (b, L, heads, P), out like x in float32 at least."""
    _, A, D = _wide(x[:0], A, D)
    out = x.new_empty(x.shape, dtype=A.dtype)
    groups, heads = B.shape[2], x.shape[2]
    for i in range(len(x)):
        values, step, keys, queries = _wide(x[i], dt[i], B[i], C[i])
        state = keys.permute(1, 2, 0) @ _groups(values * (step * -A)[..., None], groups)  # (G, N, heads of a group * P)
        out[i] = _heads(queries.transpose(0, 1) @ state, heads)
        if D is not None:
            out[i].addcmul_(values, D[:, None])
    return out


def ssd_backward(dout, x, dt, A, B, C, D) -> list[torch.Tensor | None]:
    """The gradients of x, dt, A, B, C and D, as wide as the sums they are."""
    _, A, D = _wide(x[:0], A, D)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=A.dtype, device=x.device) for t in (x, dt, B, C))
    dA, dD = torch.zeros_like(A), None if D is None else torch.zeros_like(D)
    groups, heads = B.shape[2], x.shape[2]
    for i in range(len(x)):
        values, step, keys, queries, dy = _wide(x[i], dt[i], B[i], C[i], dout[i])
        weight = step * -A
        keys, queries, grad = keys.transpose(0, 1), queries.transpose(0, 1), _groups(dy, groups)
        weighted = _groups(values * weight[..., None], groups)
        dstate = queries.transpose(1, 2) @ grad
        dC[i] = (grad @ (keys.transpose(1, 2) @ weighted).transpose(1, 2)).transpose(0, 1)
        dB[i] = (weighted @ dstate.transpose(1, 2)).transpose(0, 1)
        dweighted = _heads(keys @ dstate, heads)
        dweight = (dweighted * values).sum(-1)
        ddt[i] = dweight * -A
        dA -= (dweight * step).sum(0)
        dx[i] = dweighted.mul_(weight[..., None])
        if D is not None:
            dx[i].addcmul_(dy, D[:, None])
            dD += (dy * values).sum((0, 2))
    return [dx, ddt, dA, dB, dC, dD]


def exportable(x, dt, A, B, C, D) -> torch.Tensor:
    """The non-causal form as one graph of standard operators; batch and map may be dynamic."""
    x, dt, A, B, C, D = _wide(x, dt, A, B, C, D)
    groups = B.shape[2]
    weighted = (x * (dt * -A)[..., None]).unflatten(2, (groups, -1)).flatten(3)  # (b, L, G, heads of a group * P)
    state = B.permute(0, 2, 3, 1) @ weighted.transpose(1, 2)
    y = (C.transpose(1, 2) @ state).transpose(1, 2).reshape(x.shape)
    return y if D is None else y + D[:, None] * x


def causal(x, dt, A, B, C, D, chunk: int) -> torch.Tensor:
    """The causal form: dense within chunks, a recurrence over their states (Mamba-2, section 6). Differentiable."""
    x, dt, A, B, C, D = _wide(x, dt, A, B, C, D)
    L, heads, groups = *x.shape[1:3], B.shape[2]

    def chunks(t: torch.Tensor) -> torch.Tensor:
        """(b, L, ...) to (b, chunks, chunk, ...); a tail with time steps of zero changes nothing."""
        return F.pad(t, (0, 0) * (t.ndim - 2) + (0, -L % chunk)).unflatten(1, (-1, chunk))

    values, B, C, time = chunks(x * dt[..., None]), chunks(B), chunks(C), chunks(dt * A).cumsum(2)
    time = time.transpose(2, 3)  # (b, chunks, heads, chunk)
    values = values.transpose(2, 3)
    B, C = (t.transpose(2, 3) for t in (B, C))  # (b, chunks, G, chunk, N)
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = (time[..., :, None] - time[..., None, :]).masked_fill(~seen, float("-inf")).exp()

    def per_head(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(heads // groups, 2)

    y = per_head(C @ B.transpose(3, 4)) * decay @ values
    end = time[..., -1:]
    states = per_head(B).transpose(3, 4) @ (values * (end - time).exp()[..., None])  # (b, chunks, heads, N, P)
    states = linear_scan(end.exp()[..., None].expand_as(states), states)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    y = y + per_head(C) * time.exp()[..., None] @ before
    y = y.transpose(2, 3).flatten(1, 2)[:, :L]
    return y if D is None else y + D[:, None] * x
