"""The pre-norm residual block: token mixing, then channel mixing."""

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp
from torch import nn


class Block(nn.Module):
    """x + drop_path(ls1(mixer(norm1(x)))), then the same with an MLP, on (B, H, W, dim).

    Args:
        mixer: token mixer, (B, H, W, dim) -> (B, H, W, dim).
        mlp_ratio: hidden width of the MLP over dim.
        layer_scale: initial value of the residual branches' per-channel gains (CaiT, equation 4); None for no gains.
        drop_path: probability of dropping a residual branch, per sample.
        proj_drop: dropout after both linear layers of the MLP.
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
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def gain() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer
        self.ls1 = gain()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = gain()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
