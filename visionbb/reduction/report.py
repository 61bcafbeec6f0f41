"""What a reduction does to given images: tokens block by block, multiply-adds, which patches ended up together."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .method import Method
from .schedule import Cost, Schedule


@dataclass(frozen=True)
class ReductionReport:
    """One pass of a reduced model.

    Attributes:
        tokens: (in attention, in the MLP) of each block, patch tokens of an image without prefix tokens.
        gmacs: of an image, in closed form. What MCTF looks ahead and DynamicViT's predictors are counted in; matching
            and merging, a per cent at most, are not.
        plain_gmacs: of the model without reduction.
        source: (B, N) int64, which of the n tokens at the end each patch is in; -1 for those that were dropped.
        size: (B, n), the patches in each token at the end.
        grid: (rows, columns) of the N patches.
    """

    tokens: tuple[tuple[int, int], ...]
    gmacs: float
    plain_gmacs: float
    source: torch.Tensor
    size: torch.Tensor
    grid: tuple[int, int]

    def __str__(self) -> str:
        rows = [f"{'block':>5}  {'attention':>9}  {'MLP':>5}"]
        rows += [f"{i:5}  {n:9}  {m:5}" for i, (n, m) in enumerate(self.tokens)]
        saved = 1 - self.gmacs / self.plain_gmacs
        rows += [f"{self.gmacs:.3f} GMACs an image, {saved:.1%} less than {self.plain_gmacs:.3f}"]
        return "\n".join(rows)


class Reduction:
    """`model.reduction`: a view on how a model is reduced."""

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def method(self) -> Method:
        return self.model.reducer.method

    @property
    def schedule(self) -> Schedule:
        """An entry a block: tokens it removes (int) or the share that it keeps (float)."""
        return self.model.reducer.schedule

    @torch.no_grad()
    def report(self, images: torch.Tensor) -> ReductionReport:
        """Runs the images (B, in_chans, H, W) and tells what became of their patches."""
        model = self.model
        depth = len(model.blocks)
        x, state, noted = model.forward_tokens(images, take=range(depth))
        patches = state.grid[0] * state.grid[1]
        n, tokens = patches, []
        for taken, at in noted:
            left = taken.shape[1] - at.prefix
            tokens.append((left if self.method.where == "start" else n, n if self.method.where == "end" else left))
            n = left
        cost = cost_of(model, state.grid)
        source = torch.where(state.source < n, state.source, -1)
        members = source[:, None] == torch.arange(n, device=x.device)[:, None]
        return ReductionReport(
            tokens=tuple(tokens),
            gmacs=cost.macs(tokens, self.method) / 1e9,
            plain_gmacs=cost.macs([(patches, patches)] * depth) / 1e9,
            source=source,
            size=members.sum(-1),
            grid=state.grid,
        )


def cost_of(model: nn.Module, grid: tuple[int, int]) -> Cost:
    """The closed form of a reduced model's multiply-adds on images of this many patches."""
    family, adapter = model.reducer.family, model.reducer.adapter
    return Cost.of(model, adapter, family.embedding(model), grid[0] * grid[1], family.prefix(model))
