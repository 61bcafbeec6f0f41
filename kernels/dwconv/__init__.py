"""Depthwise 2-D convolution on channels-last maps, of stride 1 and "same" padding, with residual and bias.

The positional and local convolutions of the zoo: CPVT's conditional position encodings (Chu et al., arXiv 2102.10882),
CSWin's LePE (Dong et al., arXiv 2107.00652), the decomposed large kernels of VAN (Guo et al., arXiv 2202.09741).
"""
from __future__ import annotations

import torch

from .._dispatch import exporting, reference_chosen, resolve, unwatched, wants_gradient
from .._flops import register_flops
from .._inputs import floating
from . import portable, reference
from .limits import MAX_KERNEL, refuses

__all__ = ["dwconv2d"]


# ---- The public function --------------------------------------------------------------------------------------------

def dwconv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dilation: int = 1,
    residual: bool = False,
) -> torch.Tensor:
    """Convolves every channel of a map with its own kernel; the map keeps its size, zeros lie around it.

        out[b, y, x, c] = bias[c] + sum_ij weight[c, 0, i, j] * in[b, y + (i - kh // 2) * dilation,
                                                                 x + (j - kw // 2) * dilation, c]  (+ in[b, y, x, c])

    Sums are carried in float32 at least. Differentiable any number of times: the gradient of x is this op with the
    kernel flipped.

    A registered op (`torch.ops.visionbb.dwconv2d`) costs some 20 to 30 us a call, about half of the convolution of a
    7x7 map, and more with its gradient. So where no kernel of our own would run, nothing is recorded, and no gradient
    is asked for or PyTorch's own is the faster one, this function calls PyTorch's operators directly, which are then
    what profilers see. An export records the plain convolution.

    Args:
        x: (B, H, W, C), floating point; read where it lies if its channels are contiguous.
        weight: (C, 1, kh, kw) in x's dtype, as that of nn.Conv2d with groups=C; kh and kw odd, at most 11.
        bias: (C,) in x's dtype, or None.
        dilation: distance between the taps, at least 1.
        residual: add x: the positional convolution x + conv(x).

    Returns:
        (B, H, W, C) in x's dtype. Under autocast, convolved in the autocast dtype; a residual keeps the dtype of x.

    Raises:
        TypeError: a dtype that is not floating point or not x's, or an argument of the wrong type.
        ValueError: a shape or value that does not fit; the message names it.
    """
    wide, x = x, floating(x, "x")
    dtype = x.dtype
    if getattr(weight, "dtype", None) != dtype:
        weight = _as(weight, x, "weight")
    if bias is not None and getattr(bias, "dtype", None) != dtype:
        bias = _as(bias, x, "bias")
    _check(x, weight, bias, dilation)
    if residual and wide.dtype != dtype:  # autocast must not round the residual stream
        return wide + dwconv2d(x, weight, bias, dilation=dilation)
    if reference_chosen():
        return reference.dwconv2d(x, weight, bias, dilation, residual)
    plain = unwatched() and not x.is_meta and _path(x) is portable
    if plain and (not wants_gradient(x, weight, bias) or portable.trains_plainly(x, weight, dilation)):
        return portable.forward(x, weight, bias, dilation, residual)
    if exporting():
        return portable.exportable(x, weight, bias, dilation, residual)
    return torch.ops.visionbb.dwconv2d(x, weight, bias, dilation, residual)


def _as(parameter: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    """The parameter in x's dtype, which it has or gets from autocast."""
    parameter = floating(parameter, name)
    if parameter.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {parameter.dtype}")
    return parameter


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int) -> None:
    shape, kernel, device = x.shape, weight.shape, x.device
    if len(shape) != 4:
        raise ValueError(f"x must be (B, H, W, C), got shape {tuple(shape)}")
    C = shape[3]
    if len(kernel) != 4 or kernel[0] != C or kernel[1] != 1:
        raise ValueError(f"weight must be (C, 1, kh, kw) with x's C = {C}, got {tuple(kernel)}")
    kh, kw = kernel[2], kernel[3]
    if kh % 2 == 0 or kw % 2 == 0 or kh > MAX_KERNEL or kw > MAX_KERNEL:
        raise ValueError(f"weight must have odd kh and kw up to {MAX_KERNEL}, got {(kh, kw)}")
    if weight.device != device:
        raise ValueError(f"weight must be on x's device {device}, got {weight.device}")
    if bias is not None:
        if bias.shape != (C,):
            raise ValueError(f"bias must be (C,) = ({C},), got {tuple(bias.shape)}")
        if bias.device != device:
            raise ValueError(f"bias must be on x's device {device}, got {bias.device}")
    if type(dilation) is not int:
        raise TypeError(f"dilation must be int, got {dilation!r}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")


# ---- Registration: custom ops, fakes, autograd, FLOPs ---------------------------------------------------------------

def _path(x):
    if resolve(refuses, x) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


@torch.library.custom_op(
    "visionbb::dwconv2d", mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int dilation, bool residual) -> Tensor",
)
def _op(x, weight, bias, dilation, residual):
    return _path(x).forward(x, weight, bias, dilation, residual)


@_op.register_fake
def _(x, weight, bias, dilation, residual):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "visionbb::dwconv2d_weight_gradient", mutates_args=(),
    schema="(Tensor dout, Tensor x, int[] kernel_size, int dilation) -> (Tensor dweight, Tensor dbias)",
)
def _weight_gradient_op(dout, x, kernel_size, dilation):
    return _path(x).weight_gradient(dout, x, tuple(kernel_size), dilation)


@_weight_gradient_op.register_fake
def _(dout, x, kernel_size, dilation):
    C = x.shape[-1]
    return x.new_empty(C, 1, *kernel_size), x.new_empty(C)


# Both ops are linear in each of their tensors, and the gradients of each are the two ops again.

def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.dilation, ctx.residual = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout):
    x, weight = ctx.saved_tensors  # once: activation checkpointing recomputes them when read
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _op(dout, weight.flip(2, 3), None, ctx.dilation, ctx.residual)
    if any(ctx.needs_input_grad[1:3]):
        dweight, dbias = _weight_gradient_op(dout, x, weight.shape[2:], ctx.dilation)
    return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None, None


def _setup_weight_context(ctx, inputs, output):
    dout, x, _, ctx.dilation = inputs
    ctx.save_for_backward(dout, x)


def _weight_backward(ctx, weight, bias):
    dout, x = ctx.saved_tensors
    return (
        _op(x, weight, bias, ctx.dilation, False), _op(dout, weight.flip(2, 3), None, ctx.dilation, False), None, None
    )


_op.register_autograd(_backward, setup_context=_setup_context)
_weight_gradient_op.register_autograd(_weight_backward, setup_context=_setup_weight_context)


def _flops(shape, kernel_size) -> int:
    B, H, W, C = shape
    return 2 * B * H * W * C * kernel_size[0] * kernel_size[1]


register_flops(torch.ops.visionbb.dwconv2d, lambda x, weight, *_, out_shape=None, **kw: _flops(x, weight[2:]))
register_flops(
    torch.ops.visionbb.dwconv2d_weight_gradient,
    lambda dout, x, kernel_size, *_, out_shape=None, **kw: _flops(x, kernel_size),
)
