"""Both affinities as one product and one sum a pair, so that paths need not tell them apart."""
from __future__ import annotations

import torch

AFFINITIES = ("cosine", "shifted")
EPS = 1e-12  # the smallest norm, as in F.normalize: what is shorter is similar to nothing


def factors(
    src: torch.Tensor, dst: torch.Tensor, dst_weight: torch.Tensor | None, dst_mask: torch.Tensor | None, affinity: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Row factors (B, N), slopes (B, M) and offsets (B, M), in float32 at least, with which a pair's affinity is

        src_i . dst_j * factor_i * slope_j + offset_j.

    Masked destinations have the offset -inf; None stands for offsets that are all zero.
    """
    wide = torch.promote_types(src.dtype, torch.float32)
    factor, slope = (1 / torch.linalg.vector_norm(x, dim=-1, dtype=wide).clamp_(min=EPS) for x in (src, dst))
    offset = None
    if affinity == "shifted":
        slope /= 2
        offset = torch.full_like(slope, 0.5)
    if dst_weight is not None:
        slope *= dst_weight
        offset = offset if offset is None else offset * dst_weight
    if dst_mask is not None:
        offset = torch.zeros_like(slope) if offset is None else offset
        offset = offset.masked_fill_(~dst_mask, float("-inf"))
    return factor, slope, offset
