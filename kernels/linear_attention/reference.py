"""The definition of linear attention: every pair of tokens has a weight, as the papers write it."""
from __future__ import annotations

import torch

from ..rotary.reference import rotary2d
from .form import Form, features


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    form: Form,
) -> torch.Tensor:
    """(A v + local) * gate with the weights A (N x N) of a head, see `kernels.linear_attention`."""
    B, H, W, heads, _ = q.shape
    N = H * W
    wide = torch.promote_types(q.dtype, torch.float32)
    w = torch.full((B, N, heads), 1 / N, dtype=wide, device=q.device)
    if key_weight is not None:
        w = key_weight.flatten(1, 2).to(wide)

    def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnhd,bmhd,bmh->bhnm", a.flatten(1, 2), b.flatten(1, 2), w)

    q, k = features(q.to(wide), form.feature_map) * form.scale, features(k.to(wide), form.feature_map)
    weights = products(q, k)
    total = weights.sum(-1, keepdim=True)
    if form.rotary is not None:
        weights = products(rotary2d(q, form.rotary), rotary2d(k, form.rotary))
    if form.normalizer == "div":
        weights = weights / (total + form.eps)
    elif form.normalizer == "clamp":
        weights = weights / total.clamp(min=form.eps / N)
    elif form.normalizer == "additive":
        weights = weights * (1 + 1 / (total + form.eps)) - total / N
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v.flatten(1, 2).to(wide)).unflatten(1, (H, W))
    if local is not None:
        out = out + local
    if gate is not None:
        out = out * gate
    return out.to(v.dtype)
