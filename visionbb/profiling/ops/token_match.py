"""Partners of tokens by cosine: ours, and what ToMe and its kin write.

All get sources and destinations, every other token of (B, tokens, D) each, and return the scores, (B, N); places of the
largest are found too. There is no gradient.

- dense: both normalised, the matrix of all similarities, its row maxima.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from visionbb import kernels
from visionbb.kernels import has_triton

from ..op_bench import Contestant, OpBench, Unavailable


@dataclass(frozen=True)
class Case:
    tokens: int
    channels: int

    def __str__(self) -> str:
        return f"n{self.tokens} d{self.channels}"


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    tokens = torch.randn(batch_size, case.tokens, case.channels, device=device, dtype=dtype)
    return tokens[:, 1::2], tokens[:, ::2]


def ours(case: Case, device: torch.device | None = None):
    return lambda src, dst: kernels.token_match(src, dst)[0]


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def dense(case: Case, device: torch.device):
    def match(src, dst):
        score, _ = (F.normalize(src, dim=-1) @ F.normalize(dst, dim=-1).mT).max(-1)
        return score

    return match


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """Tokens read, scores and places written."""
    return batch_size * (case.tokens * case.channels * element + case.tokens // 2 * (4 + 8))


BENCH = OpBench(
    # Mean keys of the heads (64 channels) and tokens, of DeiT-S at 224 pixels, ViT-L/14 at 518, SAM's ViT-B at 1024.
    cases=tuple(Case(*c) for c in [(197, 64), (197, 384), (1369, 64), (1369, 1024), (4096, 64), (4096, 768)]),
    inputs=inputs,
    batched=2,
    reference=ours,
    contestants={
        "dense": Contestant(dense),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
    },
    moved_bytes=moved_bytes,
)
