"""State-space duality: a scan with one decay a head, as matrix products.

Papers: Mamba-2 (Dao and Gu, arXiv 2405.21060: the causal form), VSSD (Shi et al., arXiv 2407.18559: the other one).
"""
from __future__ import annotations

import math

import torch

from .._dispatch import exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating, own_types
from . import portable, reference
from .limits import refuses

__all__ = ["ssd"]


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    causal: bool = False,
    chunk: int = 64,
) -> torch.Tensor:
    """Selective state spaces with a scalar decay a head, without a loop over tokens.

    Non-causal (VSSD, equation 8), where every token sees all others alike, whatever the order of the map:

        y_t = C_t . sum_s (-A dt_s) B_s x_s + D x_t,

    and causal (Mamba-2), the recurrence h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t + D x_t in raster
    order. Differentiable in all tensors (the non-causal form once).

    Args:
        x: (B, H, W, heads, P) or (B, L, heads, P), floating point.
        dt: (B, H, W, heads) or (B, L, heads): time steps, positive (after softplus and bias); x's dtype or float32,
            which autocast leaves alone.
        A: (heads,), negative; A and D in x's dtype or float32.
        B, C: (B, H, W, N) or (B, H, W, G, N) for G groups of heads that share them, likewise with L; x's dtype.
        D: (heads,) or None.
        causal: which form.
        chunk: tokens that the causal form takes at once; does not change the result.

    Returns:
        Like x in shape, in float32 (float64 for float64 inputs), for the norm that follows.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a shape, device or value that does not fit; the message names it.
    """
    x, B, C = floating(x, "x"), floating(B, "B"), floating(C, "C")
    dt, A = floating(dt, "dt", autocast=False), floating(A, "A", autocast=False)
    if x.ndim < 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must be (B, H, W, heads, P) or (B, L, heads, P) with at least one token, got shape {tuple(x.shape)}"
        )
    if B.ndim == x.ndim - 1:
        B = B.unsqueeze(-2)
    if C.ndim == x.ndim - 1:
        C = C.unsqueeze(-2)
    heads = x.shape[-2]
    if B.ndim != x.ndim or 0 in B.shape[1:] or heads % B.shape[-2]:
        raise ValueError(f"B must be (..., N) or (..., G, N), G a divisor of heads = {heads}, got {tuple(B.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    for name, t, shape, parameter in (
        ("dt", dt, x.shape[:-1], True), ("A", A, (heads,), True), ("D", D, (heads,), True),
        ("B", B, (*x.shape[:-2], *B.shape[-2:]), False), ("C", C, B.shape, False),
    ):
        if t is None:
            continue
        if t.shape != torch.Size(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
        if t.dtype != x.dtype and not (parameter and t.dtype == torch.float32):
            raise TypeError(f"{name} must be {x.dtype} like x{' or float32' * parameter}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if causal:
        resolve(lambda x: "the causal form of ssd has no kernels", x)  # an error if they were asked for
    map_ = x.shape[1:-2]
    if reference_chosen() or causal or exporting():
        tokens = _tokens(x, dt, A, B, C, D)
        if reference_chosen():
            y = reference.ssd(*tokens, causal)
        else:
            y = portable.causal(*tokens, chunk) if causal else portable.exportable(*tokens)
        return y.unflatten(1, map_)
    return torch.ops.visionbb.ssd(x, dt, A, B, C, D)


# ---- Registration of the non-causal form: custom ops, fakes, autograd, FLOPs ----------------------------------------

_TENSORS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D"


def _path(x, B):
    if resolve(refuses, x, B) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


def _tokens(x, dt, A, B, C, D):
    return x.flatten(1, -3), dt.flatten(1, -2), A, B.flatten(1, -3), C.flatten(1, -3), D


@torch.library.custom_op("visionbb::ssd", mutates_args=(), schema=f"({_TENSORS}) -> Tensor")
def _op(x, dt, A, B, C, D):
    with own_types(x):
        return _path(x, B).ssd(*_tokens(x, dt, A, B, C, D)).view(x.shape)


@_op.register_fake
def _(x, *_):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op(
    "visionbb::ssd_backward", mutates_args=(), schema=f"(Tensor dout, {_TENSORS}) -> ({', '.join(['Tensor'] * 6)})"
)
def _backward_op(dout, *inputs):
    x, _, _, B, _, _ = inputs
    with own_types(x):
        grads = _path(x, B).ssd_backward(dout.flatten(1, -3), *_tokens(*inputs))
    return tuple(
        x.new_empty(0) if t is None else grad.view(t.shape).to(t.dtype)
        for grad, t in zip(grads, inputs, strict=True)
    )


@_backward_op.register_fake
def _(dout, *inputs):
    return tuple(dout.new_empty(0, dtype=inputs[0].dtype) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them when read
    return tuple(None if t is None else grad for t, grad in zip(saved, _backward_op(dout, *saved), strict=True))


_op.register_autograd(_backward, setup_context=_setup_context)


def _flops(x, B, products: int) -> int:
    """`products` of N x P a token and head."""
    return 2 * products * math.prod(x) * B[-1]


# Forward: B x and C S. Backward: B x again, and one product each for the gradients of S, C, B and x.
register_flops(torch.ops.visionbb.ssd, lambda x, dt, A, B, *_, out_shape=None, **kw: _flops(x, B, 2))
register_flops(torch.ops.visionbb.ssd_backward, lambda dout, x, dt, A, B, *_, out_shape=None, **kw: _flops(x, B, 5))
