"""Ask an interpreter in front of every group of blocks which tokens to go on with.

Paper: IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers, https://arxiv.org/abs/2106.12620
The authors have published neither code nor weights, and of the paper only the form of the interpreter is here: what it
computes and where. That it reads tokens without a norm, and that nothing goes before it is trained, is of this package.
Its training, by reinforcement group after group, is not here.
"""
from __future__ import annotations

import torch
from torch import nn

from .context import BlockContext
from .method import Method, keep_padded
from .state import Assignment


class IARED2(Method, name="ia_red2"):
    """In front of a group of blocks, tokens stay that its multi-head interpreter finds informative by one half or more.

    The information of a token x_j is I_j = mean_h sigmoid(<W_q^h x_j, W_k^h p>), with a policy token p and matrices
    W_q, W_k of each group: parameters of the model, `reducer.method.interpreters.*`. Policy tokens are zero at first,
    with which I_j = 1/2 and all tokens stay. The token of largest I always does. Decisions are hard, in training, too:
    they send no gradient to the interpreters.

    Args:
        groups: of equally many blocks; the authors have 3 in DeiT.
    """

    where = "start"
    adaptive = True

    def __init__(self, groups: int = 3):
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.groups = groups

    def build(self, depth: int, dim: int, num_heads: int) -> None:
        if self.groups > depth:
            raise ValueError(f"groups must be at most the {depth} blocks, got {self.groups}")
        self.interpreters = nn.ModuleList(Interpreter(dim, num_heads) for _ in range(self.groups))

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(depth * group // self.groups for group in range(self.groups))

    def reduce(self, ctx: BlockContext, remove: int) -> tuple[Assignment, torch.Tensor, torch.Tensor]:
        interpreter = self.interpreters[self.blocks(ctx.depth).index(ctx.index)]
        information = interpreter(ctx.x.detach())
        if ctx.state.size is not None:
            information = information.masked_fill(ctx.state.size == 0, -1)
        best = information == information.amax(1, keepdim=True)
        return keep_padded(ctx, (information >= 0.5) | best)


class Interpreter(nn.Module):
    """How informative tokens (B, n, C) are, in [0, 1]: (B, n)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.policy = nn.Parameter(torch.zeros(dim))
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (y.unflatten(-1, (self.num_heads, -1)) for y in (self.q(x), self.k(self.policy)))
        return (q * k).sum(-1).sigmoid().mean(-1)
