"""The check that every op makes of its tensors first, and the types in which it computes."""
from __future__ import annotations

import contextlib

import torch
from torch._C import _is_any_autocast_enabled


def floating(x: torch.Tensor, name: str, *, autocast: bool = True) -> torch.Tensor:
    """x, which must be a floating-point tensor; by default in the autocast dtype where autocast is on.

    An op runs in the autocast dtype as matrix products do; float64 stays what it is.

    Raises:
        TypeError: x is no floating-point tensor; the message names it.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if autocast and _is_any_autocast_enabled() and x.dtype != torch.float64:
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return x.to(torch.get_autocast_dtype(device))
    return x


def own_types(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Where a path computes in types of its own choice: autocast must not narrow them."""
    # What makes a context of autocast's costs some 50 us.
    if _is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
