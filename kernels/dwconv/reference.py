"""The definition of the depthwise convolution: a sum over the taps of the kernel."""
from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def dwconv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, residual: bool
) -> torch.Tensor:
    """sum_ij weight[:, 0, i, j] * x[:, y + (i - kh // 2) * dilation, x + (j - kw // 2) * dilation], zero outside."""
    (H, W), (kh, kw) = x.shape[1:3], weight.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = kh // 2 * dilation, kw // 2 * dilation
    padded = F.pad(x.to(wide), (0, 0, columns, columns, rows, rows))
    out = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide).expand(x.shape)
    for i, j in itertools.product(range(kh), range(kw)):
        out = out + weight[:, 0, i, j].to(wide) * padded[:, i * dilation :, j * dilation :][:, :H, :W]
    return (out + x if residual else out).to(x.dtype)
