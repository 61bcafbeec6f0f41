"""What the Triton kernel of token matching serves; asked before Triton is imported."""
from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuses(src: torch.Tensor) -> str | None:
    """Why these arguments cannot be served, or None."""
    if src.dtype not in DTYPES:
        return f"its kernel takes float32, float16 and bfloat16, got {src.dtype}"
    return None
