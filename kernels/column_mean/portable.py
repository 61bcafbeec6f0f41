"""Attention's column mean in plain PyTorch: weights of a few queries at a time, which the caches hold until read."""
from __future__ import annotations

import torch

CHUNK = 1 << 18  # attention weights at a time


def attention_column_mean(
    q: torch.Tensor, k: torch.Tensor, key_bias: torch.Tensor | None, weight: torch.Tensor | None, scale: float
) -> torch.Tensor:
    (B, heads, N, _), M = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).flatten(0, 1), k.to(wide).flatten(0, 1).mT
    weight = q.new_full((B, heads, N), 1 / N) if weight is None else weight.to(wide)
    bias = q.new_zeros(B, M) if key_bias is None else key_bias.to(wide)
    weight, bias = weight.flatten(0, 1)[:, None], bias.repeat_interleave(heads, 0)[:, None]
    out = q.new_zeros(B * heads, 1, M)
    rows = max(1, min(N, CHUNK // M))
    maps = max(1, CHUNK // (rows * M))
    for b in range(0, B * heads, maps):
        some = slice(b, b + maps)
        for n in range(0, N, rows):
            queries = slice(n, n + rows)
            scores = torch.baddbmm(bias[some], q[some, queries], k[some], alpha=scale)
            out[some].baddbmm_(weight[some, :, queries], torch.softmax(scores, -1, out=scores))
    return out.view(B, heads, M)
