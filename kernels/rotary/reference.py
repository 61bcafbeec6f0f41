"""The definition of the 2-D rotary embedding, in real numbers; also what an export records."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .table import Rotary, angles


def rotary2d(x: torch.Tensor, rotary: Rotary, inverse: bool = False) -> torch.Tensor:
    """Pairs (a, b) of neighbouring channels to (a cos t - b sin t, a sin t + b cos t), t negated by `inverse`."""
    H, W = x.shape[1:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, cols = (angles(n, rotary, x.device, wide) for n in (H, W))
    n = rotary.span // 4
    angle = F.pad(rows, (0, n))[:, None] + F.pad(cols, (n, 0))  # (H, W, span / 2)
    if inverse:
        angle = -angle
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]  # over the spans of a token
    a, b = x.to(wide).flatten(3).unflatten(-1, (-1, rotary.span // 2, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(x.shape).to(x.dtype)
