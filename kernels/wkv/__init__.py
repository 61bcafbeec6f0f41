"""Bidirectional WKV, the attention of Vision-RWKV (Duan et al., arXiv 2403.02308): linear in the number of tokens."""
from __future__ import annotations

import math

import torch

from .._dispatch import exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating, own_types
from . import portable, reference
from .limits import refuses

__all__ = ["bi_wkv"]


def bi_wkv(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Every token's mean of the values, with weights that fall off with the distance (Vision-RWKV, equation 4):

        y_t = (sum_{i != t} e^{k_i - (|t - i| - 1) w} v_i + e^{u + k_t} v_t)
            / (sum_{i != t} e^{k_i - (|t - i| - 1) w} + e^{u + k_t} + eps),

    channel by channel. w is the decay of one step: the paper's parameter divided by the number of tokens; it may be
    negative. Exponents of any size neither overflow nor vanish (in graphs exported to standard operators: while
    k_t + t w spans less than 80 in a channel). Differentiable once, in all tensors.

    Args:
        w, u: (C,), v's dtype or float32, which autocast leaves alone.
        k, v: (B, L, C) or (B, H, W, C) in raster order, one floating-point dtype.
        eps: of the denominator.

    Returns:
        Like v; computed in float32 at least.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a shape or device that does not fit; the message names it.
    """
    k, v = floating(k, "k"), floating(v, "v")
    w, u = floating(w, "w", autocast=False), floating(u, "u", autocast=False)
    if v.ndim < 3 or 0 in v.shape[1:]:
        raise ValueError(f"v must be (B, L, C) or (B, H, W, C) with at least one token, got shape {tuple(v.shape)}")
    for name, x, shape, dtypes in (
        ("k", k, v.shape, (v.dtype,)),
        ("w", w, v.shape[-1:], (v.dtype, torch.float32)),
        ("u", u, v.shape[-1:], (v.dtype, torch.float32)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))} with v, got {x.dtype}")
        if x.device != v.device:
            raise ValueError(f"{name} must be on v's device {v.device}, got {x.device}")
    if reference_chosen():
        return reference.bi_wkv(w, u, k.flatten(1, -2), v.flatten(1, -2), eps).unflatten(1, v.shape[1:-1])
    if exporting():
        return portable.exportable(w, u, k.flatten(1, -2), v.flatten(1, -2), eps).unflatten(1, v.shape[1:-1])
    return torch.ops.visionbb.bi_wkv(w, u, k, v, eps)


# ---- Registration: custom ops, fakes, autograd, FLOPs ---------------------------------------------------------------

def _path(v, eps):
    if resolve(refuses, v, eps) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


@torch.library.custom_op("visionbb::bi_wkv", mutates_args=())
def _op(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    with own_types(v):
        return _path(v, eps).bi_wkv(w, u, k.flatten(1, -2), v.flatten(1, -2), eps).view(v.shape)


@_op.register_fake
def _(w, u, k, v, eps):
    return v.new_empty(v.shape)


@torch.library.custom_op("visionbb::bi_wkv_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor, w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with own_types(v):
        grads = _path(v, eps).bi_wkv_backward(dout.flatten(1, -2), w, u, k.flatten(1, -2), v.flatten(1, -2), eps)
    return tuple(grad.view(x.shape).to(x.dtype) for grad, x in zip(grads, (w, u, k, v), strict=True))


@_backward_op.register_fake
def _(dout, w, u, k, v, eps):
    return tuple(x.new_empty(x.shape) for x in (w, u, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


def _backward(ctx, dout):
    return *_backward_op(dout, *ctx.saved_tensors, ctx.eps), None


_op.register_autograd(_backward, setup_context=_setup_context)


def _flops(v) -> int:
    """Two recurrences a direction, and the products that make and use them: 8 multiply-adds a channel and token."""
    return 16 * math.prod(v)


register_flops(torch.ops.visionbb.bi_wkv, lambda w, u, k, v, *_, out_shape=None, **kw: _flops(v))
register_flops(torch.ops.visionbb.bi_wkv_backward, lambda dout, w, u, k, v, *_, out_shape=None, **kw: 2 * _flops(v))
