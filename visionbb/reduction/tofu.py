"""Token fusion: prune where features are not linear yet, merge on the sphere later.

Paper: Token Fusion: Bridging the Gap between Token Pruning and Token Merging (ToFu), https://arxiv.org/abs/2312.01026
The authors have published no code. The size of a pruned token goes to its match; the mean of MLERP is by size.
"""
from __future__ import annotations

import torch

from .context import BlockContext
from .method import keep_tokens, merge_mean, merge_sizes
from .state import Assignment
from .tome import ToMe


class ToFu(ToMe, name="tofu"):
    """ToMe's matching; the early blocks drop the source of a pair, the others merge it by MLERP.

    Args:
        prune_blocks: number of blocks that prune; None for half of all, as in the paper.
        proportional: as in `ToMe`.
    """

    def __init__(self, prune_blocks: int | None = None, proportional: bool = True):
        super().__init__(proportional)
        self.prune_blocks = prune_blocks

    def fuse(self, ctx: BlockContext, assignment: Assignment) -> tuple[torch.Tensor, torch.Tensor]:
        if ctx.index < (ctx.depth // 2 if self.prune_blocks is None else self.prune_blocks):
            return keep_tokens(ctx, assignment)[0], merge_sizes(ctx.state.size, assignment)
        mean, size = merge_mean(ctx, assignment)
        prefix = ctx.state.prefix
        return torch.cat((mean[:, :prefix], mlerp(mean[:, prefix:], ctx.x, assignment)), 1), size


def mlerp(mean: torch.Tensor, x: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    """Means (B, n', C) at the largest norm among the tokens x (B, n, C) that each is of (section 3.3)."""
    norms = torch.linalg.vector_norm(x, dim=-1)
    largest = norms.new_zeros(mean.shape[:2]).scatter_reduce(1, assignment.index, norms, "amax")
    return torch.nn.functional.normalize(mean, dim=-1) * largest[..., None]
