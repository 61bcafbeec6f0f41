"""The angles of 2-D rotary embeddings."""
from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Rotary(NamedTuple):
    """A 2-D rotary embedding: pairs of neighbouring channels (2p, 2p + 1) turn with the token's row or column.

    Over every `span` channels, the first half of the pairs turns with the row and the second with the column; pair j of
    a half turns by ratio ** j radians a token.
    """

    span: int
    ratio: float

    @classmethod
    def closed(cls, span: int, base: float = 10000.0) -> Rotary:
        """Frequencies from 1 down to 1 / base, both included (RALA, MALA, NaLaFormer: `span` is the head)."""
        return cls(span, base ** (-1 / max(span // 4 - 1, 1)))

    @classmethod
    def half_open(cls, span: int, base: float = 10000.0) -> Rotary:
        """Frequencies from 1 down to, but without, 1 / base (MILA, where `span` is the whole width)."""
        return cls(span, base ** (-4 / span))

    def check(self, channels: int) -> None:
        """Raises ValueError unless `channels` holds whole spans, which hold whole pairs for both axes."""
        if self.span < 4 or self.span % 4 or channels % self.span:
            raise ValueError(
                f"rotary.span must be a multiple of 4 that divides heads * head_dim = {channels}, got {self.span}"
            )
        if not self.ratio > 0:
            raise ValueError(f"rotary.ratio must be positive, got {self.ratio}")


def angles(length: int, rotary: Rotary, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(length, span / 4): what pair j of an axis turns by at each of its positions."""
    frequency = rotary.ratio ** torch.arange(rotary.span // 4, device=device, dtype=dtype)
    return torch.arange(length, device=device, dtype=dtype)[:, None] * frequency


@functools.lru_cache(maxsize=128)
def turns(length: int, rotary: Rotary, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(length, span / 4, 2): cosine and sine of the angles, kept: they are few and every block asks again."""
    a = angles(length, rotary, torch.device("cpu"))
    return torch.stack((a.cos(), a.sin()), -1).to(device, dtype)
