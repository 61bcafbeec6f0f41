"""How much attention every key gets, from queries and keys alone: the mean of the columns of an attention matrix.

Fused attention returns no matrix, and methods that judge tokens by the attention they get must not make one: MCTF (Lee
et al., arXiv 2403.10030: informativeness), SG-Former (Ren et al., arXiv 2308.12216: significance), Zero-TPrune (Wang et
al., arXiv 2305.17328: with query weights, one step A^T s of its page rank).
"""
from __future__ import annotations

import torch

from .._dispatch import eager_inference, exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating, own_types
from . import portable, reference
from .limits import refuses

__all__ = ["attention_column_mean"]


# ---- The public function --------------------------------------------------------------------------------------------

def attention_column_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of the rows of every head's attention matrix, which is never made as a whole.

        out_j = sum_i weight_i softmax_j(scale * q_i . k_j + key_bias_j)

    Computed in float32 at least. Not differentiable: the papers rank tokens by it.

    Args:
        q: (B, heads, N, head_dim), floating point, as scaled_dot_product_attention takes it.
        k: (B, heads, M, head_dim) in q's dtype; M at least 1, and M = N in self-attention.
        scale: of the products; default head_dim ** -0.5.
        key_bias: (B, M) in q's dtype or float32, added to the scores: the logarithms of the sizes of merged tokens, or
            -inf for keys that are to get nothing; at least one key of an image must have a finite one.
        weight: (B, heads, N) in q's dtype or float32, of the queries; default 1 / N, which makes the sum a mean.

    Returns:
        (B, heads, M) in float32, float64 for float64 inputs.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit; the message names it.
    """
    q, k = floating(q, "q").detach(), floating(k, "k").detach()
    _check(q, k, key_bias, weight)
    key_bias, weight = (None if x is None else x.detach() for x in (key_bias, weight))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if reference_chosen() or exporting():
        return reference.attention_column_mean(q, k, key_bias, weight, scale)
    op = _column_mean if eager_inference(q) else torch.ops.visionbb.attention_column_mean
    return op(q, k, key_bias, weight, scale)


# ---- Argument checks ------------------------------------------------------------------------------------------------

def _check(q, k, key_bias, weight) -> None:
    if q.ndim != 4 or not q.shape[2]:
        raise ValueError(f"q must be (B, heads, N, head_dim) with N at least 1, got shape {tuple(q.shape)}")
    B, heads, N, head_dim = q.shape
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim or not k.shape[2]:
        raise ValueError(
            f"k must be (B, heads, M, head_dim) = ({B}, {heads}, M, {head_dim}) like q, with M at least 1, got shape"
            f" {tuple(k.shape)}"
        )
    for name, x, shape, dtypes in (
        ("k", k, k.shape, (q.dtype,)),
        ("key_bias", key_bias, (B, k.shape[2]), (q.dtype, torch.float32)),
        ("weight", weight, (B, heads, N), (q.dtype, torch.float32)),
    ):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            allowed = " or ".join(map(str, dict.fromkeys(dtypes)))
            raise TypeError(f"{name} must be {allowed}, with q in {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


# ---- Registration: custom op, fake, FLOPs ---------------------------------------------------------------------------

def _column_mean(q, *args):
    path = portable
    if resolve(refuses, q) == "triton":
        from . import triton as path  # compiles kernels: only where they run
    with own_types(q):
        return path.attention_column_mean(q, *args)


_op = torch.library.custom_op(
    "visionbb::attention_column_mean", _column_mean, mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? key_bias, Tensor? weight, float scale) -> Tensor",
)


@_op.register_fake
def _(q, k, *args):
    return q.new_empty(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _flops(q, k, *_, out_shape=None, **kw) -> int:
    """A product of head_dim for every pair, and a multiply-add of its weight."""
    B, heads, N, head_dim = q
    return 2 * B * heads * N * k[2] * (head_dim + 1)


register_flops(torch.ops.visionbb.attention_column_mean, _flops)
