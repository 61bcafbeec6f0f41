"""The definition of state-space duality: every pair of tokens has a weight, as the papers write it."""
from __future__ import annotations

import torch


def ssd(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """x (b, L, heads, P), dt (b, L, heads), A, D (heads,), B, C (b, L, G, N), see `kernels.ssd`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    weights = torch.einsum("bthn,bshn->btsh", C, B)
    if causal:
        time = (dt * A).cumsum(1)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[..., None]
        decay = (time[:, :, None] - time[:, None]).masked_fill(~seen, float("-inf")).exp()
        weights = weights * decay * dt[:, None]
    else:
        weights = weights * (-A * dt)[:, None]
    y = torch.einsum("btsh,bshp->bthp", weights, x)
    return y if D is None else y + D.to(wide)[:, None] * x
