"""Merging of tokens into fewer by weighted means, and the copy back.

Papers: ToMe (Bolya et al., arXiv 2210.09461: means weighted by size), MCTF (Lee et al., arXiv 2403.10030: by size and
information). `scatter_reduce` computes the same with a weighted copy of the tokens, and on GPUs in another order every
time.
"""
from __future__ import annotations

import torch

from .._dispatch import eager_inference, exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating
from . import portable, reference
from .limits import refuses

__all__ = ["token_merge", "token_unmerge"]


# ---- The public functions -------------------------------------------------------------------------------------------

def token_merge(
    x: torch.Tensor, index: torch.Tensor, M: int, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of the tokens that share a destination.

        total_m = sum_{i: index_i = m} w_i,    merged_m = sum_{i: index_i = m} w_i x_i / total_m

    Where the total is zero, as it is without any token, merged is zero, and so are its gradients. Sums are carried in
    float32 at least and in the order of the tokens: results and gradients are the same every time, on every device.
    Differentiable once, in x and weight.

    Args:
        x: (B, N, C), floating point; autocast leaves it alone.
        index: (B, N), int64, destinations in [0, M); checked on the CPU only, where a check waits for no GPU.
        M: tokens that remain, at least 1.
        weight: (B, N) in x's dtype or float32, not negative; None for ones.

    Returns:
        merged: (B, M, C) in x's dtype.
        total: (B, M) in float32, float64 for float64 inputs: the weights (sizes) of the merged tokens.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, value or device that does not fit; the message names it.
    """
    x = floating(x, "x", autocast=False)
    _check(x, "x", index)
    if not (isinstance(M, int | torch.SymInt) or torch.jit.is_tracing()):  # whose sizes are tensors
        raise TypeError(f"M must be int, got {M!r}")
    if M < 1:
        raise ValueError(f"M must be at least 1, got {M}")
    if weight is not None:
        weight = floating(weight, "weight", autocast=False)
        if weight.shape != index.shape:
            raise ValueError(f"weight must be (B, N) = {tuple(index.shape)} with x, got shape {tuple(weight.shape)}")
        if weight.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"weight must be {x.dtype} like x, or float32, got {weight.dtype}")
        if weight.device != x.device:
            raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    if reference_chosen() or exporting():
        return reference.token_merge(x, index, M, weight)
    op = _merge if eager_inference(x, weight) else torch.ops.visionbb.token_merge
    return op(x, index, M, weight)


def token_unmerge(y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Every token's copy of what it was merged into: out_i = y at index_i.

    Differentiable once; the gradient is summed as `token_merge` sums, the same every time.

    Args:
        y: (B, M, C), floating point; autocast leaves it alone.
        index: (B, N), int64, in [0, M), as `token_merge` took it.

    Returns:
        (B, N, C) in y's dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, value or device that does not fit; the message names it.
    """
    y = floating(y, "y", autocast=False)
    _check(y, "y", index)
    if reference_chosen() or exporting():
        return reference.token_unmerge(y, index)
    return (_unmerge if eager_inference(y) else torch.ops.visionbb.token_unmerge)(y, index)


# ---- Argument checks ------------------------------------------------------------------------------------------------

def _check(tokens: torch.Tensor, name: str, index: torch.Tensor) -> None:
    if tokens.ndim != 3:
        raise ValueError(f"{name} must be (B, {'N' if name == 'x' else 'M'}, C), got shape {tuple(tokens.shape)}")
    if not isinstance(index, torch.Tensor) or index.dtype != torch.long:
        raise TypeError(f"index must be an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if name == "x" and index.shape != tokens.shape[:2]:
        raise ValueError(f"index must be (B, N) = {tuple(tokens.shape[:2])} with x, got shape {tuple(index.shape)}")
    if index.ndim != 2 or index.shape[0] != tokens.shape[0]:
        raise ValueError(f"index must be (B, N) with {name}'s B = {tokens.shape[0]}, got shape {tuple(index.shape)}")
    if index.device != tokens.device:
        raise ValueError(f"index must be on {name}'s device {tokens.device}, got {index.device}")


def _check_values(index: torch.Tensor, M: int) -> None:
    """Inside the ops: a graph that is being recorded has no values."""
    if index.device.type == "cpu" and index.numel():
        low, high = map(int, index.aminmax())
        if low < 0 or high >= M:
            raise ValueError(f"index must lie in [0, {M}), got values from {low} to {high}")


# ---- Registration: custom ops, fakes, autograd, FLOPs ---------------------------------------------------------------

def _path(x: torch.Tensor):
    if resolve(refuses, x) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


def _merge(x, index, M, weight):
    _check_values(index, M)
    return _path(x).token_merge(x, index, M, weight)


_merge_op = torch.library.custom_op(
    "visionbb::token_merge", _merge, mutates_args=(),
    schema="(Tensor x, Tensor index, SymInt M, Tensor? weight) -> (Tensor merged, Tensor total)",
)


@_merge_op.register_fake
def _(x, index, M, weight):
    B, _, C = x.shape
    return x.new_empty(B, M, C), x.new_empty(B, M, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op(
    "visionbb::token_merge_backward", mutates_args=(),
    schema="(Tensor dmerged, Tensor dtotal, Tensor? x, Tensor index, Tensor? weight, Tensor? merged, Tensor total)"
    " -> (Tensor dx, Tensor dweight)",
)
def _merge_backward_op(dmerged, *args):
    dx, dweight = _path(dmerged).token_merge_backward(dmerged, *args)
    return dx, dmerged.new_empty(0) if dweight is None else dweight


@_merge_backward_op.register_fake
def _(dmerged, dtotal, x, index, weight, merged, total):
    dx = dmerged.new_empty(*index.shape, dmerged.shape[-1])
    return dx, dmerged.new_empty(0) if x is None else weight.new_empty(weight.shape)


def _setup_merge_context(ctx, inputs, output):
    x, index, _, weight = inputs
    merged, total = output
    if not ctx.needs_input_grad[3]:  # the gradient of x needs no tokens
        x = merged = None
        ctx.mark_non_differentiable(total)
    ctx.save_for_backward(x, index, weight, merged, total)


def _merge_backward(ctx, dmerged, dtotal):
    dx, dweight = _merge_backward_op(dmerged, dtotal, *ctx.saved_tensors)
    return dx, None, None, dweight if ctx.needs_input_grad[3] else None


def _unmerge(y, index):
    _check_values(index, y.shape[1])
    return portable.token_unmerge(y, index)


_unmerge_op = torch.library.custom_op(
    "visionbb::token_unmerge", _unmerge, mutates_args=(), schema="(Tensor y, Tensor index) -> Tensor"
)


@_unmerge_op.register_fake
def _(y, index):
    return y.new_empty(*index.shape, y.shape[-1])


def _setup_unmerge_context(ctx, inputs, output):
    y, index = inputs
    ctx.M = y.shape[1]
    ctx.save_for_backward(index)


def _unmerge_backward(ctx, dout):
    (index,) = ctx.saved_tensors
    mean, count = _merge_op(dout, index, ctx.M, None)
    return (mean * count[..., None]).to(dout.dtype), None


_merge_op.register_autograd(_merge_backward, setup_context=_setup_merge_context)
_unmerge_op.register_autograd(_unmerge_backward, setup_context=_setup_unmerge_context)

# A multiply-add for every channel of every token; the gradient of the weight takes another.
register_flops(
    torch.ops.visionbb.token_merge, lambda x, *_, out_shape=None, **kw: 2 * x[0] * x[1] * x[2]
)
register_flops(
    torch.ops.visionbb.token_merge_backward,
    lambda dmerged, dtotal, x, index, *_, out_shape=None, **kw: (
        (2 if x is None else 4) * index[0] * index[1] * dmerged[2]
    ),
)
register_flops(torch.ops.visionbb.token_unmerge, lambda *_, out_shape=None, **kw: 0)
