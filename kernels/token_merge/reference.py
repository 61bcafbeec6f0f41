"""The definition of merging: the matrix of who belongs where, times the tokens; also what an export records."""
from __future__ import annotations

import torch


def token_merge(
    x: torch.Tensor, index: torch.Tensor, M: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """merged_m = sum_i w_i x_i / total_m and total_m = sum_i w_i, over the tokens i with index_i = m."""
    wide = torch.promote_types(x.dtype, torch.float32)
    members = (index[:, None] == torch.arange(M, device=x.device)[:, None]).to(wide)  # (B, M, N)
    if weight is not None:
        members = members * weight.to(wide)[:, None]
    total = members.sum(-1)
    merged = members @ x.to(wide) / torch.where(total == 0, 1, total)[..., None]
    return torch.where(total[..., None] == 0, 0, merged).to(x.dtype), total


def token_unmerge(y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """out_i = y at index_i."""
    return y.gather(1, index[..., None].expand(-1, -1, y.shape[-1]))
