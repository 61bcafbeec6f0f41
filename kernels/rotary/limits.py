"""What the Triton kernel of the rotary embedding serves; asked before Triton is imported."""
from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 1024


def refuses(x: torch.Tensor) -> str | None:
    """Why this input cannot be served, or None."""
    if x.dtype not in DTYPES:
        return f"its kernel takes float32, float16 and bfloat16, got {x.dtype}"
    if x.shape[-1] > WIDEST:
        return f"its kernel takes a head_dim up to {WIDEST}, got {x.shape[-1]}"
    return refuses_rotary(x)


def refuses_rotary(x: torch.Tensor) -> str | None:
    """Why kernels cannot turn x, wherever they do, or None."""
    if x.shape[-1] % 2:
        return f"pairs of channels must lie in one head to be turned by kernels, got a head_dim of {x.shape[-1]}"
    return None
