"""Convolutions with batch norm, what the stems of several families are made of."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from ..mixers.conv import DepthwiseConv


class PointwiseConv(nn.Conv2d):
    """1x1 convolution (B, C, H, W), channels-last, as the matrix product that it is: a CPU is far faster at that."""

    def __init__(self, in_chans: int, dim: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_chans, dim, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def conv_norm_acts(
    in_chans: int,
    layers: Sequence[tuple[int, int, int]],
    act_layer: Callable[[], nn.Module],
    bias: bool = True,
    device=None,
    dtype=None,
) -> nn.Sequential:
    """Convolution, batch norm and activation by turns, on (B, C, H, W); none of the last is activated.

    Args:
        layers: (width, kernel size, stride) of each convolution; padded by half the kernel.
    """
    dd = {"device": device, "dtype": dtype}
    modules = []
    for width, kernel_size, stride in layers:
        if kernel_size == 1:
            modules += [PointwiseConv(in_chans, width, bias, **dd)]
        else:
            modules += [nn.Conv2d(in_chans, width, kernel_size, stride, kernel_size // 2, bias=bias, **dd)]
        modules += [nn.BatchNorm2d(width, **dd), act_layer()]
        in_chans = width
    return nn.Sequential(*modules[:-1])


def init_convs(model: nn.Module) -> None:
    """Convolutions as linear layers are initialised: truncated normal of deviation 0.02, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, DepthwiseConv)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
