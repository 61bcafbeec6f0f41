"""What the Triton kernels of the scans serve; asked before Triton is imported."""
from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VALUES = 2**31  # of an image in any tensor: kernels count them in 32 bits


def refuses(x: torch.Tensor) -> str | None:
    """Why `linear_scan` cannot serve this input, or None."""
    if x.dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, got {x.dtype}"
    return None if x[:1].numel() < VALUES else _too_large(x[:1].numel())


def refuses_lines(x: torch.Tensor, lines: int, steps: int, N: int, R: int) -> str | None:
    """Why scans along `lines` lines of x (B, ..., D) cannot be served, or None; R is the rank of the time steps."""
    values = lines * steps * max(x.shape[-1], x.stride(-2), R + 2 * N)
    return refuses(x) or (None if values < VALUES else _too_large(values))


def _too_large(values: int) -> str:
    return f"its kernels take tensors of less than {VALUES} values an image, got {values}"
