"""What the Triton kernels of linear attention serve; asked before Triton is imported."""
from __future__ import annotations

import torch

from ..rotary.limits import DTYPES, refuses_rotary
from .form import Form

WIDEST_FEATURES, WIDEST_VALUES = 256, 128


def refuses(q: torch.Tensor, v: torch.Tensor, form: Form) -> str | None:
    """Why these arguments cannot be served, or None."""
    if q.dtype not in DTYPES or v.dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, got q in {q.dtype} and v in {v.dtype}"
    d, dv = q.shape[-1], v.shape[-1]
    if d > WIDEST_FEATURES or dv > WIDEST_VALUES:
        return f"its kernels take d up to {WIDEST_FEATURES} and dv up to {WIDEST_VALUES}, got {d} and {dv}"
    return None if form.rotary is None else refuses_rotary(q)
