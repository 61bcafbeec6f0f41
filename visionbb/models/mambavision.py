"""MambaVision: convolutions first, then stages that begin with Mamba mixers and end with attention.

Paper: MambaVision: A Hybrid Mamba-Transformer Vision Backbone, https://arxiv.org/abs/2407.08083
Authors' code and weights: https://github.com/NVlabs/MambaVision (code: NVIDIA Source Code License-NC; weights:
CC-BY-NC-SA-4.0, no commercial use)

Large maps are for fast convolutions. In the two later stages, the first half of the blocks mixes tokens by a scan
beside a branch without one, and the second half by attention, which mends what a scan in one direction has lost: the
order that the paper's comparison of hybrids favours. Both work inside windows, which at 224 pixels are the whole map.

Differences to the authors' code: downsampling stands at the start of a stage; their time steps have their bias twice,
before and in the scan, ours once, so that checkpoints load with the biases doubled.
"""
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Block, Pyramid, Stage, keep_native, renamed
from ..mixers import MambaVisionMixer, SoftmaxAttention
from ..mixers.window import from_windows, to_windows
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours, and doubles the biases of time steps."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^patch_embed\.conv_down\.0\.", "stem.conv1."),
        (r"^patch_embed\.conv_down\.1\.", "stem.norm1."),
        (r"^patch_embed\.conv_down\.3\.", "stem.conv2."),
        (r"^patch_embed\.conv_down\.4\.", "stem.norm2."),
        (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
        (r"^levels\.", "stages."),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.mixer\.conv1d_z\.", ".mixer.conv."),
        (r"\.mixer\.conv1d_x\.", ".mixer.s6.conv."),
        (r"\.mixer\.(A_log|D|x_proj|dt_proj)\b", r".mixer.s6.\1"),
        (r"\.(x_proj|dt_proj)\.weight$", r".\1"),
        (r"\.dt_proj\.bias$", ".dt_bias"),
        (r"^norm\.", "norm.bn."),
        (r"^head\.", "head.fc."),
    ]
    out = {}
    for key, value in state_dict.items():
        key = renamed(key, renames)
        out[key] = 2 * value if key.endswith(".dt_bias") else value
    return out


class MapNorm(nn.Module):
    """Batch norm on (B, H, W, dim)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/4, W/4, dim): two 3x3 convolutions of stride 2, batch norm, ReLU."""

    def __init__(self, in_chans: int, hidden: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, hidden, 3, 2, 1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, eps=1e-4, **dd)
        self.conv2 = nn.Conv2d(hidden, dim, 3, 2, 1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last from the first layer on, so that none of the large early maps is ever transposed.
        x = F.relu(self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        return F.relu(self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """x + drop_path(norm2(conv2(gelu(norm1(conv1(x)))))) with 3x3 convolutions, on (B, H, W, dim)."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.conv1(x.permute(0, 3, 1, 2))))
        return x + self.drop_path(self.norm2(self.conv2(y))).permute(0, 2, 3, 1)


class WindowStage(Stage):
    """A stage whose blocks run on windows (B * windows, window_size, window_size, C) that tile the map.

    Where windows overhang, they have tokens of zeros there, which all blocks mix and change like any others, and which
    are dropped at the end of the stage.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window_size: int):
        super().__init__(downsample, blocks)
        self.window_size = window_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        H, W = x.shape[1], x.shape[2]
        x = self.run_blocks(to_windows(x, self.window_size, self.window_size))
        return from_windows(x, H, W)


class MambaVision(Pyramid):
    """MambaVision.

    Args:
        stem_dim: width of the stem's first convolution.
        embed_dim: width of the first stage, doubled by each of the others.
        depths: per stage.
        num_heads: per stage; must divide the widths of those with windows.
        window_size: per stage, the side of the windows that its mixers work in; 0 for a stage of convolutions.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        layer_scale: initial gain of the mixers' and the MLPs' branches; None for no gains.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout in MLPs and after the mixers.

    Raises:
        ValueError: an odd width, or one that the number of heads does not divide.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        embed_dim: int = 80,
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: Sequence[int] = (0, 0, 14, 7),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(stage: int, index: int, dim: int, drop_path: float) -> nn.Module:
            if not window_size[stage]:
                return ConvBlock(dim, drop_path, **dd)
            if 2 * index < depths[stage]:
                mixer = MambaVisionMixer(dim, proj_drop=proj_drop_rate, **dd)
            else:
                mixer = SoftmaxAttention(dim, num_heads[stage], proj_drop=proj_drop_rate, **dd)
            return Block(dim, mixer, mlp_ratio, layer_scale, drop_path, proj_drop_rate, Norm, **dd)

        def stage(index: int, downsample: nn.Module, blocks: Sequence[nn.Module]) -> Stage:
            size = window_size[index]
            return WindowStage(downsample, blocks, size) if size else Stage(downsample, blocks)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=ConvStem(in_chans, stem_dim, embed_dim, **dd),
            downsample=partial(ConvDownsample, **dd),
            block=block,
            stage=stage,
            norm=MapNorm(dims[-1], **dd),
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

_BASE = dict(stem_dim=64, depths=(3, 3, 10, 5), layer_scale=1e-5, drop_path_rate=0.3)
_LARGE = dict(embed_dim=196, num_heads=(4, 8, 16, 32))

VARIANTS = {
    "mambavision_tiny": dict(stem_dim=32, embed_dim=80, depths=(1, 3, 8, 4), drop_path_rate=0.2),
    "mambavision_tiny2": dict(stem_dim=32, embed_dim=80, depths=(1, 3, 11, 4), drop_path_rate=0.2),
    "mambavision_small": dict(stem_dim=64, embed_dim=96, depths=(3, 3, 7, 5), drop_path_rate=0.2),
    "mambavision_base": dict(_BASE, embed_dim=128),
    "mambavision_large": dict(_BASE, **_LARGE),
    "mambavision_large2": dict(_BASE, **_LARGE) | dict(depths=(3, 3, 12, 5)),
    "mambavision_large3": dict(_BASE, **_LARGE) | dict(embed_dim=256, depths=(3, 3, 20, 10), drop_path_rate=0.5),
}

# At other resolutions than 224 windows are larger; the third and the fourth stage's are whole maps everywhere.
_WINDOWS = {256: (0, 0, 16, 8), 512: (0, 0, 32, 16)}

# tag: file, input size, crop_pct
_FILES = {
    "mambavision_tiny.in1k": ("MambaVision-T-1K/resolve/main/mambavision_tiny_1k", 224, 1.0),
    "mambavision_tiny2.in1k": ("MambaVision-T2-1K/resolve/main/mambavision_tiny2_1k", 224, 0.98),
    "mambavision_small.in1k": ("MambaVision-S-1K/resolve/main/mambavision_small_1k", 224, 0.93),
    "mambavision_base.in1k": ("MambaVision-B-1K/resolve/main/mambavision_base_1k", 224, 1.0),
    "mambavision_base.in21k_ft_in1k": ("MambaVision-B-21K/resolve/main/mambavision_base_21k", 224, 1.0),
    "mambavision_large.in1k": ("MambaVision-L-1K/resolve/main/mambavision_large_1k", 224, 1.0),
    "mambavision_large.in21k_ft_in1k": ("MambaVision-L-21K/resolve/main/mambavision_large_21k", 224, 1.0),
    "mambavision_large2.in1k": ("MambaVision-L2-1K/resolve/main/mambavision_large2_1k", 224, 1.0),
    "mambavision_large2.in21k_ft_in1k_512": (
        "MambaVision-L2-512-21K/resolve/main/mambavision_L2_21k_240m_512", 512, 0.93
    ),
    "mambavision_large3.in21k_ft_in1k_256": (
        "MambaVision-L3-256-21K/resolve/main/mambavision_L3_21k_740m_256", 256, 1.0
    ),
    "mambavision_large3.in21k_ft_in1k_512": (
        "MambaVision-L3-512-21K/resolve/main/mambavision_L3_21k_740m_512", 512, 0.93
    ),
}

default_cfgs = generate_default_cfgs({
    tag: imagenet_cfg(
        f"https://huggingface.co/nvidia/{file}.pth.tar", input_size=(3, size, size), pool_size=(size // 32, size // 32),
        crop_pct=crop_pct, crop_mode="squash" if size == 512 else "center", first_conv="stem.conv1",
        license="cc-by-nc-sa-4.0", paper_ids="arXiv:2407.08083", origin_url="https://github.com/NVlabs/MambaVision",
    )
    for tag, (file, size, crop_pct) in _FILES.items()
})


register_variants(
    __name__, VARIANTS, create_from(MambaVision),
    {tag: dict(window_size=_WINDOWS[size]) for tag, (_, size, _) in _FILES.items() if size in _WINDOWS},
)
