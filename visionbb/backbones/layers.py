"""Layers of several families: convolutions with batch norm, as stems have them, and the MLP of tokens."""

from collections.abc import Callable, Sequence

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from ..kernels._dispatch import eager_inference
from ..mixers.conv import DepthwiseConv
from ..mixers.dropout import Dropout
from ..mixers.linear import ONEDNN_ACTS, Linear, linear, linear_act, onednn_act, onednn_infers, onednn_linear, watched
from ..mixers.slabs import in_slabs


class PointwiseConv(nn.Conv2d):
    """1x1 convolution (B, C, H, W), channels-last, as the matrix product that it is: a CPU is far faster at that."""

    def __init__(self, in_chans: int, dim: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_chans, dim, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@register_notrace_module  # asks for the device and type of its input
class ConvNormActs(nn.Sequential):
    """Convolutions, batch norms and activations one after the other, on (B, C, H, W).

    On a CPU that only infers, wide maps are taken a few images at a time. There, a convolution takes the norm after it
    into its weights, and oneDNN activates what it writes: each saves a pass over the map. Not under hooks, which are to
    see every map.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.layers(x)
        else:
            # Batch statistics are of the whole batch, and a recorded graph must not depend on its size.
            whole = self.training or not eager_inference(x)
            return self.layers(x) if whole else in_slabs(self.fused, x, self.widest(x.shape[2] * x.shape[3]))

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = module(x)
        return x

    def widest(self, size: int) -> int:
        """Numbers of the widest map inside, for an input of `size` pixels."""
        widest = 0
        for module in self:
            if isinstance(module, nn.Conv2d):
                size //= module.stride[0] * module.stride[1]
                widest = max(widest, module.out_channels * size)
        return widest

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        if watched(*self) or not onednn_infers(x, *self.parameters()):
            return self.layers(x)
        modules = list(self)
        while modules:
            module = modules.pop(0)
            if isinstance(module, nn.Conv2d):
                norm = modules.pop(0) if modules and foldable(modules[0]) else None
                act = modules.pop(0) if modules and type(modules[0]) in ONEDNN_ACTS else None
                x = conv_norm_act(x, module, norm, act)
            else:
                x = module(x)
        return x


@register_notrace_module  # asks for the device and type of its input
class MapConvNormActs(ConvNormActs):
    """`ConvNormActs` on (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        if torch.jit.is_scripting():
            return self.layers(x).permute(0, 2, 3, 1)
        else:
            return super().forward(x).permute(0, 2, 3, 1)


def conv_norm_act(
    x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, act: nn.Module | None
) -> torch.Tensor:
    """act(norm(conv(x))) in one operator, norm in evaluation; where `onednn_infers`."""
    weight, bias = conv.weight, conv.bias
    if norm is not None:
        weight, bias = folded(weight, bias, norm)
    if isinstance(conv, PointwiseConv):
        x = x.permute(0, 2, 3, 1).contiguous()
        return onednn_linear(x, weight.flatten(1), bias, onednn_act(act)).permute(0, 3, 1, 2)
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups, *onednn_act(act)
    )


def foldable(norm: nn.Module) -> bool:
    """Whether a layer is a batch norm with fixed statistics and with weights."""
    return type(norm) is nn.BatchNorm2d and not norm.training and norm.running_mean is not None and norm.affine


def folded(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, ...) and bias (out,) of a layer to those of the layer with a batch norm, in evaluation, after it."""
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * gain
    return weight * gain.view(-1, *[1] * (weight.ndim - 1)), shift if bias is None else shift + bias * gain


def conv_norm_acts(
    in_chans: int,
    layers: Sequence[tuple[int, int, int]],
    act_layer: Callable[[], nn.Module],
    bias: bool = True,
    device=None,
    dtype=None,
) -> "ConvNormActs":
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
    return ConvNormActs(*modules[:-1])


def init_convs(model: nn.Module) -> None:
    """Convolutions as linear layers are initialised: truncated normal of deviation 0.02, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, DepthwiseConv)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@register_notrace_module  # slabs by the number of tokens
class TokenMlp(nn.Module):
    """fc2(act(fc1(x))) on (..., dim), wide maps in slabs of tokens on a CPU that only infers.

    There, writing and reading the hidden layer of a large map costs more than its activation.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.fc1 = Linear(dim, hidden, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = Dropout(drop)
        self.fc2 = Linear(hidden, dim, device=device, dtype=dtype)
        self.drop2 = Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.layers(x)
        else:
            return in_slabs(self.layers, x.flatten(0, -2), self.fc1.out_features).view(x.shape)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            x = self.act(self.fc1(x))
        else:
            x = linear_act(x, self.fc1, self.act)
        return self.drop2(self.fc2(self.drop1(x)))
