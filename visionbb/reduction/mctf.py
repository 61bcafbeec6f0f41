"""Merge by several criteria: tokens that are alike, of little information and still small.

Paper: Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers (MCTF),
https://arxiv.org/abs/2403.10030
Authors' code: https://github.com/mlvlab/MCTF (MIT)
Written from the paper's formulas. Differences to the authors' code: prefix tokens of any number stay out of the
matching; what two steps of merging send on is averaged in one; no gradient goes through the information of a token.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernels import token_match, token_merge
from .context import BlockContext
from .matching import alternating, places_of
from .method import Method, merge_mean
from .state import Assignment, behind_prefix

ATTENTION = ("precise", "approximate")


class MCTF(Method, name="mctf"):
    """In front of a block, tokens go where the product of three criteria is largest, in both directions.

    With the attention A of this block to all its tokens ("one step ahead"), the information of token j is the mean of
    column j, a_j, over heads and queries. Of tokens i and j in the two halves of the tokens, every second one each,

        W_ij = ((1 + cos(x_i, x_j)) / 2)^(1 / t_s)  *  (â_i â_j)^(1 / t_i)  *  (ŝ_i ŝ_j)^(1 / t_z)

    with â = min(a) / a, and ŝ of the sizes s alike. Half of the r tokens go from the first half into
    the second, the others back into what is left of the first; means are weighted by a s. All blocks but the first
    reduce, unless the schedule names others.

    Args:
        similarity, information, size: the temperatures t_s, t_i, t_z.
        attention: what the block attends with. "precise": fused attention of the merged tokens, from their own queries
            and keys; the matrix A is never made, only the means of its columns. "approximate", as in the paper: the
            matrix A, merged, its keys summed and its queries averaged, on the values of the merged tokens; for weights
            that were trained so. The paper finds both equally accurate, and where attention is fused a matrix costs
            more than it saves.
    """

    where = "start"

    def __init__(
        self,
        similarity: float = 1.0,
        information: float = 20.0,
        size: float = 40.0,
        attention: str = "precise",
    ):
        super().__init__()
        for name, value in (("similarity", similarity), ("information", information), ("size", size)):
            if value <= 0:
                raise ValueError(f"{name} is a temperature and must be above 0, got {value}")
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        self.similarity, self.information, self.size = similarity, information, size
        self.attention = attention

    def blocks(self, depth: int) -> range:
        return range(1, depth)

    def step_macs(self, n: int, left: int, prefix: int, attention: int, pair: int) -> int:
        def queries_and_keys(n: int) -> int:  # half of the projections, and half of what pairs cost
            return n * attention // 2 + n * n * pair // 2

        again = 0 if self.attention == "precise" else queries_and_keys(left + prefix)
        return queries_and_keys(n + prefix) - again

    def attend(self, ctx: BlockContext) -> torch.Tensor:
        if not ctx.state.record:
            return ctx.attend()
        (attention,), ctx.state = ctx.state.record, ctx.state._replace(record=())
        return ctx.apply(attention)

    def reduce(self, ctx: BlockContext, remove: int) -> tuple[Assignment, torch.Tensor, torch.Tensor]:
        prefix, size = ctx.state.prefix, ctx.state.size
        ctx.look_ahead()
        if self.attention == "precise":
            information = ctx.column_mean().mean(1)
        else:
            attention = ctx.attention()
            information = attention[..., prefix:].detach().float().mean((1, 2))
        information = information.clamp(min=1e-12)  # where attention underflows
        # W to the power of t_s ranks edges alike, and has the similarity as `token_match` computes it
        factor = (information.amin(1, keepdim=True) / information) ** (self.similarity / self.information)
        if size is not None:
            factor = factor * (size.amin(1, keepdim=True) / size) ** (self.similarity / self.size)
        assignment = bidirectional(ctx.x, factor, remove, first=prefix % 2)
        weight = information if size is None else information * size
        if self.attention == "approximate":
            ctx.state = ctx.state._replace(record=(merge_attention(attention, assignment, weight),))
        return assignment, *merge_mean(ctx, assignment, weight)


def bidirectional(x: torch.Tensor, factor: torch.Tensor, remove: int, first: int) -> Assignment:
    """Sends `remove` // 2 of every second of the tokens x (B, n, C) into the others, then as many more back.

    Edges are ranked by (1 + cos(x_i, x_j)) / 2 * factor_i * factor_j, factor (B, n); the second half of the tokens to
    go finds its destinations among those of the first side that are left. Tokens that stay come in the order of
    `matching.bipartite`.
    """
    places = places_of(x)
    (near, far), (near_factor, far_factor), (near_side, far_side) = (
        alternating(each, first) for each in (x, factor, places)
    )

    score, target = token_match(near, far, dst_weight=far_factor, affinity="shifted")
    order = (score * near_factor).argsort(dim=1, descending=True)
    gone, near_left = order[:, : remove // 2], order[:, remove // 2 :].sort(1).values
    into = places.scatter(1, near_side.gather(1, gone), far_side.gather(1, target.gather(1, gone)))

    left = torch.ones_like(near_side, dtype=torch.bool).scatter(1, gone, False)
    score, target = token_match(far, near, dst_weight=near_factor, dst_mask=left, affinity="shifted")
    order = (score * far_factor).argsort(dim=1, descending=True)
    back = remove - remove // 2
    gone, far_left = order[:, :back], order[:, back:].sort(1).values
    into = into.scatter(1, far_side.gather(1, gone), near_side.gather(1, target.gather(1, gone)))

    place = torch.cat((near_side.gather(1, near_left), far_side.gather(1, far_left)), 1)
    number = torch.zeros_like(places).scatter(1, place, torch.arange(place.shape[1], device=x.device).expand_as(place))
    return Assignment(number.gather(1, into.gather(1, into)), place)  # twice: into one that itself goes back


def merge_attention(attention: torch.Tensor, assignment: Assignment, weight: torch.Tensor) -> torch.Tensor:
    """The attention (B, heads, P + n', P + n') of merged tokens, by that of all (B, heads, P + n, P + n).

    A merged key gets what its tokens get together, a merged query gives what they give in the mean by weight (B, n).
    """
    heads, n = attention.shape[1], weight.shape[1]
    prefix = attention.shape[2] - n
    index, left = behind_prefix(assignment.index, prefix), prefix + assignment.place.shape[1]
    weight = F.pad(weight, (prefix, 0), value=1.0)
    queries, _ = token_merge(attention.transpose(1, 2).flatten(2), index, left, weight)
    keys = queries.unflatten(2, (heads, -1)).permute(0, 3, 2, 1).flatten(2)  # (B, P + n, heads * (P + n'))
    mean, count = token_merge(keys, index, left)
    return (mean * count[..., None]).unflatten(2, (heads, -1)).permute(0, 2, 3, 1)
