"""Assignments that several methods share: along the best edges of a bipartite graph, or to keep the best tokens."""
from __future__ import annotations

import torch

from ..kernels import token_match
from .state import Assignment, gather_tokens


def alternating(x: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (B, n // 2) of every second of the tokens (B, n, D) from `first` (0 or 1) on, and those of the others."""
    B, n, _ = x.shape
    places = torch.arange(n, device=x.device).expand(B, -1)
    return places[:, first::2], places[:, 1 - first :: 2]


def bipartite(
    features: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, remove: int, rest: torch.Tensor | None = None
) -> Assignment:
    """Sends `remove` of the sources each into its most similar destination: those with the largest similarity.

    Tokens that stay come in this order: sources, the rest, destinations (ToMe, arXiv 2210.09461, section 3.1).

    Args:
        features: (B, n, D), compared by their cosine.
        src, dst: places (B, n_src) and (B, n_dst) in [0, n) of the two sides of the graph.
        rest: places of the tokens that take no part; None where all do.
    """
    score, target = token_match(gather_tokens(features, src).detach(), gather_tokens(features, dst).detach())
    order = score.argsort(dim=1, descending=True)
    merged, kept = order[:, :remove], order[:, remove:].sort(1).values
    staying = [src.gather(1, kept), dst] if rest is None else [src.gather(1, kept), rest, dst]
    place = torch.cat(staying, 1)
    new = torch.arange(place.shape[1], device=place.device).expand_as(place)
    index = torch.zeros(features.shape[:2], dtype=torch.long, device=place.device).scatter(1, place, new)
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
