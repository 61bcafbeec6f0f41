"""Predictors learn which tokens to go on with.

Paper: DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, https://arxiv.org/abs/2106.02034
Authors' code: https://github.com/raoyongming/DynamicViT (MIT)
Written from the paper's formulas. Differences to the authors' code: numbers of tokens are rounded up, stage by stage,
where there floor(N rho^s) stay; in training the token most likely to stay always does.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .context import BlockContext
from .masking import Masking
from .matching import keep_best
from .method import keep_tokens, quarters
from .schedule import counts, removed
from .state import Assignment, TokenState


class DynamicViT(Masking, name="dynamic_vit"):
    """In front of a block, tokens stay that a small network of that block, its predictor, finds most likely to.

    With keep=rho, shares rho, rho^2 and rho^3 of the patches go on from blocks 3, 6 and 9 of 12, or those at the same
    fractions of other depths. Predictors are parameters of the model, `reducer.method.score_predictor.*`: the authors'
    checkpoints of DeiT load once "reducer.method." is put in front of their "score_predictor". Before they are trained
    predictors know nothing.

    In evaluation the tokens of largest probability stay, as many as the schedule says. In training each token stays
    with its probability, drawn by Gumbel-softmax, if it has stayed so far; what goes is masked, see `Masking`, and
    `ratio_loss` holds the numbers to the schedule's.

    Args:
        pruning_loc: the blocks, ascending, that have a predictor; None for those above. No others can reduce.
    """

    where = "start"
    knob = "keep"
    elsewhere = False

    def __init__(self, pruning_loc: Sequence[int] | None = None):
        super().__init__()
        self.pruning_loc = None if pruning_loc is None else tuple(pruning_loc)

    def build(self, depth: int, dim: int, num_heads: int) -> None:
        blocks = self.blocks(depth)
        if list(blocks) != sorted(set(blocks) & set(range(depth))) or not blocks:
            raise ValueError(f"pruning_loc must be ascending blocks from 0 to {depth - 1}, got {list(blocks)}")
        if dim % 4:
            raise ValueError(f"dynamic_vit halves the width of a model twice, which must be a multiple of 4, got {dim}")
        self.score_predictor = nn.ModuleList(Predictor(dim) for _ in blocks)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return quarters(depth) if self.pruning_loc is None else self.pruning_loc

    def limit(self, n: int) -> int:
        return n - 1

    def step_macs(self, n: int, left: int, prefix: int, attention: int, pair: int) -> int:
        return n * self.score_predictor[0].macs

    def reduce(
        self, ctx: BlockContext, remove: int
    ) -> tuple[Assignment, torch.Tensor, torch.Tensor | None] | None:
        predictor, record = self.score_predictor[self.blocks(ctx.depth).index(ctx.index)], ctx.state.record
        if not self.training:
            assignment = keep_best(predictor(ctx.x)[..., 0], ctx.n - remove)
            return assignment, *keep_tokens(ctx, assignment)
        alive = record[-1] if record else ctx.x.new_ones(ctx.x.shape[:2])
        score = predictor(ctx.x, alive).float()
        soft = F.gumbel_softmax(score)[..., 0].to(alive.dtype)
        likely = score[..., 0].masked_fill(alive < 0.5, float("-inf"))
        stays = (alive > 0.5) & ((soft > 0.5) | (likely == likely.amax(1, keepdim=True)))
        self.mask(ctx, stays, soft * alive)
        return None


class Predictor(nn.Module):
    """How likely tokens are to stay, by what they are and by the mean of what there is.

    Args:
        dim: channels, a multiple of 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def macs(self) -> int:
        """Multiply-adds of a token."""
        return sum(p.numel() for p in self.parameters() if p.ndim == 2)

    def forward(self, x: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities (B, n, 2) of tokens x (B, n, C): to stay, and to go.

        Args:
            alive: (B, n), 1 of those that count in the mean, at least one an image, and 0; None for all.
        """
        own, shared = self.in_conv(x).chunk(2, -1)
        if alive is None:
            mean = shared.mean(1, keepdim=True)
        else:
            mean = (shared * alive[..., None]).sum(1, keepdim=True) / alive.sum(1)[:, None, None]
        return self.out_conv(torch.cat((own, mean.expand_as(own)), -1))


def ratio_loss(model: nn.Module, state: TokenState) -> torch.Tensor:
    """How far the shares of tokens that stay are from the schedule's: squares, in the mean over stages and images.

        logits, state = model.forward_with_state(images)
        loss = criterion(logits, classes) + 2 * ratio_loss(model, state)

    Args:
        model: reduced by "dynamic_vit", in training.
        state: what `forward_with_state` returned.

    Raises:
        ValueError: a state without the masks of all stages.
    """
    method, schedule = model.reducer.method, model.reducer.schedule
    n = state.grid[0] * state.grid[1]
    wanted = [left / n for entry, (left, _) in zip(schedule, counts(schedule, method, n), strict=True)
              if removed(entry, n, method.limit(n))]
    if len(state.record) != len(wanted):
        raise ValueError(
            f"state must hold {len(wanted)} masks, which a model in training makes, got {len(state.record)}"
        )
    kept = torch.stack(state.record).float().mean(-1)
    return (kept - kept.new_tensor(wanted)[:, None]).square().mean()
