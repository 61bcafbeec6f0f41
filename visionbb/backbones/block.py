"""The pre-norm residual block: token mixing, then channel mixing."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, RmsNorm
from timm.models import register_notrace_module
from torch import nn

from ..mixers.conv import DepthwiseConv
from ..mixers.dropout import Dropout
from ..mixers.linear import Linear, linear_act
from ..mixers.slabs import in_slabs
from .layers import TokenMlp


@register_notrace_module  # slabs by the size of the map
class ConvMlp(nn.Module):
    """fc2(u + conv(u)) with u = act(fc1(x)) and a depthwise convolution, on (B, H, W, dim).

    `act_last`: fc2(act(u + conv(u))) with u = fc1(x). Wide maps are taken a few images at a time, as `TokenMlp` takes
    tokens.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        kernel_size: int = 3,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        act_last: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.act_last = act_last
        self.fc1 = Linear(dim, hidden, **dd)
        self.act = act_layer()
        self.drop1 = Dropout(drop)
        self.conv = DepthwiseConv(hidden, kernel_size, residual=True, **dd)
        self.fc2 = Linear(hidden, dim, **dd)
        self.drop2 = Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.layers(x)
        else:
            return in_slabs(self.layers, x, 2 * x.shape[1] * x.shape[2] * self.fc1.out_features)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        if self.act_last:
            x = self.drop1(self.act(self.conv(self.fc1(x))))
        elif torch.jit.is_scripting():
            x = self.conv(self.drop1(self.act(self.fc1(x))))
        else:
            x = self.conv(self.drop1(linear_act(x, self.fc1, self.act)))
        return self.drop2(self.fc2(x))


class Residual(nn.Module):
    """x + gamma * y in one pass over the map, gamma (dim,) starting at `layer_scale`; x + y where that is None."""

    def __init__(self, dim: int, layer_scale: float | None = None, device=None, dtype=None):
        super().__init__()
        self.layer_scale = layer_scale
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.layer_scale)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if self.gamma is None else torch.addcmul(x, y, self.gamma)


class Block(nn.Module):
    """x + gamma * drop_path(mixer(norm1(x))), then the same with an MLP, on (B, H, W, dim).

    Args:
        mixer: token mixer, (B, H, W, dim) -> (B, H, W, dim).
        mlp_ratio: hidden width of the MLP over dim.
        layer_scale: initial value of the residual branches' per-channel gains (CaiT, equation 4); None for no gains.
        drop_path: probability of dropping a residual branch, per sample.
        proj_drop: dropout after both linear layers of the MLP.
        cpe1, cpe2: kernel sizes of convolutional position encodings x + depthwise(x) (CPVT, arXiv 2102.10882) before
            the mixer's branch and before the MLP's; 0 for none, or a module in their place.
        mlp_conv: kernel size of a depthwise convolution with residual inside the MLP; 0 for none, or a module in place
            of the MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        cpe1: int | nn.Module = 0,
        cpe2: int | nn.Module = 0,
        mlp_conv: int | nn.Module = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def position(cpe: int | nn.Module) -> nn.Module:
            if isinstance(cpe, nn.Module):
                return cpe
            return DepthwiseConv(dim, cpe, residual=True, **dd) if cpe else nn.Identity()

        self.cpe1 = position(cpe1)
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls1 = Residual(dim, layer_scale, **dd)
        self.cpe2 = position(cpe2)
        self.norm2 = norm_layer(dim, **dd)
        hidden = int(dim * mlp_ratio)
        if isinstance(mlp_conv, nn.Module):
            self.mlp = mlp_conv
        elif mlp_conv:
            self.mlp = ConvMlp(dim, hidden, mlp_conv, act_layer, proj_drop, **dd)
        else:
            self.mlp = TokenMlp(dim, hidden, act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls2 = Residual(dim, layer_scale, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cpe1(x)
        x = self.ls1(x, self.drop_path1(self.mixer(self.norm1(x))))
        x = self.cpe2(x)
        return self.ls2(x, self.drop_path2(self.mlp(self.norm2(x))))


class MixerBlock(nn.Module):
    """x + drop_path(mixer(norm1(x))) on (B, H, W, dim): Mamba's block, whose mixer has the channel mixing inside."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path1(self.mixer(self.norm1(x)))


@register_notrace_module  # prefix tokens and the size of the map
class TokenBlock(Block):
    """A `Block` on a sequence, (B, P + H * W, dim): P prefix tokens, then those of the map, row by row.

    The mixer's `forward_tokens(x, H, W)` tells the two apart; all else treats tokens alike, so positional convolutions
    have no place here.
    """

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = self.ls1(x, self.drop_path1(self.mixer.forward_tokens(self.norm1(x), H, W)))
        return self.ls2(x, self.drop_path2(self.mlp(self.norm2(x))))


@register_notrace_module  # the type of the stream
class TokenMixerBlock(MixerBlock):
    """A `MixerBlock` on a sequence with prefix tokens, as `TokenBlock` is a `Block`; the sum is float32 at least."""

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        y = self.drop_path1(self.mixer.forward_tokens(self.norm1(x), H, W))
        return x.to(torch.promote_types(x.dtype, torch.float32)) + y


class StreamNorm(RmsNorm):
    """RMSNorm (eps 1e-5) of a float32 residual stream, in the type of the parameters."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
