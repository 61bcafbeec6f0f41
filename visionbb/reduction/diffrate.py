"""Prune, then merge: the least attended tokens go, the next least go into tokens that stay.

Paper: DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, https://arxiv.org/abs/2305.17997
Written from the paper's formulas. Differences to the authors' code, which has no licence: sizes count patches, where
there a merged token counts by its similarity. `calibrate` finds rates for a budget.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels import token_match, token_merge
from .context import BlockContext
from .state import Assignment, behind_prefix, gather_tokens
from .tome import ToMe


class DiffRate(ToMe, name="diffrate"):
    """Between attention and MLP, tokens go by the class token's attention to them, averaged over heads.

    Of those that a block removes the least attended are dropped; the others go each into the token that is most similar
    of all that stay, by the cosine of what they are there, as a plain mean. All blocks but the first reduce, unless the
    schedule names others.

    Args:
        prune: how many of the tokens that a block removes are dropped: a share, or a list with a number a block.
        proportional: as in `ToMe`.
    """

    needs_class_token = True

    def __init__(self, prune: float | Sequence[int] = 0.5, proportional: bool = True):
        super().__init__(proportional)
        numbers = prune if isinstance(prune, Sequence) else [prune]
        if min(numbers) < 0 or (numbers is not prune and prune > 1):
            raise ValueError(f"prune must be a share in [0, 1] or a list of numbers of at least 0, got {prune}")
        self.prune = prune

    def build(self, depth: int, dim: int, num_heads: int) -> None:
        if isinstance(self.prune, Sequence) and len(self.prune) != depth:
            raise ValueError(f"prune as a list must have one entry for each of {depth} blocks, got {len(self.prune)}")

    def blocks(self, depth: int) -> range:
        return range(1, depth)

    def limit(self, n: int) -> int:
        return n - 1

    def reduce(self, ctx: BlockContext, remove: int) -> tuple[Assignment, torch.Tensor, torch.Tensor]:
        prune = self.prune
        pruned = min(prune[ctx.index], remove) if isinstance(prune, Sequence) else int(prune * remove)
        kept, x, size = ctx.n - remove, ctx.x, ctx.state.size
        order = ctx.cls_row().mean(1).detach().argsort(dim=1, descending=True)
        place, merged, dropped = order.split((kept, remove - pruned, pruned), 1)
        place = place.sort(1).values
        number = torch.arange(kept + pruned, device=x.device).expand(x.shape[0], -1)
        index = torch.zeros_like(order).scatter(1, torch.cat((place, dropped), 1), number)
        if remove > pruned:
            target = token_match(gather_tokens(x, merged), gather_tokens(x, place))[1]
            index = index.scatter(1, merged, target)
        ones = torch.ones(*index.shape, 1, device=x.device)
        total = token_merge(ones, index, kept + pruned, size)[1]  # each dropped token alone, behind those that stay
        prefix = ctx.state.prefix
        tokens, _ = token_merge(ctx.tokens, behind_prefix(index, prefix), prefix + kept + pruned)
        return Assignment(index, place, dropped if pruned else None), tokens[:, : prefix + kept], total[:, :kept]
