"""Means of tokens by size: ours, and what one would write without it.

All get x (B, N, C), sizes (B, N) in float32 and destinations (B, N), and return the means, (B, M, C).

- scatter_reduce: ToMe's form, sums of x * size and of sizes;
- index_add: the same on tokens counted over the whole batch;
- one_hot: the matrix (M, N) of who belongs where, times the tokens, which is what an export records.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from visionbb import kernels
from visionbb.kernels import has_triton

from ..op_bench import Contestant, OpBench, Unavailable


@dataclass(frozen=True)
class Case:
    before: int
    after: int
    channels: int

    def __str__(self) -> str:
        return f"n{self.before}-{self.after} c{self.channels}"


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Every destination gets a token, and any of them the others."""
    x = torch.randn(batch_size, case.before, case.channels, device=device, dtype=dtype, requires_grad=True)
    size = torch.randint(1, 5, (batch_size, case.before), device=device).float()
    index = torch.randint(case.after, (batch_size, case.before), device=device)
    index[:, : case.after] = torch.arange(case.after, device=device)
    return x, size, index.gather(1, torch.rand_like(size).argsort(1))


def ours(case: Case, device: torch.device | None = None):
    return lambda x, size, index: kernels.token_merge(x, index, case.after, size)[0]


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def scatter_reduce(case: Case, device: torch.device):
    def merge(x, size, index):
        total = size.new_zeros(len(x), case.after).scatter_reduce(1, index, size, "sum")
        x = x * size[..., None].to(x.dtype)
        merged = x.new_zeros(len(x), case.after, case.channels)
        merged = merged.scatter_reduce(1, index[..., None].expand(x.shape), x, "sum")
        return merged / total[..., None].to(x.dtype)

    return merge


def index_add(case: Case, device: torch.device):
    def merge(x, size, index):
        B = len(x)
        index = (index + case.after * torch.arange(B, device=x.device)[:, None]).flatten()
        total = size.new_zeros(B * case.after).index_add(0, index, size.flatten())
        x = (x * size[..., None].to(x.dtype)).flatten(0, 1)
        merged = x.new_zeros(B * case.after, case.channels).index_add(0, index, x)
        return (merged / total[:, None].to(x.dtype)).view(B, case.after, case.channels)

    return merge


def one_hot(case: Case, device: torch.device):
    def merge(x, size, index):
        members = (index[:, None] == torch.arange(case.after, device=x.device)[:, None]) * size[:, None]
        return (members / members.sum(-1, keepdim=True)).to(x.dtype) @ x

    return merge


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """Tokens, sizes and destinations read, the means written."""
    return batch_size * ((case.before + case.after) * case.channels * element + case.before * (4 + 8))


BENCH = OpBench(
    # DeiT-S at 224 pixels with ToMe's r = 13 and with a half, ViT-L/14 at 518 with a tenth, SAM's ViT-B with a half.
    cases=tuple(Case(*c) for c in [(197, 184, 384), (197, 99, 384), (1369, 1229, 1024), (4096, 2048, 768)]),
    inputs=inputs,
    batched=3,
    reference=ours,
    contestants={
        "scatter_reduce": Contestant(scatter_reduce),
        "index_add": Contestant(index_add),
        "one_hot": Contestant(one_hot),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
    },
    moved_bytes=moved_bytes,
)
