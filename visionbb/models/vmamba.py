"""VMamba: a pyramid of 2-D selective scans along four routes.

Paper: VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
Authors' code and weights: https://github.com/MzeroMiko/VMamba (MIT)

A recurrence sees tokens in an order, and a map has none. SS2D scans it four times, row by row and column by column from
either end, so that every token gathers from all directions in linear time, and adds up the results. The first release
("vanilla") put this into Mamba's gated block with a state of 16 numbers a channel; the released second version has one
number, no gate, and an MLP for it, and is faster by the factor that the state is smaller.

Differences to the authors' code: downsampling stands at the start of a stage; vanilla models pad images to whole
patches, where theirs cut off what is left.
"""
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ..backbones import Block, MixerBlock, PatchConv, Pyramid, keep_native, renamed
from ..mixers import SS2D
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints, early ones included, to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^patch_embed\.(0|proj)\.", "stem.conv1."),
        (r"^patch_embed\.(2|norm)\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
        (r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample"),
        (r"^layers\.", "stages."),
        (r"\.downsample\.1\.", ".downsample.conv."),
        (r"\.downsample\.3\.", ".downsample.norm."),
        (r"(\.blocks\.\d+)\.(?:norm|ln_1)\.", r"\1.norm1."),
        (r"\.(op|self_attention)\.", ".mixer."),
        (r"\.out_norm\.", ".norm."),
        (r"\.conv2d\.", ".conv."),
        (r"\.x_proj_weight$", ".x_proj"),
        (r"\.dt_projs_weight$", ".dt_proj"),
        (r"\.dt_projs_bias$", ".dt_bias"),
        (r"\.A_logs$", ".A_log"),
        (r"\.Ds$", ".D"),
        (r"^(?:classifier\.)?head\.", "head.fc."),
        (r"^classifier\.norm\.", "norm."),
    ]
    out = {}
    for key, value in state_dict.items():
        key = renamed(key, renames)
        if key.endswith((".A_log", ".D", ".dt_bias")):  # routes and channels in one axis
            value = value.reshape(4, -1, *value.shape[1:] if key.endswith(".A_log") else ())
        elif key.endswith(("proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")):
            value = value.flatten(1)  # linear layers, some stored as 1x1 convolutions
        out[key] = value
    return out


class ConvStem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/4, W/4, dim): two 3x3 convolutions of stride 2, each normed."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = Norm(dim // 2, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = Norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last from the first layer on, so that none of the large early maps is ever transposed.
        x = self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = F.gelu(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/4, W/4, dim): a linear layer of 4x4 patches, normed."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = PatchConv(in_chans, dim, 4, **dd)
        self.norm1 = Norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, normed, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        self.norm = Norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMamba(Pyramid):
    """VMamba.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths: per stage.
        vanilla: the first release: Mamba's gated block without an MLP, its state of 16 numbers, convolutions with a
            bias, patches side by side in stem and downsampling.
        ssm_ratio: width of the scan over that of the tokens.
        mlp_ratio: hidden width of the MLPs over that of the tokens; "vanilla" has none.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout in MLPs and after the scans.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        vanilla: bool = False,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(stage: int, index: int, dim: int, drop_path: float) -> nn.Module:
            if vanilla:
                mixer = SS2D(dim, 16, ssm_ratio, conv_bias=True, gate=True, proj_drop=proj_drop_rate, **dd)
                return MixerBlock(dim, mixer, drop_path, Norm, **dd)
            mixer = SS2D(dim, 1, ssm_ratio, proj_drop=proj_drop_rate, **dd)
            return Block(dim, mixer, mlp_ratio, None, drop_path, proj_drop_rate, Norm, **dd)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=(PatchStem if vanilla else ConvStem)(in_chans, embed_dim, **dd),
            downsample=partial(PatchMerging, norm_layer=Norm, **dd) if vanilla else partial(ConvDownsample, **dd),
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

_VANILLA = dict(vanilla=True, ssm_ratio=2.0)

# The plain names are the authors' s1l8 and s1l20 (scan ratio 1, so many layers in the third stage).
VARIANTS = {
    "vmamba_tiny": dict(embed_dim=96, depths=(2, 2, 8, 2), drop_path_rate=0.2),
    "vmamba_small": dict(embed_dim=96, depths=(2, 2, 20, 2), drop_path_rate=0.3),
    "vmamba_base": dict(embed_dim=128, depths=(2, 2, 20, 2), drop_path_rate=0.5),
    "vmamba_tiny_s2l5": dict(embed_dim=96, depths=(2, 2, 5, 2), ssm_ratio=2.0, drop_path_rate=0.2),
    "vmamba_small_s2l15": dict(embed_dim=96, depths=(2, 2, 15, 2), ssm_ratio=2.0, drop_path_rate=0.3),
    "vmamba_base_s2l15": dict(embed_dim=128, depths=(2, 2, 15, 2), ssm_ratio=2.0, drop_path_rate=0.6),
    "vanilla_vmamba_tiny": dict(embed_dim=96, depths=(2, 2, 9, 2), drop_path_rate=0.2, **_VANILLA),
    "vanilla_vmamba_small": dict(embed_dim=96, depths=(2, 2, 27, 2), drop_path_rate=0.3, **_VANILLA),
    "vanilla_vmamba_base": dict(embed_dim=128, depths=(2, 2, 27, 2), drop_path_rate=0.6, **_VANILLA),
    # For the digits: as many multiply-adds as nat_digits, within 2 %.
    "vmamba_digits": dict(embed_dim=32, depths=(2, 2, 2, 1)),
}

# Files of the authors' releases.
_FILES = {
    "vmamba_tiny": "v2cls/vssm1_tiny_0230s_ckpt_epoch_264",
    "vmamba_small": "v2cls/vssm1_small_0229s_ckpt_epoch_240",
    "vmamba_base": "v2cls/vssm1_base_0229s_ckpt_epoch_225",
    "vmamba_tiny_s2l5": "v2cls/vssm_tiny_0230_ckpt_epoch_262",
    "vmamba_small_s2l15": "v2cls/vssm_small_0229_ckpt_epoch_222",
    "vmamba_base_s2l15": "v2cls/vssm_base_0229_ckpt_epoch_237",
    "vanilla_vmamba_tiny": "v0cls/vssmtiny_dp01_ckpt_epoch_292",
    "vanilla_vmamba_small": "v0cls/vssmsmall_dp03_ckpt_epoch_238",
    "vanilla_vmamba_base": "v0cls/vssmbase_dp06_ckpt_epoch_241",
}


def cfg(file: str, **kwargs):
    return imagenet_cfg(
        f"https://github.com/MzeroMiko/VMamba/releases/download/%23{file}.pth" if file else "", first_conv="stem.conv1",
        license="mit", paper_ids="arXiv:2401.10166", origin_url="https://github.com/MzeroMiko/VMamba", **kwargs,
    )


default_cfgs = generate_default_cfgs({
    **{f"{variant}.in1k": cfg(file) for variant, file in _FILES.items()},
    "vmamba_digits.untrained": cfg(
        "", num_classes=10, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3
    ),
})


register_variants(__name__, VARIANTS, create_from(VMamba))
