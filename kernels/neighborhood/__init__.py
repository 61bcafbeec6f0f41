"""Neighborhood attention on 2-D maps: every query attends to a window of keys around it.

Papers: NAT (Hassani et al., arXiv 2204.07143), DiNAT (Hassani and Shi, arXiv 2209.15001: dilation), Generalized
Neighborhood Attention (arXiv 2504.16922: stride), CLEAR (Liu et al., arXiv 2412.16112: the disc window).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .._dispatch import direct, eager_inference, exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating
from . import portable, reference
from .limits import refuses
from .window import Window, attended_pairs

__all__ = ["merge_attentions", "na2d", "na2d_qkvpacked"]


# ---- The public functions -------------------------------------------------------------------------------------------

def na2d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    *,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool | Sequence[bool] = False,
    window: Literal["square", "disc"] = "square",
    clip: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """2-D neighborhood attention: softmax(scale * q k^T + rpb) v over the kernel_size keys around each query.

    Windows are shifted inwards at the borders, so that every query sees exactly kh * kw keys (NAT, section 3.1). With a
    dilation, a query sees only keys of its own residue class (DiNAT, equation 2). With a stride, the queries of a group
    of `stride` share the window of the group's leader (Generalized Neighborhood Attention). Even kernels have one key
    more on the left. Differentiable in q, k, v and rpb (once), and in the returned log-sum-exp.

    Args:
        q, k, v: (B, H, W, heads, head_dim), one floating-point dtype and device.
        kernel_size: keys per axis, int or (height, width), at least 1; odd for `window="disc"`.
        dilation: distance between the keys of a window, int or pair.
        stride: queries that share a window, int or pair, at most `kernel_size`.
        rpb: relative position bias (heads, 2*kh - 1, 2*kw - 1) added to the scaled scores at index
            key - query + kernel - 1, counted in steps of the dilation; q's dtype or float32, which it keeps under
            autocast. Not with `causal`.
        scale: of the scores; default head_dim ** -0.5.
        causal: per axis; queries see no key after themselves, and fewer than `kernel_size` near the start.
        window: "square", or CLEAR's "disc": keys with dy^2 + dx^2 < r^2 where kernel_size = 2r - 1, cut off (not
            shifted) at the borders; not with stride or causal.
        clip: allow maps smaller than kernel_size * dilation, whose windows then hold the whole dilation group.
        return_lse: also return the natural log-sum-exp of each query's scores, for `merge_attentions`.

    Returns:
        out (B, H, W, heads, head_dim), or (out, lse) with lse (B, H, W, heads) in float32 (float64 for float64 inputs).

    Raises:
        TypeError: dtypes differ or are not floating point, or an argument is of the wrong type.
        ValueError: a shape or value that does not fit; the message names it.
    """
    q, k, v = (floating(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if q.ndim != 5:
        raise ValueError(f"q must be (B, H, W, heads, head_dim), got shape {tuple(q.shape)}")
    geometry, scale = _checked(q, rpb, kernel_size, dilation, stride, scale, causal, window, clip)
    out, lse = _composite((q, k, v), rpb, geometry, scale, return_lse) or _na2d(q, k, v, rpb, *geometry, scale)
    return (out, lse) if return_lse else out


def na2d_qkvpacked(
    qkv: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    *,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool | Sequence[bool] = False,
    window: Literal["square", "disc"] = "square",
    clip: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`na2d` on the output of a qkv projection, read and differentiated where it lies, without a copy.

    Args:
        qkv: (B, H, W, 3, heads, head_dim).
        The rest, the result and the errors are `na2d`'s.
    """
    qkv = floating(qkv, "qkv")
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be (B, H, W, 3, heads, head_dim), got shape {tuple(qkv.shape)}")
    geometry, scale = _checked(qkv, rpb, kernel_size, dilation, stride, scale, causal, window, clip)
    out, lse = _composite((qkv,), rpb, geometry, scale, return_lse) or _na2d_qkvpacked(qkv, rpb, *geometry, scale)
    return (out, lse) if return_lse else out


def merge_attentions(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attentions of the same queries over disjoint key sets into attention over their union.

    Args:
        outs: results, each (..., head_dim) of one shape.
        lses: their natural log-sum-exps, each (...).

    Returns:
        out, lse: as if all keys had been attended to at once.

    Raises:
        ValueError: no inputs, unequal numbers of outs and lses, or shapes that do not match.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, and at least one; got {len(outs)} and {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs[{i}] {tuple(out.shape)} and lses[{i}] {tuple(lse.shape)} do not match outs[0]"
                f" {tuple(outs[0].shape)}"
            )
    all_lse = torch.stack(list(lses))
    lse = all_lse.logsumexp(0)
    weights = (all_lse - lse).exp()
    out = sum(o.to(w.dtype) * w[..., None] for o, w in zip(outs, weights, strict=True))
    return out.to(outs[0].dtype), lse


# ---- Argument checks ------------------------------------------------------------------------------------------------

def _pair(value, name: str, kind: type = int) -> tuple:
    if type(value) is kind:
        pair = value, value
    else:
        pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or type(pair[0]) is not kind or type(pair[1]) is not kind:
        raise TypeError(f"{name} must be {kind.__name__} or a pair (height, width) of them, got {value!r}")
    if kind is int and (pair[0] < 1 or pair[1] < 1):
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return pair


def _checked(q, rpb, kernel_size, dilation, stride, scale, causal, window, clip) -> tuple[Window, float]:
    """The geometry and the scale of queries q, (B, H, W, heads, head_dim) or packed with keys and values."""
    shape = q.shape
    H, W, heads, head_dim = shape[1], shape[2], shape[-2], shape[-1]
    kernel, dilation = _pair(kernel_size, "kernel_size"), _pair(dilation, "dilation")
    stride, causal = _pair(stride, "stride"), _pair(causal, "causal", bool)
    if window not in ("square", "disc"):
        raise ValueError(f"window must be 'square' or 'disc', got {window!r}")
    disc = window == "disc"
    if disc and (kernel[0] != kernel[1] or kernel[0] % 2 == 0):
        raise ValueError(f"window='disc' needs one odd kernel_size for both axes, got {kernel_size!r}")
    if disc and (stride != (1, 1) or any(causal)):
        raise ValueError(f"window='disc' takes no stride and no causal, got stride={stride!r}, causal={causal!r}")
    for axis, length, name in ((0, H, "height"), (1, W, "width")):
        if stride[axis] > kernel[axis]:
            raise ValueError(f"stride must be at most kernel_size, got {stride[axis]} > {kernel[axis]} for the {name}")
        if not (clip or disc) and kernel[axis] * dilation[axis] > length:
            raise ValueError(
                f"kernel_size * dilation must fit the map: {kernel[axis]} * {dilation[axis]} > {length}, its {name}"
                " (clip=True lets windows shrink)"
            )
    if rpb is not None:
        want = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        if rpb.shape != want:
            raise ValueError(f"rpb must be (heads, 2*kh-1, 2*kw-1) = {want}, got {tuple(rpb.shape)}")
        if any(causal):
            raise ValueError("rpb cannot be combined with causal")
        if rpb.dtype != q.dtype and rpb.dtype != torch.float32:
            raise TypeError(f"rpb must be {q.dtype} like q, or float32, got {rpb.dtype}")
        if rpb.device != q.device:
            raise ValueError(f"rpb must be on q's device {q.device}, got {rpb.device}")
    return Window(kernel, dilation, stride, causal, disc, clip), head_dim**-0.5 if scale is None else float(scale)


def _composite(tensors: tuple, rpb, window: Window, scale: float, return_lse: bool):
    """(out, lse) in PyTorch's own operators where the registered op must not show or need not; None elsewhere."""
    if reference_chosen():
        return reference.na2d(*_unpacked(tensors), rpb, window, scale)
    if eager_inference(*tensors, rpb) and _path(tensors[0]) is portable:
        forward = portable.forward_packed if len(tensors) == 1 else portable.forward
        return forward(*tensors, rpb, window, scale, return_lse)
    if exporting():
        return portable.exportable(*_unpacked(tensors), rpb, window, scale, return_lse)
    return None


def _unpacked(tensors: tuple) -> tuple:
    """(qkv,) or (q, k, v) to views q, k, v."""
    return tensors[0].unbind(3) if len(tensors) == 1 else tensors


# ---- Registration: custom ops, fakes, autograd, FLOPs ---------------------------------------------------------------

_GEOMETRY = "int[] kernel_size, int[] dilation, int[] stride, int[] causal, bool disc, bool clip, float scale"


def _window(kernel, dilation, stride, causal, disc, clip) -> Window:
    return Window(tuple(kernel), tuple(dilation), tuple(stride), tuple(map(bool, causal)), disc, clip)


def _path(x):
    if resolve(refuses, x) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


def _forward(q, k, v, rpb, *geometry):
    *window, scale = geometry
    return _path(q).forward(q, k, v, rpb, _window(*window), scale)


def _forward_fake(q, k, v, rpb, *geometry):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(dout, dlse, q, k, v, rpb, out, lse, geometry, dq, dk, dv) -> torch.Tensor:
    *window, scale = geometry
    drpb = _path(q).backward(dout, dlse, q, k, v, rpb, out, lse, _window(*window), scale, dq, dk, dv)
    return dq.new_empty(0) if drpb is None else drpb.to(rpb.dtype)


def _drpb_fake(dout, rpb):
    return dout.new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)


def _register(name: str, tensors: str):
    """Registers `visionbb::<name>` and its backward, of (qkv,) or (q, k, v); returns the op by `direct`."""
    n = tensors.count(",") + 1
    signature = ", ".join(f"Tensor {t}" for t in tensors.split(", "))
    grads = ", ".join(["Tensor"] * (n + 1))

    def run(*args):
        return _forward(*_unpacked(args[:n]), *args[n:])

    op = torch.library.custom_op(
        f"visionbb::{name}", run, mutates_args=(), schema=f"({signature}, Tensor? rpb, {_GEOMETRY}) -> (Tensor, Tensor)"
    )

    @op.register_fake
    def _(*args):
        return _forward_fake(*_unpacked(args[:n]), *args[n:])

    def run_backward(dout, dlse, *args):
        inputs, (rpb, out, lse), geometry = args[:n], args[n : n + 3], args[n + 3 :]
        into = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        drpb = _backward(dout.contiguous(), dlse, *_unpacked(inputs), rpb, out, lse, geometry, *_unpacked(into))
        return *into, drpb

    backward_op = torch.library.custom_op(
        f"visionbb::{name}_backward", run_backward, mutates_args=(),
        schema=f"(Tensor dout, Tensor dlse, {signature}, Tensor? rpb, Tensor out, Tensor lse, {_GEOMETRY})"
        f" -> ({grads})",
    )

    @backward_op.register_fake
    def _(dout, dlse, *args):
        inputs, rpb = args[:n], args[n]
        return *(x.new_empty(x.shape) for x in inputs), _drpb_fake(dout, rpb)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: n + 1], *output)
        ctx.geometry = inputs[n + 1 :]

    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them when read
        step = run_backward if eager_inference(dout, dlse, *saved) else backward_op
        *grads, drpb = step(dout, dlse, *saved, *ctx.geometry)
        return *grads, None if saved[n] is None else drpb, *(None for _ in ctx.geometry)

    op.register_autograd(backward, setup_context=setup_context)

    def flops(*args, out_shape=None, products: int):
        (B, H, W, heads, head_dim), window = _query_shape(args[0]), _window(*args[n + 1 : n + 7])
        return products * 2 * B * heads * head_dim * attended_pairs(H, W, window)

    def backward_flops(dout, dlse, *args, out_shape=None):
        return flops(*args[: n + 1], *args[n + 3 :], products=5)

    # Forward: q k^T and p v. Backward: the scores again, and one product each for dp, dq, dk and dv.
    register_flops(getattr(torch.ops.visionbb, name), lambda *a, out_shape=None, **kw: flops(*a, products=2))
    register_flops(getattr(torch.ops.visionbb, f"{name}_backward"), backward_flops)
    return direct(op, run, setup_context, backward)


def _query_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:3], *shape[-2:])


_na2d = _register("na2d", "q, k, v")
_na2d_qkvpacked = _register("na2d_qkvpacked", "qkv")
