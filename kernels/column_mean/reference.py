"""The definition of the column mean: all attention, then its mean over the queries; also what an export records."""
from __future__ import annotations

import torch


def attention_column_mean(
    q: torch.Tensor, k: torch.Tensor, key_bias: torch.Tensor | None, weight: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """sum_i weight_i softmax_j(scale * q_i . k_j + key_bias_j)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) * scale @ k.to(wide).mT
    if key_bias is not None:
        scores = scores + key_bias.to(wide)[:, None, None]
    attention = scores.softmax(-1)
    return attention.mean(-2) if weight is None else (weight.to(wide)[..., None] * attention).sum(-2)
