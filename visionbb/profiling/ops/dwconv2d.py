"""Depthwise convolution with bias (and residual) on channels-last maps: ours, and PyTorch's convolution in two layouts.

All get x (B, H, W, C), weight (C, 1, k, k) and bias (C,), and return (B, H, W, C).

- channels_last: F.conv2d on the permuted map, which is channels-last memory: what one would write;
- nchw: F.conv2d on a contiguous NCHW copy, and the result copied back: what it costs in a network of NHWC maps.
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
    side: int
    channels: int
    kernel: int
    dilation: int = 1
    residual: bool = False

    def __str__(self) -> str:
        return (
            f"{self.side}x{self.side} c{self.channels} k{self.kernel} d{self.dilation}" + " residual" * self.residual
        )


def inputs(case: Case, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = (
        (batch_size, case.side, case.side, case.channels), (case.channels, 1, case.kernel, case.kernel),
        (case.channels,),
    )
    return tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)


def ours(case: Case, device: torch.device | None = None):
    def convolution(x, weight, bias):
        return kernels.dwconv2d(x, weight, bias, dilation=case.dilation, residual=case.residual)

    return convolution


def triton(case: Case, device: torch.device):
    if device.type != "cuda" or not has_triton():
        raise Unavailable("needs CUDA and triton")
    return ours(case)


def channels_last(case: Case, device: torch.device):
    def convolution(x, weight, bias):
        return _conv2d(case, x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)

    return convolution


def nchw(case: Case, device: torch.device):
    def convolution(x, weight, bias):
        x = x.permute(0, 3, 1, 2).contiguous()
        return _conv2d(case, x, weight, bias).permute(0, 2, 3, 1).contiguous()

    return convolution


def _conv2d(case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    padding = case.kernel // 2 * case.dilation
    out = F.conv2d(x, weight, bias, padding=padding, dilation=case.dilation, groups=case.channels)
    return x + out if case.residual else out


def moved_bytes(case: Case, batch_size: int, element: int) -> int:
    """The map read, and written once."""
    return 2 * batch_size * case.side**2 * case.channels * element


BENCH = OpBench(
    # Positional, local and MLP convolutions of RAVLT-Tiny at 224 pixels; larger kernels, and VAN's dilated ones.
    cases=tuple(Case(*c) for c in [
        (56, 64, 3, 1, True), (56, 64, 5), (56, 224, 3, 1, True), (28, 128, 5), (14, 256, 5), (7, 512, 5),
        (56, 64, 7), (14, 256, 7), (56, 64, 7, 3), (28, 128, 7, 3), (14, 256, 7, 3), (7, 512, 7, 3),
    ]),
    inputs=inputs,
    batched=1,
    reference=ours,
    contestants={
        "channels_last": Contestant(channels_last),
        "nchw": Contestant(nchw),
        "portable": Contestant(ours, backend="portable"),
        "triton": Contestant(triton, backend="triton"),
    },
    moved_bytes=moved_bytes,
)
