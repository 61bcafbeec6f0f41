"""Keep the tokens that the class token attends to.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations (EViT),
https://arxiv.org/abs/2202.07800
Authors' code: https://github.com/youweiliang/evit (Apache-2.0)
"""
from __future__ import annotations

import torch

from .context import BlockContext
from .matching import keep_best
from .method import Method, keep_tokens, quarters
from .state import Assignment, behind_prefix, gather_tokens


class EViT(Method, name="evit"):
    """Between attention and MLP, tokens stay by the class token's attention to them, averaged over heads.

    In blocks 3, 6 and 9 of 12, at those fractions of other depths, unless the schedule names them.

    Args:
        fuse_token: the tokens that go become one, their sum weighted by that attention. It counts among those that
            stay: one less is kept as it is.
    """

    knob = "keep"
    needs_class_token = True

    def __init__(self, fuse_token: bool = False):
        super().__init__()
        self.fuse_token = fuse_token

    def blocks(self, depth: int) -> tuple[int, ...]:
        return quarters(depth)

    def limit(self, n: int) -> int:
        return n - 1

    def reduce(
        self, ctx: BlockContext, remove: int
    ) -> tuple[Assignment, torch.Tensor, torch.Tensor | None]:
        score = ctx.cls_row().mean(1)
        if not self.fuse_token:
            assignment = keep_best(score, ctx.n - remove)
            return assignment, *keep_tokens(ctx, assignment)
        kept = ctx.n - remove - 1
        index, place, others = keep_best(score, kept)
        share = score.gather(1, others)
        fused = share[:, None] @ gather_tokens(ctx.x, others)
        brightest = others.gather(1, share.argmax(1, keepdim=True))
        assignment = Assignment(index.clamp(max=kept), torch.cat((place, brightest), 1))
        tokens = gather_tokens(ctx.tokens, behind_prefix(place, ctx.state.prefix))
        return assignment, torch.cat((tokens, fused), 1), None
