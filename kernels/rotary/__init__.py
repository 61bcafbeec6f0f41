"""2-D rotary position embedding: channels turn with the row and the column of their token.

Papers: RoFormer (Su et al., arXiv 2104.09864), and its 2-D forms in RALA (Fan et al., arXiv 2411.07635) and MILA (Han
et al., arXiv 2405.16605), which differ in the channels that the frequencies run over and in their last frequency.
"""
from __future__ import annotations

import torch

from .._dispatch import exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating
from . import portable, reference
from .limits import refuses
from .table import Rotary

__all__ = ["Rotary", "rotary2d"]


def rotary2d(x: torch.Tensor, rotary: Rotary, inverse: bool = False) -> torch.Tensor:
    """Turns pairs of neighbouring channels by angles that grow with the token's row or column.

    Args:
        x: (B, H, W, heads, head_dim), floating point.
        rotary: the frequencies, over a head (`Rotary.closed(head_dim)`) or more; the spans tile heads * head_dim.
        inverse: turn back: undoes, and is the transpose of, the embedding.

    Returns:
        Like x; computed in float32 at least. Differentiable any number of times.

    Raises:
        TypeError: x is not floating point.
        ValueError: a shape or value that does not fit; the message names it.
    """
    x = floating(x, "x", autocast=False)
    if x.ndim != 5:
        raise ValueError(f"x must be (B, H, W, heads, head_dim), got shape {tuple(x.shape)}")
    rotary.check(x.shape[3] * x.shape[4])
    if reference_chosen() or exporting():
        return reference.rotary2d(x, rotary, inverse)
    return torch.ops.visionbb.rotary2d(x, rotary.span, rotary.ratio, inverse)


@torch.library.custom_op(
    "visionbb::rotary2d", mutates_args=(), schema="(Tensor x, int span, float ratio, bool inverse) -> Tensor"
)
def _op(x, span, ratio, inverse):
    path = portable
    if resolve(refuses, x) == "triton":
        from . import triton as path  # compiles a kernel: only where it runs
    return path.rotary2d(x, Rotary(span, ratio), inverse)


@_op.register_fake
def _(x, span, ratio, inverse):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, *ctx.rotary, ctx.inverse = inputs


def _backward(ctx, dx):
    return torch.ops.visionbb.rotary2d(dx, *ctx.rotary, not ctx.inverse), None, None, None


register_flops(torch.ops.visionbb.rotary2d, lambda *args, out_shape=None, **kwargs: 0)
_op.register_autograd(_backward, setup_context=_setup_context)
