"""Selective scans of a map along several routes: ours, and what one would write without it.

All get x (B, H, W, D), its projection (B, H, W, K * (R + 2 N)), and the parameters of the scans; they return the sum of
the routes, (B, H, W, D) in float32. Route tables are made before the clock starts.

- loop: the definition, every route gathered and scanned step by step, gradients by autograd;
- doubling: every route gathered, all steps at once in log2(L) rounds (the form of exported graphs).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from visionbb import kernels
from visionbb.kernels.scan import portable

from ..op_bench import Contestant, OpBench, Unavailable


@dataclass(frozen=True)
class Case:
    side: int
    channels: int
    states: int = 1
    rank: int = 6
    routes: str = "cross"

    def __str__(self) -> str:
        return f"{self.side}x{self.side} d{self.channels} n{self.states} r{self.rank} {self.routes}"

    def table(self, device: torch.device) -> torch.Tensor:
        return kernels.scan_routes(self.routes, self.side, self.side, device=device)


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Parameters as VMamba initialises them, in float32."""
    K, D, N, R = len(case.table(torch.device("cpu"))), case.channels, case.states, case.rank
    tokens = batch_size, case.side, case.side
    dt = torch.exp(torch.empty(K, D).uniform_(-6.9, -2.3))
    values = (
        torch.randn(*tokens, D, dtype=dtype),
        torch.randn(*tokens, K * (R + 2 * N), dtype=dtype),
        torch.empty(K, D, R).uniform_(-(R**-0.5), R**-0.5),
        dt + torch.log(-torch.expm1(-dt)),
        -torch.arange(1.0, N + 1).repeat(K, D, 1),
        torch.ones(K, D),
    )
    return tuple(value.to(device).requires_grad_() for value in values)


def ours(case: Case, device: torch.device | None = None):
    def scan(*tensors):
        return kernels.ss2d(*tensors, case.table(tensors[0].device))

    return scan


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not kernels.has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def doubling(case: Case, device: torch.device):
    def scan(*tensors):
        return portable.exportable_ss2d(*tensors, case.table(tensors[0].device), "sum", "all")

    return scan


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """x and its projection read, the result written in float32."""
    K = len(case.table(torch.device("cpu")))
    read = element * (case.channels + K * (case.rank + 2 * case.states))
    return batch_size * case.side**2 * (read + 4 * case.channels)


BENCH = OpBench(
    # The stages of VMamba-Tiny (s1l8) at 224 pixels, and the first one of its vanilla form.
    cases=tuple(Case(*c) for c in [(56, 96), (28, 192, 1, 12), (14, 384, 1, 24), (7, 768, 1, 48), (56, 192, 16)]),
    inputs=inputs,
    batched=2,
    reference=ours,
    contestants={
        "loop": Contestant(ours, backend="reference"),
        "doubling": Contestant(doubling),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
    },
    moved_bytes=moved_bytes,
)
