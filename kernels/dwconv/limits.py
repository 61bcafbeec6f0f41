"""What the op takes, and what its Triton kernels serve; asked before Triton is imported."""
from __future__ import annotations

import torch

MAX_KERNEL = 11  # rows or columns; Triton kernels hold a column of the kernel in registers


def refuses(x: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot serve this input, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, got {x.dtype}"
    return None
