"""Depthwise convolution on NHWC maps."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn


@register_notrace_module  # asks for the dtypes of its input and output
class DepthwiseConv(nn.Module):
    """Depthwise convolution of stride 1 that keeps the map, (B, H, W, dim) of any H, W.

    Args:
        kernel_size: odd.
        repeats: neighbouring groups of dim / repeats channels (heads) that share one kernel.
        residual: add the input: the positional convolution x + conv(x).
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        repeats: int = 1,
        residual: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if dim % repeats:
            raise ValueError(f"dim must be a multiple of repeats, got {dim} and {repeats}")
        self.kernel_size = kernel_size
        self.repeats = repeats
        self.residual = residual
        self.weight = nn.Parameter(torch.empty(dim // repeats, 1, kernel_size, kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(dim // repeats, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv2d`: uniform in +-1 / sqrt(kernel area)."""
        bound = 1 / self.kernel_size
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if self.repeats > 1:
            weight, bias = weight.repeat(self.repeats, 1, 1, 1), bias.repeat(self.repeats)
        # A permuted NHWC tensor is NCHW in channels-last memory: no copy, and the fast layout of depthwise kernels.
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=self.kernel_size // 2, groups=x.shape[-1])
        y = y.permute(0, 2, 3, 1)
        if not self.residual:
            return y
        # In place where autocast has not narrowed y: fresh memory for a large map costs more than the addition.
        return y.add_(x) if y.dtype == x.dtype else x + y

    def extra_repr(self) -> str:
        return f"{self.repeats} x {len(self.bias)}, kernel_size={self.kernel_size}, residual={self.residual}"
