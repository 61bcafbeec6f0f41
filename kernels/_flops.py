"""One FLOP formula per op, used by `torch.utils.flop_counter` and by fvcore alike.

Convention: a multiply-add is two FLOPs here (torch's), one "flop" in fvcore; softmax, norms and biases count nothing.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

# "visionbb::na2d" -> formula(*arg shapes or values, out_shape=...) -> FLOPs
_formulas: dict[str, Callable[..., int]] = {}


def register_flops(op: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """Registers `formula(*args, out_shape) -> FLOPs` for a custom op; tensors arrive as shapes, the rest as values."""
    _formulas[op._qualified_op_name] = formula
    register_flop_formula(op)(formula)


def flop_formulas() -> dict[str, Callable[..., int]]:
    """All formulas by qualified op name, for counters other than torch's (fvcore's handles are named this way)."""
    return dict(_formulas)
