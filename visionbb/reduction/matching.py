"""Assignments that several methods share: along the best edges of a bipartite graph, or to keep the best tokens."""
from __future__ import annotations

import torch

from ..kernels import token_match
from .state import Assignment


def places_of(x: torch.Tensor) -> torch.Tensor:
    """The places (B, n) of tokens (B, n, ...): 0, 1, ... n - 1."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def alternating(x: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (B, n, ...), tokens or what belongs to each, every second from `first` (0 or 1) on, and the others."""
    return x[:, first::2], x[:, 1 - first :: 2]


def bipartite(
    near: torch.Tensor,
    far: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    remove: int,
    rest: torch.Tensor | None = None,
) -> Assignment:
    """Sends `remove` of the sources each into its most similar destination: those with the largest similarity.

    Tokens that stay come in this order: sources, the rest, destinations (ToMe, arXiv 2210.09461, section 3.1).

    Args:
        near, far: features (B, n_src, D) and (B, n_dst, D) of the two sides of the graph, compared by their cosine.
        src, dst: their places (B, n_src) and (B, n_dst) among all tokens.
        rest: places of the tokens that take no part; None where all do.
    """
    score, target = token_match(near.detach(), far.detach())
    order = score.argsort(dim=1, descending=True)
    merged, kept = order[:, :remove], order[:, remove:].sort(1).values
    staying = [src.gather(1, kept), dst] if rest is None else [src.gather(1, kept), rest, dst]
    place = torch.cat(staying, 1)
    new = torch.arange(place.shape[1], device=place.device).expand_as(place)
    index = place.new_zeros(place.shape[0], place.shape[1] + remove).scatter(1, place, new)
    into = target.gather(1, merged) + (place.shape[1] - dst.shape[1])  # destinations come last
    return Assignment(index.scatter(1, src.gather(1, merged), into), place)


def pad(into: torch.Tensor, stays: torch.Tensor) -> Assignment:
    """The assignment of images of which unequal numbers of tokens stay, in their order; short ones are padded.

    Padding stands at the end, at any place. Give its tokens the size 0, as the sum of the sizes that go into them is:
    then an image does not depend on the others in its batch.

    Args:
        into: (B, n) int64 in [0, n), the token that each goes into, itself where it stays.
        stays: (B, n) bool; False of padding, too, whose `into` is of no importance.
    """
    longest = int(stays.sum(1).max())
    number = stays.cumsum(1) - 1
    place = stays.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return Assignment(number.gather(1, into).clamp(min=0), place)


def keep_best(score: torch.Tensor, kept: int) -> Assignment:
    """Keeps the `kept` tokens of largest score (B, n), in their order, and drops the others."""
    order = score.detach().argsort(dim=1, descending=True)
    place, dropped = order[:, :kept].sort(1).values, order[:, kept:].sort(1).values
    return Assignment(torch.cat((place, dropped), 1).argsort(1), place, dropped)


def keep_marked(stays: torch.Tensor) -> Assignment:
    """Keeps the tokens marked (B, n), in their order, and drops the others; images that keep fewer are padded.

    Padding stands at the end, at any place: give its tokens the size 0. Among the dropped are, where an image drops
    fewer than others do, some that no patch is in.
    """
    kept = stays.sum(1)
    longest, shortest = int(kept.max()), int(kept.min())
    order = stays.long().argsort(dim=1, descending=True, stable=True)
    number = order.argsort(1)
    index = torch.where(stays, number, number + (longest - shortest))
    return Assignment(index, order[:, :longest], order[:, shortest:])
