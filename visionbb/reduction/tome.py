"""Token merging: the most similar tokens become one.

Paper: Token Merging: Your ViT But Faster (ToMe), https://arxiv.org/abs/2210.09461
Written from the paper. Differences to the authors' code: prefix tokens of any number stay out of the matching, fused
attention stays, pooled heads are weighted by size.
"""
from __future__ import annotations

import torch

from .context import BlockContext
from .matching import alternating, bipartite, places_of
from .method import Method
from .state import Assignment


class ToMe(Method, name="tome"):
    """Between attention and MLP, the r tokens most similar to one of the other half go into it, as means by size.

    Every second token is a source, the others are destinations; similarity is the cosine of keys, averaged over heads.
    The first source is where it is with the class token counted in, as in the authors' code.

    Args:
        proportional: tokens count in attention as many times as they are patches. The authors turn it off for MAE's
            weights without fine-tuning.
    """

    def __init__(self, proportional: bool = True):
        super().__init__()
        self.proportional = proportional

    def key_bias(self, size: torch.Tensor) -> torch.Tensor | None:
        return super().key_bias(size) if self.proportional else None

    def match(self, ctx: BlockContext, remove: int) -> Assignment:
        keys, first = ctx.keys(), ctx.state.prefix % 2
        return bipartite(*alternating(keys, first), *alternating(places_of(keys), first), remove)
