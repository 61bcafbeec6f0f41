"""The attention that keys get: ours, and the attention matrix that one would make for it.

All get q and k (B, heads, N, 64) and logarithms of sizes (B, N), and return (B, heads, N). There is no gradient.

- softmax: the whole matrix, and its mean over the queries.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from visionbb import kernels
from visionbb.kernels import has_triton

from ..op_bench import Contestant, OpBench, Unavailable

HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    tokens: int
    heads: int

    def __str__(self) -> str:
        return f"n{self.tokens} h{self.heads}"


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q and k as they lie in a projection."""
    projection = torch.randn(batch_size, case.tokens, 3, case.heads, HEAD_DIM, device=device, dtype=dtype)
    q, k, _ = projection.permute(2, 0, 3, 1, 4)
    return q, k, torch.randint(1, 5, (batch_size, case.tokens), device=device).to(dtype).log()


def ours(case: Case, device: torch.device | None = None):
    return lambda q, k, bias: kernels.attention_column_mean(q, k, key_bias=bias)


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def softmax(case: Case, device: torch.device):
    def column_mean(q, k, bias):
        return (q * HEAD_DIM**-0.5 @ k.mT + bias[:, None, None]).softmax(-1).mean(2)

    return column_mean


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """q and k read, the means written in float32."""
    return batch_size * case.heads * case.tokens * (2 * HEAD_DIM * element + 4)


BENCH = OpBench(
    # DeiT-S and ViT-B at 224 pixels, ViT-L/14 at 518, SAM's ViT-B at 1024.
    cases=tuple(Case(*c) for c in [(197, 6), (197, 12), (1369, 16), (4096, 12)]),
    inputs=inputs,
    batched=3,
    reference=ours,
    contestants={
        "softmax": Contestant(softmax),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
    },
    moved_bytes=moved_bytes,
)
