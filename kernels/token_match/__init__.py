"""The most similar token of another set, for every token: how methods that merge tokens find partners.

Papers: ToMe (Bolya et al., arXiv 2210.09461: cosine), MCTF (Lee et al., arXiv 2403.10030: the shifted cosine, weighted
by size and information). A matrix of all similarities would be the largest tensor of a network with fused attention.
"""
from __future__ import annotations

from typing import Literal

import torch

from .._dispatch import eager_inference, exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating, own_types
from . import portable, reference
from .form import AFFINITIES
from .limits import refuses

__all__ = ["token_match"]


# ---- The public function --------------------------------------------------------------------------------------------

def token_match(
    src: torch.Tensor,
    dst: torch.Tensor,
    *,
    dst_weight: torch.Tensor | None = None,
    dst_mask: torch.Tensor | None = None,
    affinity: Literal["cosine", "shifted"] = "cosine",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The destination of largest affinity for every source token, without the matrix of all affinities.

        score_i = max_j a(cos(src_i, dst_j)) * dst_weight_j,  with a(c) = c ("cosine") or (1 + c) / 2 ("shifted")

    Products are of the inputs' own digits and sums are carried in float32 at least: norms divide afterwards, and no
    normalised token is rounded. The cosine with a token of norm zero is 0. Not differentiable, neither is the score.

    Args:
        src: (B, N, D), floating point.
        dst: (B, M, D) in src's dtype, M at least 1.
        dst_weight: (B, M) in src's dtype or float32, or None for ones.
        dst_mask: (B, M), bool: True where a destination may be chosen; None allows all.
        affinity: "cosine" or "shifted".

    Returns:
        score: (B, N) in float32, float64 for float64 inputs; -inf where every destination is masked.
        index: (B, N), int64, of the first destination of that score; 0 where every destination is masked.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, name or device that does not fit; the message names it.
    """
    src, dst = floating(src, "src").detach(), floating(dst, "dst").detach()
    _check(src, dst, dst_weight, dst_mask)
    if affinity not in AFFINITIES:
        raise ValueError(f"affinity must be one of {', '.join(AFFINITIES)}, got {affinity!r}")
    if dst_weight is not None:
        dst_weight = dst_weight.detach()
    if reference_chosen() or exporting():
        return reference.token_match(src, dst, dst_weight, dst_mask, affinity)
    op = _match if eager_inference(src) else torch.ops.visionbb.token_match
    return op(src, dst, dst_weight, dst_mask, affinity)


# ---- Argument checks ------------------------------------------------------------------------------------------------

def _check(src, dst, dst_weight, dst_mask) -> None:
    if src.ndim != 3:
        raise ValueError(f"src must be (B, N, D), got shape {tuple(src.shape)}")
    B, _, D = src.shape
    if dst.ndim != 3 or dst.shape[0] != B or dst.shape[2] != D or not dst.shape[1]:
        raise ValueError(
            f"dst must be (B, M, D) = ({B}, M, {D}) like src, with M at least 1, got shape {tuple(dst.shape)}"
        )
    for name, x, shape, dtypes in (
        ("dst", dst, dst.shape, (src.dtype,)),
        ("dst_weight", dst_weight, dst.shape[:2], (src.dtype, torch.float32)),
        ("dst_mask", dst_mask, dst.shape[:2], (torch.bool,)),
    ):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} must be (B, M) = {tuple(shape)} with dst, got shape {tuple(x.shape)}")
        if x.dtype not in dtypes:
            allowed = " or ".join(map(str, dict.fromkeys(dtypes)))
            raise TypeError(f"{name} must be {allowed}, with src in {src.dtype}, got {x.dtype}")
        if x.device != src.device:
            raise ValueError(f"{name} must be on src's device {src.device}, got {x.device}")


# ---- Registration: custom op, fake, FLOPs ---------------------------------------------------------------------------

def _match(src, *args):
    path = portable
    if resolve(refuses, src) == "triton":
        from . import triton as path  # compiles a kernel: only where it runs
    with own_types(src):
        return path.token_match(src, *args)


_op = torch.library.custom_op(
    "visionbb::token_match", _match, mutates_args=(),
    schema="(Tensor src, Tensor dst, Tensor? dst_weight, Tensor? dst_mask, str affinity)"
    " -> (Tensor score, Tensor index)",
)


@_op.register_fake
def _(src, *args):
    score = src.new_empty(src.shape[:2], dtype=torch.promote_types(src.dtype, torch.float32))
    return score, src.new_empty(src.shape[:2], dtype=torch.long)


def _flops(src, dst, *_, out_shape=None, **kw) -> int:
    B, N, D = src
    return 2 * B * N * dst[1] * D


register_flops(torch.ops.visionbb.token_match, _flops)
