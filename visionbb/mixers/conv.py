"""Depthwise convolution on NHWC maps, and along sequences."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from ..kernels import dwconv2d


@register_notrace_module  # asks for the dtypes of its input and output
class DepthwiseConv(nn.Module):
    """Depthwise convolution of stride 1 that keeps the map, (B, H, W, dim) of any H, W: `visionbb.kernels.dwconv2d`.

    Args:
        kernel_size: odd, int or (height, width), at most 11.
        repeats: neighbouring groups of dim / repeats channels (heads) that share one kernel.
        residual: add the input: the positional convolution x + conv(x).
        dilation: distance between the taps.
        bias: add a learned one.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int] = 3,
        repeats: int = 1,
        residual: bool = False,
        dilation: int = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if dim % repeats:
            raise ValueError(f"dim must be a multiple of repeats, got {dim} and {repeats}")
        self.repeats = repeats
        self.residual = residual
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(dim // repeats, 1, kh, kw, **dd))
        self.bias = nn.Parameter(torch.empty(dim // repeats, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv2d`: uniform in +-1 / sqrt(kernel area)."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if self.repeats > 1:
            weight = weight.repeat(self.repeats, 1, 1, 1)
            if bias is not None:
                bias = bias.repeat(self.repeats)
        if torch.jit.is_scripting():  # the op itself knows no autocast
            weight = weight.to(x.dtype)
            if bias is not None:
                bias = bias.to(x.dtype)
            return torch.ops.visionbb.dwconv2d(x, weight, bias, self.dilation, self.residual)
        else:
            return dwconv2d(x, weight, bias, dilation=self.dilation, residual=self.residual)

    def extra_repr(self) -> str:
        channels, _, kh, kw = self.weight.shape
        return (
            f"{self.repeats} x {channels}, kernel_size=({kh}, {kw}), residual={self.residual}, dilation={self.dilation}"
        )


@register_notrace_module  # asks for the dtypes of its input and output
class SequenceConv(nn.Module):
    """Depthwise convolution along sequences, (B, L, dim) of any L: `visionbb.kernels.dwconv2d` of maps of one row.

    Args:
        kernel_size: at most 6, or 11 for "both".
        sees: "past", a token and the kernel_size - 1 before it (Mamba's causal convolution); "future", those after it,
            the last tap still being the token's own; or "both", the neighbours on either side of it.
        bias: add a learned one.

    Raises:
        ValueError: an unknown `sees`, or "both" with an even kernel_size.
    """

    def __init__(
        self, dim: int, kernel_size: int = 4, sees: str = "past", bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if sees not in ("past", "future", "both"):
            raise ValueError(f"sees must be 'past', 'future' or 'both', got {sees!r}")
        if sees == "both" and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd where a token sees both sides, got {kernel_size}")
        self.sees = sees
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(dim, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv1d`: uniform in +-1 / sqrt(kernel size)."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight, bias = x.unsqueeze(1), self.weight.unsqueeze(2), self.bias
        blind = weight.shape[3] - 1  # taps on the side that is not seen
        if self.sees == "past":
            weight = F.pad(weight, (0, blind))
        elif self.sees == "future":
            weight = F.pad(weight.flip(3), (blind, 0))
        if torch.jit.is_scripting():
            weight = weight.to(x.dtype)
            if bias is not None:
                bias = bias.to(x.dtype)
            return torch.ops.visionbb.dwconv2d(x, weight, bias, 1, False).squeeze(1)
        else:
            return dwconv2d(x, weight, bias).squeeze(1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}, sees={self.sees}"
