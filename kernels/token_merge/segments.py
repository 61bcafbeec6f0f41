"""Tokens in the order of their destinations, so that each destination finds its own in a row."""
from __future__ import annotations

import torch


def flat(index: torch.Tensor, M: int) -> torch.Tensor:
    """(B * N,): destinations counted over the whole batch."""
    return (index + M * torch.arange(len(index), device=index.device)[:, None]).flatten()


def segments(index: torch.Tensor, M: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B * N,), and where each destination's begin among them, (B * M + 1,); both count over the whole batch.

    The tokens of a destination keep their order: sums over them are the same every time.
    """
    destinations, order = flat(index, M).sort(stable=True)
    return order, torch.searchsorted(destinations, torch.arange(len(index) * M + 1, device=index.device))
