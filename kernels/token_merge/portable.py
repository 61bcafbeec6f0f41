"""Merging in plain PyTorch: sums of bags of embeddings, which are deterministic on every device.

On the CPU they are also faster, but for very few tokens: no weighted copy of these is made.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .segments import flat, segments


def token_merge(
    x: torch.Tensor, index: torch.Tensor, M: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    (B, _, C), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    order, starts = segments(index, M)

    def sums(tokens: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return F.embedding_bag(
            order, tokens.flatten(0, 1), starts, mode="sum", include_last_offset=True, per_sample_weights=weight
        )

    if weight is None:
        total = starts.diff().to(wide)
        merged = sums(x.to(wide), None)
    else:
        weight = weight.to(wide)
        total = sums(weight[..., None], None)[:, 0]
        merged = sums(x.to(wide), weight.flatten()[order])
    merged /= total.masked_fill(total == 0, 1)[:, None]
    return merged.to(x.dtype).view(B, M, C), total.view(B, M)


def token_merge_backward(
    dmerged: torch.Tensor,
    dtotal: torch.Tensor,
    x: torch.Tensor | None,
    index: torch.Tensor,
    weight: torch.Tensor | None,
    merged: torch.Tensor | None,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x, and of the weight if x and merged are given."""
    M, wide = dmerged.shape[1], total.dtype
    destination = flat(index, M)
    share = torch.where(total == 0, 0, 1 / total).flatten()[destination]
    dx = token_unmerge(dmerged.to(wide), index)
    dweight = None
    if x is not None:  # merged, a mean, moves towards the tokens that gain weight
        change = torch.linalg.vecdot(dx, x.to(wide)).flatten()
        change -= torch.linalg.vecdot(dmerged.to(wide), merged.to(wide)).flatten()[destination]
        dweight = (change * share + dtotal.flatten()[destination]).view(index.shape).to(weight.dtype)
    if weight is not None:
        share = share * weight.flatten()
    dx *= share.view(*index.shape, 1)
    return dx.to(dmerged.dtype), dweight


def token_unmerge(y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return y.flatten(0, 1).index_select(0, flat(index, y.shape[1])).view(*index.shape, y.shape[-1])
