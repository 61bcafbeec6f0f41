"""What the Triton kernels of the column mean serve; asked before Triton is imported."""
from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuses(q: torch.Tensor) -> str | None:
    """Why these arguments cannot be served, or None."""
    if q.dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, got {q.dtype}"
    return None
