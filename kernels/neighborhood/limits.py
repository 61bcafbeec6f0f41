"""What the Triton kernels of neighborhood attention serve; asked before Triton is imported."""
from __future__ import annotations

import torch

from .window import Window


def refuses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, window: Window
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"its kernels take a head_dim that is a multiple of 8 up to 128, got {q.shape[-1]}"
    return None
