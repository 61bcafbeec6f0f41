"""What the Triton kernels of the non-causal form serve; asked before Triton is imported."""
from __future__ import annotations

import torch

WIDEST_STATE, WIDEST_HEAD = 256, 128


def refuses(x: torch.Tensor, B: torch.Tensor) -> str | None:
    """Why these arguments cannot be served, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, got {x.dtype}"
    N, P = B.shape[-1], x.shape[-1]
    if N > WIDEST_STATE or P > WIDEST_HEAD:
        return f"its kernels take N up to {WIDEST_STATE} and P up to {WIDEST_HEAD}, got {N} and {P}"
    return None
