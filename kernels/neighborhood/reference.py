"""The definition of 2-D neighborhood attention: dense attention under a mask, as the papers write it."""
from __future__ import annotations

import torch

from .window import Window, axis_range


def axis_relation(length: int, window: Window, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For every (query, key) pair of one axis: is the key inside the window, and its in-group offset key - query."""
    kernel, dilation = window.kernel[axis], window.dilation[axis]
    span = axis_range(length, kernel, dilation, window.stride[axis], window.causal[axis], window.disc)
    start, count = map(torch.from_numpy, span)
    i = torch.arange(length)
    query, key = i[:, None], i[None, :]
    step = key // dilation - start[:, None]
    inside = (key % dilation == query % dilation) & (step >= 0) & (step < count[:, None])
    return inside, key // dilation - query // dilation


def na2d(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, window: Window, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + rpb) v over the keys of each query's window.

    Returns:
        out: like `v`; lse: natural log of the sum of exponentials, (B, H, W, heads), float32 or wider.
    """
    H, W = q.shape[1:3]
    inside_h, dy = (t.to(q.device) for t in axis_relation(H, window, 0))
    inside_w, dx = (t.to(q.device) for t in axis_relation(W, window, 1))
    dy, dx = dy[:, None, :, None], dx[None, :, None, :]
    inside = inside_h[:, None, :, None] & inside_w[None, :, None, :]
    if window.disc:
        inside = inside & (dy**2 + dx**2 < window.radius**2)

    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bijhd,byxhd->bhijyx", q.to(wide) * scale, k.to(wide))
    if rpb is not None:
        kh, kw = window.kernel
        rows, cols = (dy + kh - 1).clamp(0, 2 * kh - 2), (dx + kw - 1).clamp(0, 2 * kw - 2)
        scores = scores + rpb.to(wide)[:, rows, cols]
    scores = scores.masked_fill(~inside, float("-inf")).flatten(-2)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().unflatten(-1, (H, W))
    out = torch.einsum("bhijyx,byxhd->bijhd", weights, v.to(wide))
    return out.to(v.dtype), lse.permute(0, 2, 3, 1)
