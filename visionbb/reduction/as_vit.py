"""Keep what is above a learned threshold: as many tokens as an image needs.

Paper: Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention (AS-ViT),
https://arxiv.org/abs/2209.13802
Written from the paper's formulas. Difference to the authors' code, which has no licence: every image of a batch keeps
its own number of tokens, where there all keep the mean; the token of largest score always stays.
"""
from __future__ import annotations

import torch
from torch import nn

from .context import BlockContext
from .masking import Masking
from .method import keep_padded
from .report import cost_of
from .state import Assignment, TokenState

SHARPNESS = 1e4  # of the sigmoid that gives thresholds their gradient


class ASViT(Masking, name="as_vit"):
    """Behind a block, tokens stay whose score is above the threshold of that block.

    The score is the attention of the class token, weighted over heads by the norms of what they gave for the token:
    S_i = sum_h A_h[class, i] |o_hi| / sum_g |o_gi|. In front of blocks 4, 7 and 10 of 12, at those fractions of other
    depths. The thresholds, at first 0.001, 0.002 and 0.003, are parameters of the model, `reducer.method.thresholds`.

    In evaluation tokens go, and images of which fewer stay are padded. In training those below the threshold are
    masked, see `Masking`, for the gradients, and `budget_loss` reads the masks. Both give the same logits.
    """

    where = "end"
    needs_class_token = True
    adaptive = True

    def build(self, depth: int, dim: int, num_heads: int) -> None:
        self.thresholds = nn.Parameter(0.001 * torch.arange(1.0, len(self.blocks(depth)) + 1))

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(b * depth // 12, 1) - 1 for b in (4, 7, 10)}))

    def reduce(self, ctx: BlockContext, remove: int) -> tuple[Assignment, torch.Tensor, torch.Tensor] | None:
        row, record, size = ctx.cls_row(), ctx.state.record, ctx.state.size
        alive = record[-1] if record else torch.ones_like(row[:, 0]) if size is None else size
        if record:  # what the masked tokens have of the row goes to the others
            gone = (row * (1 - alive[:, None])).sum(-1, keepdim=True)
            row = row * alive[:, None] / (1 - gone).clamp(min=1e-6)
        norms = torch.linalg.vector_norm(ctx.out[:, :, ctx.state.prefix :], dim=-1)
        score = (row * norms).sum(1) / norms.sum(1).clamp(min=1e-12)
        threshold = self.thresholds[self.blocks(ctx.depth).index(ctx.index)]
        ranked = score.masked_fill(alive < 0.5, -1)
        stays = (alive > 0.5) & ((score > threshold) | (ranked == ranked.amax(1, keepdim=True)))
        if self.training:
            self.mask(ctx, stays, torch.sigmoid((score - threshold) * SHARPNESS))
            return None
        return keep_padded(ctx, stays)


def budget_loss(model: nn.Module, state: TokenState, target_gmacs: float) -> torch.Tensor:
    """How far the multiply-adds are from a target, 1e9 an image in the mean over the batch: AS-ViT's L1 loss.

        logits, state = model.forward_with_state(images)
        loss = criterion(logits, classes) + 2 * budget_loss(model, state, target_gmacs=3.0)

    Args:
        model: reduced by "as_vit", in training.
        state: what `forward_with_state` returned.

    Raises:
        ValueError: a state without the masks of all thresholds.
    """
    depth = len(model.blocks)
    blocks = model.reducer.method.blocks(depth)
    if len(state.record) != len(blocks):
        raise ValueError(
            f"state must hold {len(blocks)} masks, which a model in training makes, got {len(state.record)}"
        )
    masks = dict(zip(blocks, state.record, strict=True))
    cost = cost_of(model, state.grid)
    n, counts = state.record[0].new_full((len(state.record[0]),), cost.patches), []
    for block in range(depth):
        counts.append((n, n))
        n = masks[block].sum(1) if block in masks else n
    return (cost.macs(counts).mean() / 1e9 - target_gmacs).abs()
