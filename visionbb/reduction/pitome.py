"""Merge what is plentiful, protect what is rare.

Paper: Accelerating Transformers with Spectrum-Preserving Token Merging (PiToMe), https://arxiv.org/abs/2405.16148
Written from the paper's formulas. The first half of the blocks matches as ToMe does, on tokens sorted by energy.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .context import BlockContext
from .matching import alternating, bipartite
from .state import Assignment, gather_tokens
from .tome import ToMe


class PiToMe(ToMe, name="pitome"):
    """Of the 2 r tokens of largest energy every second goes into the most similar of the others; the rest stays.

    The energy of a token is high where many are like it: the mean over j of ELU(cos(k_i, k_j) - m) with the margin
    m = margin * (1 - index / depth) (equation 4). In the first half of the blocks all tokens take part, alternating in
    the order of energy, and the r best edges are merged.

    Args:
        margin: of the first block.
        proportional: as in `ToMe`.
    """

    def __init__(self, margin: float = 0.75, proportional: bool = True):
        super().__init__(proportional)
        self.margin = margin

    def match(self, ctx: BlockContext, remove: int) -> Assignment:
        keys = ctx.keys().detach()
        order = energy(keys, self.margin * (1 - ctx.index / ctx.depth)).argsort(dim=1, descending=True)
        if ctx.index < ctx.depth // 2:
            plenty, rare = order, None
        else:
            plenty, rare = order[:, : 2 * remove], order[:, 2 * remove :].sort(1).values
        return bipartite(*alternating(gather_tokens(keys, plenty), 0), *alternating(plenty, 0), remove, rest=rare)


def energy(features: torch.Tensor, margin: float) -> torch.Tensor:
    """Of tokens with features (B, n, D): (B, n)."""
    unit = F.normalize(features.float(), dim=-1)
    return F.elu(unit @ unit.mT - margin).mean(-1)
