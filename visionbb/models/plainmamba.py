"""PlainMamba: a column of Mamba blocks that scan the map along snakes.

Paper: PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition, https://arxiv.org/abs/2403.17695
Authors' code and weights: https://github.com/ChenhongyiYang/PlainMamba (Apache-2.0)

Like a ViT it keeps one width and one resolution; its only layer is Mamba's gated block. Two things make it one for
images: scans go there and back, so that a step always leads to a neighbour, and the input of a step depends on the
direction that it was taken in.

The released models differ from the paper in two ways, which their weights are made for. Their scans reorder the values
alone, and take time steps, B and C in raster order (`permute="u"`; "all" is the paper's form). And the bias of the time
steps is added twice; here `checkpoint_filter_fn` doubles it instead.
"""
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, to_2tuple
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Columnar, MixerBlock, PatchConv, PositionEmbed, keep_native, renamed
from ..backbones.layers import conv_norm_acts
from ..mixers import DepthwiseConv, SnakeSS2D
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours; resamples the positions."""
    state_dict, native = keep_native(state_dict)
    if not native:
        renames = [
            (r"^backbone\.", ""),
            (r"^patch_embed\.stem\.", "stem.convs."),
            (r"^patch_embed\.convs\.(\d+)", lambda m: f"stem.convs.{int(m[1]) + 3}"),
            (r"^patch_embed\.projection\.", "stem.proj."),
            (r"^pos_embed$", "pos_embed.weight"),
            (r"^ln1\.", "norm."),
            (r"^layers\.(\d+)\.norm\.", r"blocks.\1.norm1."),
            (r"^layers\.", "blocks."),
            (r"\.dw\.0\.", ".conv."),
            (r"\.dw\.1\.", ".conv_norm."),
            (r"\.mamba\.", ".mixer."),
            (r"\.conv2d\.", ".conv."),
            (r"\.dt_proj\.weight$", ".dt_proj"),
            (r"\.dt_proj\.bias$", ".dt_bias"),
            (r"\.direction_Bs$", ".direction_B"),
        ]
        out = {}
        for key, value in state_dict.items():
            key = renamed(key, renames)
            out[key] = 2 * value if key.endswith(".dt_bias") else value
        state_dict = out
    if "pos_embed.weight" in state_dict:
        state_dict["pos_embed.weight"] = model.pos_embed.resampled(state_dict["pos_embed.weight"])
    return state_dict


class ConvStem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/16, W/16, dim): convolutions at half the resolution, then patches.

    Args:
        depth: 3x3 convolutions behind the first, which is 7x7 of stride 2; all 64 wide.
    """

    def __init__(self, in_chans: int, dim: int, depth: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        layers = [(64, 7, 2)] + depth * [(64, 3, 1)]
        self.convs = conv_norm_acts(in_chans, layers, nn.ReLU, bias=False, **dd).append(nn.ReLU())
        self.proj = PatchConv(64, dim, 8, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.convs(x.contiguous(memory_format=torch.channels_last))).permute(0, 2, 3, 1)


class ConvBlock(MixerBlock):
    """Mamba's block, then gelu(conv_norm(conv(x))) with a 3x3 depthwise convolution."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__(dim, mixer, drop_path, Norm, device=device, dtype=dtype)
        dd = {"device": device, "dtype": dtype}
        self.conv = DepthwiseConv(dim, 3, bias=False, **dd)
        self.conv_norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x + self.drop_path1(self.mixer(self.norm1(x))))
        return F.gelu(self.conv_norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PlainMamba(Columnar):
    """PlainMamba.

    Args:
        img_size: pixels, one number or (height, width), of the images that the positions are learned at; others get
            them resampled.
        embed_dim: width.
        depth: number of blocks.
        stem_depth: 3x3 convolutions in the stem.
        conv_blocks: how many blocks, from the first on, end with a convolution.
        d_state: numbers a channel's state is made of.
        permute: what the scans reorder, see `SnakeSS2D`: "u" is of the released models, "all" of the paper.
        global_pool, drop_rate, drop_path_rate: as in timm.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 192,
        depth: int = 24,
        stem_depth: int = 2,
        conv_blocks: int = 0,
        d_state: int = 16,
        permute: str = "u",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(index: int, dim: int, drop_path: float) -> MixerBlock:
            mixer = SnakeSS2D(dim, d_state, permute=permute, **dd)
            if index < conv_blocks:
                return ConvBlock(dim, mixer, drop_path, **dd)
            return MixerBlock(dim, mixer, drop_path, Norm, **dd)

        grid = tuple(-(-side // 16) for side in to_2tuple(img_size))
        super().__init__(
            stem=ConvStem(in_chans, embed_dim, stem_depth, **dd),
            pos_embed=PositionEmbed(embed_dim, grid, antialias=False, **dd),
            block=block,
            norm=LayerNorm(embed_dim, eps=1e-6, **dd),
            embed_dim=embed_dim,
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plainmamba_l1": dict(embed_dim=192, depth=24, stem_depth=1, conv_blocks=1, drop_path_rate=0.2),
    "plainmamba_l2": dict(embed_dim=384, depth=24, drop_path_rate=0.2),
    "plainmamba_l3": dict(embed_dim=448, depth=36, drop_path_rate=0.4),
}

default_cfgs = generate_default_cfgs({
    f"{variant}.in1k": imagenet_cfg(
        f"https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/{variant.removeprefix('plainmamba_')}.pth",
        pool_size=(14, 14), first_conv="stem.convs.0", license="apache-2.0", paper_ids="arXiv:2403.17695",
        origin_url="https://github.com/ChenhongyiYang/PlainMamba",
    )
    for variant in VARIANTS
})


register_variants(__name__, VARIANTS, create_from(PlainMamba))
