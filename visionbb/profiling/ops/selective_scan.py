"""Mamba's selective scan of a sequence: ours, what one would write without it, and mamba-ssm.

All get u, delta (B, L, D), B, C (B, L, N), the gate z (B, L, D), and A (D, N), D and delta_bias (D,), and return
(B, L, D).

- loop: the definition, step by step, gradients by autograd;
- doubling: all steps at once in log2(L) rounds (the form of exported graphs);
- mamba_ssm: the CUDA kernel of that package, if installed, with the copies to its layout and back.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from visionbb import kernels
from visionbb.kernels.scan import portable

from ..op_bench import Contestant, OpBench, Unavailable


@dataclass(frozen=True)
class Case:
    length: int
    channels: int
    states: int = 16

    def __str__(self) -> str:
        return f"l{self.length} d{self.channels} n{self.states}"


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """u, delta, B, C, z, A, D, delta_bias; the parameters as Mamba initialises them, in float32."""
    tokens, channels, states = (batch_size, case.length), case.channels, case.states
    dt = torch.exp(torch.empty(channels).uniform_(-6.9, -2.3))
    widths = channels, channels, states, states, channels
    values = (
        *(torch.randn(*tokens, width, dtype=dtype) for width in widths),
        -torch.arange(1.0, states + 1).repeat(channels, 1),
        torch.ones(channels),
        dt + torch.log(-torch.expm1(-dt)),
    )
    return tuple(value.to(device).requires_grad_() for value in values)


def ours(case: Case, device: torch.device | None = None):
    def scan(u, delta, B, C, z, A, D, bias):
        return kernels.selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)

    return scan


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not kernels.has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def doubling(case: Case, device: torch.device):
    def scan(u, delta, B, C, z, A, D, bias):
        y, _ = portable.exportable_selective_scan(u, delta, A, B[:, :, None], C[:, :, None], D, bias, True, False)
        return (y * F.silu(z.to(y.dtype))).to(u.dtype)

    return scan


def mamba_ssm(case: Case, device: torch.device):
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise Unavailable(f"mamba_ssm cannot be imported: {error}") from error
    if device.type != "cuda":
        raise Unavailable("mamba_ssm needs CUDA")

    def scan(u, delta, B, C, z, A, D, bias):
        u, delta, B, C, z = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z))
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2).contiguous()

    return scan


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """The five sequences read, the result written."""
    return element * batch_size * case.length * (4 * case.channels + 2 * case.states)


BENCH = OpBench(
    # One direction of Vim-Tiny and Vim-Small at 224 pixels; MambaVision-Tiny's two stages.
    cases=tuple(Case(*c) for c in [(197, 384), (197, 768), (196, 160, 8), (49, 320, 8)]),
    inputs=inputs,
    batched=5,
    reference=ours,
    contestants={
        "loop": Contestant(ours, backend="reference"),
        "doubling": Contestant(doubling),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
        "mamba_ssm": Contestant(mamba_ssm),
    },
    moved_bytes=moved_bytes,
)
