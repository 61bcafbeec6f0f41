"""EfficientVMamba: scans that skip tokens, beside convolutions; only convolutions where maps are small.

Paper: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, https://arxiv.org/abs/2403.09977
Authors' code and weights: https://github.com/TerryPei/EfficientVMamba (Apache-2.0)

VMamba walks the whole map four times. Here each of the four routes walks a quarter of it, every second token of every
second row, so that a token is scanned once; a depthwise convolution beside the scan sees the neighbours that the routes
skip. Global mixing pays where maps are large: the last two stages are MobileNetV2's inverted bottlenecks.

Differences to the authors' code: downsampling stands at the start of a stage; the stem pads images to whole patches,
where theirs cuts off what is left.
"""
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ..backbones import Pyramid, keep_native, renamed
from ..backbones.layers import PointwiseConv
from ..mixers import SS2D, ChannelAttention, DepthwiseConv
from ._registry import create_from, imagenet_cfg, register_variants
from .vmamba import PatchStem
from .vmamba import checkpoint_filter_fn as vmamba_filter_fn

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints, those of VMamba's first release and some more, to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"\.conv_branch\.0\.", ".conv."),
        (r"\.conv_branch\.1\.", ".conv_norm."),
        (r"\.conv_branch\.3\.", ".conv_pw."),
        (r"(\.blocks\.\d+)\.se\.", r"\1.attn."),
        (r"\.global_reduce\.", ".fc1."),
        (r"\.channel_select\.", ".fc2."),
        # The last stages: bottlenecks between two permutations, then downsampling.
        (r"^(layers\.\d+)\.\d+\.(reduction|norm)\.", r"\1.downsample.\2."),
        (r"^(layers\.\d+)\.(\d+)\.(conv|se)", lambda m: f"{m[1]}.blocks.{int(m[2]) - 1}.bottleneck.{m[3]}"),
        (r"\.conv_pw\.1\.", ".bn1."),
        (r"\.conv_dw\.1\.", ".bn2."),
        (r"\.conv_pw2\.1\.", ".bn3."),
        (r"\.conv_pw2\.0\.", ".conv_pwl."),
        (r"\.(conv_pw|conv_dw)\.0\.", r".\1."),
    ]
    out = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")  # wrapped twice
        key = renamed(key, renames)
        out[key] = value
    return vmamba_filter_fn(out, model)


class ScanConvBlock(nn.Module):
    """x + drop_path(attn(mixer(h)) + attn(conv(h))) with h = norm(x): a scan and a convolution side by side.

    On (B, H, W, dim); the same attention over channels serves both.
    """

    def __init__(self, dim: int, d_state: int, step: int, drop_path: float, proj_drop: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = Norm(dim, **dd)
        self.mixer = SS2D(
            dim, d_state, 2.0, conv_bias=True, gate=True, routes=(f"atrous{step}",), merge="scatter",
            proj_drop=proj_drop, **dd,
        )
        self.conv = DepthwiseConv(dim, 3, **dd)
        self.conv_norm = nn.BatchNorm2d(dim, **dd)
        self.conv_pw = PointwiseConv(dim, dim, **dd)
        self.attn = ChannelAttention(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        local = F.gelu(self.conv_norm(self.conv(h).permute(0, 3, 1, 2)))
        local = self.conv_pw(local).permute(0, 2, 3, 1)
        return x + self.drop_path1(self.attn(self.mixer(h)) + self.attn(local))


class ConvBlock(nn.Module):
    """MobileNetV2's inverted bottleneck, four times as wide inside, with squeeze and excitation: on (B, H, W, dim)."""

    def __init__(self, dim: int, drop_path: float, device=None, dtype=None):
        super().__init__()
        self.bottleneck = InvertedResidual(
            dim, dim, exp_ratio=4.0, se_layer=partial(SqueezeExcite, rd_ratio=0.125), drop_path_rate=drop_path,
            device=device, dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientVMamba(Pyramid):
    """EfficientVMamba.

    Args:
        embed_dim: width of the first stage, a multiple of 8, doubled by each of the others.
        depths: per stage.
        d_state: numbers the state of a channel is made of.
        scan_stages: how many stages, from the first, have scans; the others have inverted bottlenecks.
        step: from one token of a route to the next, along both axes.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout after the scans.

    Raises:
        ValueError: embed_dim is no multiple of 8.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 4, 2),
        d_state: int = 16,
        scan_stages: int = 2,
        step: int = 2,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if embed_dim % 8:
            raise ValueError(f"embed_dim must be a multiple of 8, got {embed_dim}")

        def block(stage: int, index: int, dim: int, drop_path: float) -> nn.Module:
            if stage < scan_stages:
                return ScanConvBlock(dim, d_state, step, drop_path, proj_drop_rate, **dd)
            return ConvBlock(dim, drop_path, **dd)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=PatchStem(in_chans, embed_dim, **dd),
            downsample=partial(PatchMerging, norm_layer=Norm, **dd),
            block=block,
            norm=Norm(dims[-1], **dd),
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "efficient_vmamba_tiny": dict(embed_dim=48, depths=(2, 2, 4, 2), drop_path_rate=0.1),
    "efficient_vmamba_small": dict(embed_dim=64, depths=(2, 2, 4, 2), drop_path_rate=0.1),
    "efficient_vmamba_base": dict(embed_dim=96, depths=(2, 2, 9, 2), drop_path_rate=0.1),
}

default_cfgs = generate_default_cfgs({
    f"{variant}.in1k": imagenet_cfg(
        first_conv="stem.conv1", paper_ids="arXiv:2403.09977", origin_url="https://github.com/TerryPei/EfficientVMamba",
    )
    for variant in VARIANTS
})


register_variants(__name__, VARIANTS, create_from(EfficientVMamba))
