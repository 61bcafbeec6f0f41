"""The definition of bidirectional WKV: every pair of tokens has a weight, as the paper writes it."""
from __future__ import annotations

import torch


def bi_wkv(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Equation 4 of Vision-RWKV on k, v (B, L, C), see `kernels.bi_wkv`."""
    wide = torch.promote_types(v.dtype, torch.float32)
    w, u, k, values = (x.to(wide) for x in (w, u, k, v))
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t[:, None] - t).abs()[..., None]
    bias = torch.where(distance == 0, u, (1 - distance) * w)  # (query, key, C)
    weights = torch.exp(bias + k[:, None])
    return (torch.einsum("bqkc,bkc->bqc", weights, values) / (weights.sum(2) + eps)).to(v.dtype)
