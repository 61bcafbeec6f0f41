"""What the queries need to know of all keys and values; in the same form, the gradient of that."""
from __future__ import annotations

from typing import NamedTuple

import torch

from .form import Form


class State(NamedTuple):
    """Views of the packed state, (B, heads, d * dv + d + dv) in float32 at least."""

    kv: torch.Tensor  # (B, heads, d, dv): sum of w rope(phi(k)) v^T
    key: torch.Tensor  # (B, heads, d): sum of w phi(k)
    value: torch.Tensor | None  # (B, heads, dv): mean of v, where the normalizer is additive

    @classmethod
    def of(cls, packed: torch.Tensor, d: int, dv: int) -> State:
        kv, key, *value = packed.split((d * dv, d, dv) if packed.shape[-1] > d * dv + d else (d * dv, d), -1)
        return cls(kv.unflatten(-1, (d, dv)), key, *value or [None])

    def packed(self) -> torch.Tensor:
        return torch.cat([self.kv.flatten(2), *(x for x in self[1:] if x is not None)], -1)


def empty_state(q: torch.Tensor, v: torch.Tensor, form: Form) -> torch.Tensor:
    """Packed."""
    d, dv = q.shape[-1], v.shape[-1]
    size = d * dv + d + (dv if form.normalizer == "additive" else 0)
    return q.new_empty(q.shape[0], q.shape[3], size, dtype=torch.promote_types(q.dtype, torch.float32))
