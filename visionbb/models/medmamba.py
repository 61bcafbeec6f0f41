"""MedMamba: convolutions on half of the channels, 2-D selective scans on the other half.

Paper: MedMamba: Vision Mamba for Medical Image Classification, https://arxiv.org/abs/2403.03849
Authors' code: https://github.com/YubiaoYue/MedMamba (weights for medical data sets only)

Convolutions see texture, scans see the whole image; medical images need both. A block splits its channels, gives one
half to two 3x3 convolutions and the other to VMamba's gated scan, and shuffles the halves together. Stem, downsampling
and scan are those of vanilla VMamba.

Differences to the authors' code: downsampling stands at the start of a stage; odd maps are padded before it, where
theirs lose a row or column.
"""
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ..backbones import Pyramid
from ..backbones.layers import PointwiseConv
from ..mixers import SS2D, DepthwiseConv
from ._registry import create_from, imagenet_cfg, register_variants
from .vmamba import PatchStem
from .vmamba import checkpoint_filter_fn as vmamba_filter_fn

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints, which are those of VMamba's first release, to ours."""
    found = vmamba_filter_fn(state_dict, model)
    return {key.replace(".conv33conv33conv11.", ".convs."): value for key, value in found.items()}


class ConvScanBlock(nn.Module):
    """x + shuffle(convs(left half of x), drop_path(mixer(norm(right half)))), on (B, H, W, dim) of even dim."""

    def __init__(self, dim: int, d_state: int, drop_path: float, proj_drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        half = dim // 2
        self.convs = nn.Sequential(
            nn.BatchNorm2d(half, **dd),
            nn.Conv2d(half, half, 3, 1, 1, **dd),
            nn.BatchNorm2d(half, **dd),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, 1, 1, **dd),
            nn.BatchNorm2d(half, **dd),
            nn.ReLU(),
            PointwiseConv(half, half, **dd),
            nn.ReLU(),
        )
        self.norm1 = Norm(half, **dd)
        self.mixer = SS2D(half, d_state, 2.0, conv_bias=True, gate=True, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        left = self.convs(left.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        right = self.drop_path1(self.mixer(self.norm1(right)))
        return x + torch.stack((left, right), -1).flatten(-2)  # channels of the halves by turns


class MedMamba(Pyramid):
    """MedMamba.

    Args:
        embed_dim: even width of the first stage, doubled by each of the others.
        depths: per stage.
        d_state: numbers the state of a channel is made of.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout after the scans.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 4, 2),
        d_state: int = 16,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even, got {embed_dim}")
        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=PatchStem(in_chans, embed_dim, **dd),
            downsample=partial(PatchMerging, norm_layer=Norm, **dd),
            block=lambda stage, index, dim, drop_path: ConvScanBlock(dim, d_state, drop_path, proj_drop_rate, **dd),
            norm=nn.Identity(),
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DepthwiseConv)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "medmamba_tiny": dict(embed_dim=96, depths=(2, 2, 4, 2), drop_path_rate=0.1),
    "medmamba_small": dict(embed_dim=96, depths=(2, 2, 8, 2), drop_path_rate=0.1),
    "medmamba_base": dict(embed_dim=128, depths=(2, 2, 12, 2), drop_path_rate=0.1),
}

default_cfgs = generate_default_cfgs({
    f"{variant}.untrained": imagenet_cfg(
        first_conv="stem.conv1", paper_ids="arXiv:2403.03849", origin_url="https://github.com/YubiaoYue/MedMamba",
    )
    for variant in VARIANTS
})


register_variants(__name__, VARIANTS, create_from(MedMamba))
