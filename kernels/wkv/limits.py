"""What the Triton kernels of bidirectional WKV serve; asked before Triton is imported."""
from __future__ import annotations

import torch


def refuses(v: torch.Tensor, eps: float) -> str | None:
    """Why these arguments cannot be served, or None."""
    if v.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, got {v.dtype}"
    if eps < 0:
        return f"its kernels take an eps that is not negative, got {eps}"
    return None
