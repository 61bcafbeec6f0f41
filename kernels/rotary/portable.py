"""2-D rotary embedding in plain PyTorch: a pair of channels is a complex number, one product turns it."""
from __future__ import annotations

import torch

from .table import Rotary, turns


def table(H: int, W: int, rotary: Rotary, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """The turns of every token, complex (H * W, 1, span / 2), in x's precision but at least single."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turn = torch.view_as_complex(turns(max(H, W), rotary, x.device, wide))
    if inverse:
        turn = turn.conj().resolve_conj()
    rows, cols = turn[:H, None].expand(-1, W, -1), turn[:W].expand(H, -1, -1)
    return torch.cat((rows, cols), 2).view(H * W, 1, -1)


def turned(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x (..., H * W, heads, d), contiguous, turned by the table."""
    pairs = table.shape[-1]
    spans = torch.view_as_complex(x.view(*x.shape[:-2], x.shape[-2] * x.shape[-1] // (2 * pairs), pairs, 2))
    return torch.view_as_real(spans * table).view(x.shape)


def rotary2d(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    return turned(wide.flatten(1, 2), table(*x.shape[1:3], rotary, x, inverse)).view(x.shape).to(x.dtype)
