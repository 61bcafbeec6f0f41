"""The definition of the selective scan: one step after another, as the papers write it."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .routes import NEUTRAL


def linear_scan(a: torch.Tensor, b: torch.Tensor, h0: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """h_t = a_t h_{t-1} + b_t along axis 1, from h0 or zeros."""
    wide = torch.promote_types(b.dtype, torch.float32)
    h = torch.zeros_like(b[:, 0], dtype=wide) if h0 is None else h0.to(wide)
    steps = list(zip(a.to(wide).unbind(1), b.to(wide).unbind(1), strict=True))
    states = []
    for a_t, b_t in reversed(steps) if reverse else steps:
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1).to(b.dtype)


def _scan(u, dt, A, B, C, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """u, dt (B, L, D), A (D, N), B, C (B, L, D, N), all of one wide dtype: (C . h, every h)."""
    decay = torch.exp(dt[..., None] * A)
    h = linear_scan(decay, dt[..., None] * B * u[..., None], None, reverse)
    return (C * h).sum(-1), h


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba's S6 (arXiv 2312.00752, algorithm 2): out (B, L, D) and the last state (B, D, N)."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, dt, A, B, C = (x.to(wide) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (x.repeat_interleave(u.shape[2] // x.shape[2], 2) for x in (B, C))
    y, h = _scan(u, dt, A, B, C, reverse)
    if D is not None:
        y = y + D * u
    return y, h[:, 0 if reverse else -1]


def ss2d(
    x: torch.Tensor,
    proj: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    routes: torch.Tensor,
    merge: str,
    permute: str,
) -> torch.Tensor:
    """Gather along each route, scan, put back, merge; see `kernels.ss2d`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    map_ = x.shape[1:-1]
    x, proj = x.to(wide).flatten(1, -2), proj.to(wide).flatten(1, -2)
    K, R, N = len(routes), dt_weight.shape[2], A.shape[2]
    proj = proj.unflatten(2, (-1, R + 2 * N)).expand(-1, -1, K, -1)
    weight, A = (p.to(wide).expand(K, -1, -1) for p in (dt_weight, A))
    outs = []
    for k, route in enumerate(routes.long()):
        token = (route >= 0)[:, None]

        def follow(y, route=route, token=token):
            return y[:, route.clamp(min=0)] * token

        low, B, C = (follow(proj[:, :, k]) if permute == "all" else proj[:, :, k]).split([R, N, N], 2)
        dt = low @ weight[k].T
        if dt_bias is not None:
            dt = dt + dt_bias.expand(K, -1)[k]
        dt = F.softplus(dt) * (route != NEUTRAL)[:, None]
        u = follow(x)
        y, _ = _scan(u, dt, A[k], B[:, :, None], C[:, :, None], reverse=False)
        if D is not None:
            y = y + D.expand(K, -1)[k] * u
        outs.append(torch.zeros_like(x).index_add(1, route.clamp(min=0), y * token))
    out = torch.stack(outs, 2)
    return (out if merge == "stack" else out.sum(2)).unflatten(1, map_)
