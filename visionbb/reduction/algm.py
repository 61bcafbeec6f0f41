"""Merge neighbours where the image is plain, then tokens that are alike anywhere: as many as there are.

Paper: ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation with Plain Vision
Transformers, https://arxiv.org/abs/2406.09936
Authors' code: https://github.com/tue-mps/algm-segmenter (MIT)
Written from the formulas. Differences to the authors' code: every image merges as many tokens as it has to, where there
the one that merges least decides for its batch; grids of any sides; means of the second step are by size; tokens keep
the order of the map, which decides about the halves of the second step.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernels import token_match
from .context import BlockContext
from .matching import alternating, pad, places_of
from .method import Method
from .state import Assignment


class ALGM(Method, name="algm"):
    """Twice, between attention and MLP, tokens merge by the cosine of what they are there; how many, the image says.

    In the first block the windows of 2 x 2 patches become one token each whose six pairs have a mean cosine of
    `threshold` or more; what is left over of an odd side stays. In the l-th block every second token goes into the most
    similar of the others, where that similarity is at least its mean + its standard deviation / l, taken over the
    tokens of the image.

    Images of which fewer tokens stay are padded to the longest of the batch, so its shapes depend on what it shows:
    `torch.export` is not for it.

    Args:
        threshold: the authors have 0.90, 0.88, 0.94 and 0.95 for Segmenter's ViT-Ti, S, B and L.
        global_block: number of the second block that merges, from 0, which makes its l one more; None for a third of
            the depth, which is 4 in the authors' networks of 12 blocks (ViT-L: 6).
        proportional: tokens count in attention as many times as they are patches. The authors' networks were trained
            without.
    """

    adaptive = True

    def __init__(self, threshold: float = 0.88, global_block: int | None = None, proportional: bool = False):
        super().__init__()
        self.threshold = threshold
        self.global_block = global_block
        self.proportional = proportional

    def build(self, depth: int, dim: int, num_heads: int) -> None:
        if self.global_block is not None and not 1 <= self.global_block < depth:
            raise ValueError(f"global_block must be in [1, {depth}), behind the first block, got {self.global_block}")

    def blocks(self, depth: int) -> tuple[int, int]:
        return 0, max(depth // 3, 1) if self.global_block is None else self.global_block

    def key_bias(self, size: torch.Tensor) -> torch.Tensor:
        return super().key_bias(size if self.proportional else size.clamp(max=1))  # padding gets no attention

    def match(self, ctx: BlockContext, remove: int) -> Assignment:
        x = ctx.x.detach()
        if ctx.index == 0:
            return pad(*similar_windows(x, ctx.state.grid, self.threshold))
        return pad(*similar_pairs(x, ctx.state.size > 0, ctx.state.prefix % 2, ctx.index + 1))


def similar_windows(x: torch.Tensor, grid: tuple[int, int], threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens (B, rows * cols, C) go, and which stay, when windows above the threshold go into their first."""
    rows, cols = grid[0] // 2, grid[1] // 2
    places = torch.arange(x.shape[1], device=x.device)
    whole = places.view(grid)[: 2 * rows, : 2 * cols]
    windows = whole.view(rows, 2, cols, 2).transpose(1, 2).reshape(-1, 4)
    unit = F.normalize(x.float(), dim=-1)[:, windows]
    # |sum u|^2 has every pair twice, and every token with itself
    alike = (unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))) / 12
    into = torch.where((alike >= threshold)[..., None], windows[:, :1], windows)
    places = places.expand(x.shape[:2])
    into = places.scatter(1, windows.flatten().expand(x.shape[0], -1), into.flatten(1))
    return into, into == places


def similar_pairs(x: torch.Tensor, real: torch.Tensor, first: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens (B, n, C) go, and which stay; `real` (B, n) are not padding, `first` is as in `alternating`."""
    places = places_of(x)
    (near, far), (taking, mask), (src, dst) = (alternating(each, first) for each in (x, real, places))
    score, target = token_match(near, far, dst_mask=mask)
    count = taking.sum(1, keepdim=True)
    mean = (score.masked_fill(~taking, 0).sum(1, keepdim=True)) / count
    variance = (score - mean).square().masked_fill(~taking, 0).sum(1, keepdim=True) / (count - 1)
    going = taking & (score >= mean + variance.sqrt() / layer)  # none of a single one, whose deviation is NaN
    into = torch.where(going, dst.gather(1, target), src)
    return places.scatter(1, src, into), real.scatter(1, src, taking & ~going)
