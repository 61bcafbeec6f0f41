"""What a network knows of its tokens while their number falls: one immutable record, handed from block to block."""
from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels import token_unmerge


class Assignment(NamedTuple):
    """Where n tokens go when n' stay; decided by a method's `match`.

    Attributes:
        index: (B, n) int64, what each token goes into: in [0, n') a token that stays, n' + j the j-th of `dropped`.
        place: (B, n') int64 in [0, n), the token whose place on the map each one that stays takes; any for padding.
        dropped: (B, d) int64 in [0, n), tokens that go into none; or None.
    """

    index: torch.Tensor
    place: torch.Tensor
    dropped: torch.Tensor | None = None


class TokenState(NamedTuple):
    """How the tokens at hand stem from the patches of the image. Prefix tokens are never counted in.

    Attributes:
        grid: (rows, columns) of patches; N = rows * columns.
        prefix: number of prefix tokens in front of the n tokens at hand.
        size: (B, n) float32, the patches in each token, 0 for padding; None while no tokens have been merged.
        position: (B, n) int64 in [0, N), the patch whose place (and rotary embedding) each has; None for all in order.
        source: (B, N) int64, the token that each patch is in, n + j for the j-th of the attic; None if not asked for.
        attic: (B, d, C), dropped tokens as they were last; None for none.
        record: whatever a method hands on to its later blocks and to its loss.
    """

    grid: tuple[int, int]
    prefix: int
    size: torch.Tensor | None = None
    position: torch.Tensor | None = None
    source: torch.Tensor | None = None
    attic: torch.Tensor | None = None
    record: tuple[torch.Tensor, ...] = ()

    @classmethod
    def start(cls, x: torch.Tensor, prefix: int, grid: tuple[int, int], track: bool) -> TokenState:
        """The state of the tokens (B, prefix + N, C) in front of the first block."""
        source = torch.arange(grid[0] * grid[1], device=x.device).expand(x.shape[0], -1) if track else None
        return cls(grid, prefix, source=source)

    def after(self, assignment: Assignment, x: torch.Tensor, size: torch.Tensor | None) -> TokenState:
        """The state once the patch tokens x (B, n, C) have gone where `assignment` says, now of these sizes (B, n')."""
        index, place, dropped = assignment
        source, attic = self.source, self.attic
        if source is not None:
            gone = place.shape[1] if dropped is None else place.shape[1] + dropped.shape[1]
            if attic is not None:  # behind those that are dropped now
                old = torch.arange(gone, gone + attic.shape[1], device=index.device)
                index = torch.cat((index, old.expand(index.shape[0], -1)), 1)
            if dropped is not None:
                leaving = gather_tokens(x, dropped)
                attic = leaving if attic is None else torch.cat((leaving, attic), 1)
            source = index.gather(1, source)
        position = place if self.position is None else self.position.gather(1, place)
        return self._replace(size=size, position=position, source=source, attic=attic)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, prefix + n, C) to (B, prefix + N, C): every patch as the token it is in, or as it was last."""
        if self.position is None:
            return x
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        if self.attic is not None:
            patches = torch.cat((patches, self.attic), 1)
        return torch.cat((prefix, token_unmerge(patches, self.source)), 1)


def behind_prefix(places: torch.Tensor, prefix: int) -> torch.Tensor:
    """Places (B, m) among patch tokens to places (B, prefix + m) among all, of which those of the prefix are first."""
    first = torch.arange(prefix, device=places.device).expand(places.shape[0], -1)
    return torch.cat((first, places + prefix), 1)


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, n, C) at index (B, m)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
