"""Token matching in plain PyTorch: similarities of a few rows at a time, which the caches hold until they are read."""
from __future__ import annotations

import torch

from .form import factors

CHUNK = 1 << 18  # similarities at a time


def token_match(
    src: torch.Tensor, dst: torch.Tensor, dst_weight: torch.Tensor | None, dst_mask: torch.Tensor | None, affinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    (B, N, _), M = src.shape, dst.shape[1]
    factor, slope, offset = factors(src, dst, dst_weight, dst_mask, affinity)
    src, dst = src * factor[..., None], dst * slope[..., None]
    score, index = torch.empty_like(factor), factor.new_empty(B, N, dtype=torch.long)
    rows = max(1, min(N, CHUNK // M))
    images = max(1, CHUNK // (rows * M))
    for b in range(0, B, images):
        image = slice(b, b + images)
        for n in range(0, N, rows):
            part = image, slice(n, n + rows)
            scores = torch.bmm(src[part], dst[image].mT)
            if offset is not None:
                scores += offset[image, None]
            torch.max(scores, -1, out=(score[part], index[part]))
    return score, index
