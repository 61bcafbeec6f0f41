"""The definition of token matching: all similarities, then the largest of every row; also what an export records."""
from __future__ import annotations

import torch
import torch.nn.functional as F


def token_match(
    src: torch.Tensor, dst: torch.Tensor, dst_weight: torch.Tensor | None, dst_mask: torch.Tensor | None, affinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """max_j and argmax_j of affinity(cos(src_i, dst_j)) * dst_weight_j over the destinations that the mask allows."""
    wide = torch.promote_types(src.dtype, torch.float32)
    scores = torch.bmm(F.normalize(src.to(wide), dim=-1), F.normalize(dst.to(wide), dim=-1).mT)
    if affinity == "shifted":
        scores = (1 + scores) / 2
    if dst_weight is not None:
        scores = scores * dst_weight.to(wide)[:, None]
    if dst_mask is not None:
        scores = scores.masked_fill(~dst_mask[:, None], float("-inf"))
    return tuple(scores.max(-1))
