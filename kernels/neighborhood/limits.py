"""What the Triton kernels of neighborhood attention serve; asked before Triton is imported."""
from __future__ import annotations

import torch


def refuses(x: torch.Tensor) -> str | None:
    """Why queries x (..., head_dim), alone or packed with keys and values, cannot be served, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, got {x.dtype}"
    if x.shape[-1] % 8 or x.shape[-1] > 128:
        return f"its kernels take a head_dim that is a multiple of 8 up to 128, got {x.shape[-1]}"
    return None
