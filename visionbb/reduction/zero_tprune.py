"""Rank tokens as pages of a web whose links are attention, and drop doubles and the least important.

Paper: Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers,
https://arxiv.org/abs/2305.17328
The authors have published no code. What the paper's text was not at hand for, and is therefore of this package: scores
are scaled to a mean of 1 before their variance is judged, heads are all heard where none is within its bounds, and the
default blocks, iterations and numbers of doubles are from memory.
"""
from __future__ import annotations

import torch

from ..kernels import token_match
from .context import BlockContext
from .matching import keep_best
from .method import Method, keep_tokens
from .state import Assignment, gather_tokens

VARIANCE = (0.01, 0.7)  # of a head that is heard


class ZeroTPrune(Method, name="zero_tprune"):
    """Behind a block, tokens go first for being like a more important one, then for being unimportant.

    A block's attention A is a graph: tokens vote for those they attend to, with their own importance as their weight
    (weighted page rank). One step gives a first ranking (stage I'). Of the less important half, the tokens whose keys
    are most like one of the other half go (stage S). On the graph of those left the rank is iterated, and the least
    important go (stage I). Nothing is merged, nothing is learned.

    In front of blocks 1, 3, 6, 9 and 11 of 12, at those fractions of other depths, unless the schedule names blocks;
    the paper's DeiT-S is about r={0: 10, 2: 27, 5: 39, 8: 43, 10: 10}.

    The matrix A is made, once a reducing block: an iteration with it costs 1 / head_dim of one from queries and keys.

    Args:
        similar: of the tokens that a block removes, how many at most stage S takes; at most half of all go so.
        iterations: of the rank in stage I, in the first sixth of the blocks, up to two thirds of them, and behind.
    """

    where = "end"
    knob = "keep"

    def __init__(self, similar: int = 10, iterations: tuple[int, int, int] = (30, 5, 1)):
        super().__init__()
        if similar < 0:
            raise ValueError(f"similar must be at least 0, got {similar}")
        if len(iterations) != 3 or min(iterations) < 1:
            raise ValueError(f"iterations must be three numbers of at least 1, got {iterations}")
        self.similar = similar
        self.iterations = iterations

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(b * depth // 12, 1) - 1 for b in (1, 3, 6, 9, 11)}))

    def limit(self, n: int) -> int:
        return n - 1

    def match(self, ctx: BlockContext, remove: int) -> Assignment:
        attention, prefix, n = ctx.attention().detach().float(), ctx.state.prefix, ctx.n
        votes = attention.new_ones(attention.shape[:3])
        if ctx.has_class:
            votes[:, :, 0] = (prefix + n) ** 0.5
        alive = torch.ones_like(votes[:, 0, prefix:], dtype=torch.bool)
        doubles = min(self.similar, remove, n // 2)
        if doubles:
            order = importance(page_rank(attention, votes, 1)[:, :, prefix:]).argsort(dim=1, descending=True)
            vital, lesser = order[:, : n - n // 2], order[:, n - n // 2 :]
            keys = ctx.keys()
            alike, _ = token_match(gather_tokens(keys, lesser), gather_tokens(keys, vital))
            alive = alive.scatter(1, lesser.gather(1, alike.topk(doubles).indices), False)
        if doubles == remove:
            return keep_best(alive.float(), n - remove)
        among = torch.cat((alive.new_ones(alive.shape[0], prefix), alive), 1)[:, None].float()
        shallow, middle, deep = self.iterations
        place = ctx.index / ctx.depth
        steps = shallow if place < 1 / 6 else middle if place < 2 / 3 else deep
        score = importance(page_rank(attention * among[:, :, None], votes * among, steps)[:, :, prefix:], alive)
        return keep_best(score.masked_fill(~alive, -1), n - remove)

    def fuse(self, ctx: BlockContext, assignment: Assignment) -> tuple[torch.Tensor, torch.Tensor | None]:
        return keep_tokens(ctx, assignment)


def page_rank(attention: torch.Tensor, votes: torch.Tensor, steps: int) -> torch.Tensor:
    """The rank of each token (B, heads, N) after so many steps s <- A^T s from s = votes (B, heads, N).

    Args:
        attention: (B, heads, N, N), rows are divided by their sums: columns of tokens that are gone may be zero.
    """
    attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-12)
    votes = votes[:, :, None]
    for _ in range(steps):
        votes = votes @ attention
    return votes[:, :, 0]


def importance(rank: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
    """Ranks (B, heads, n) to one score a token (B, n): the root of the mean square over the heads that are heard.

    Ranks of each head are scaled to a mean of 1 over the tokens that are alive (B, n), None for all. Heads are heard
    whose variance then lies in `VARIANCE`: those below say nothing, those above see a few tokens only; all are where
    none would be.
    """
    alive = torch.ones_like(rank[:, 0]) if alive is None else alive.to(rank.dtype)
    count = alive.sum(1)[:, None, None]
    alive = alive[:, None]
    rank = rank * alive
    rank = rank / (rank.sum(-1, keepdim=True) / count).clamp(min=1e-12)
    variance = ((rank - 1).square() * alive).sum(-1, keepdim=True) / count
    low, high = VARIANCE
    heard = ((variance >= low) & (variance <= high)).to(rank.dtype)
    heard = torch.where(heard.sum(1, keepdim=True) == 0, 1, heard)
    return ((rank.square() * heard).sum(1) / heard.sum(1)).sqrt()
