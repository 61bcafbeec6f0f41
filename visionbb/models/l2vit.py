"""L2ViT: window attention and linear global attention by turns.

Paper: The Linear Attention Resurrection in Vision Transformer, https://arxiv.org/abs/2501.16182
Authors' code and weights: https://github.com/ChuanyangZheng/L2ViT (MIT)

Even blocks attend inside windows. Odd blocks attend to the whole map by linear attention, whose weights spread wider
than those of a softmax; the local concentration module after it draws them together again.

Differences to the authors' code: downsampling stands at the start of a stage.
"""
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Block, Pyramid, keep_native, renamed
from ..backbones.layers import conv_norm_acts, init_convs
from ..mixers import DepthwiseConv, LinearAttention, WindowAttention
from ..mixers.window import pad_map
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^stages\.(\d+)\.", r"stages.\1.blocks."),
        (r"^downsample_layers\.0\.proj\.", "stem."),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"\.cpe\.0\.proj\.", ".cpe1."),
        (r"\.cpe\.1\.proj\.", ".cpe2."),
        (r"\.norm3\.", ".cpe2.norm."),
        (r"\.local_mp\.", ".cpe2."),
        (r"\.attn\.", ".mixer."),
        (r"^head\.", "head.fc."),
    ]
    out = {}
    for key, value in state_dict.items():
        key = renamed(key, renames)
        out[key] = value.flatten(1) if key.endswith(".temperature") else value
    return out


class Stem(nn.Module):
    """Two convolutions with batch norm and a norm, (B, in_chans, H, W) to (B, H/4, W/4, dim)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = conv_norm_acts(in_chans, ((dim // 2, 3, 2), (dim, 3, 2)), partial(nn.ReLU, inplace=True), **dd)
        self.norm = Norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_map(x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1), 4, 4)
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A norm and a 2x2 convolution of stride 2, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.norm = Norm(in_dim, device=device, dtype=dtype)
        self.proj = nn.Conv2d(in_dim, dim, 2, 2, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(pad_map(self.norm(x), 2, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LocalConcentration(nn.Module):
    """x + drop_path(conv2(bn(act(conv1(norm(x)))))) with depthwise convolutions, on (B, H, W, dim) (section 3.3)."""

    def __init__(self, dim: int, kernel_size: int = 7, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = Norm(dim, **dd)
        self.conv1 = DepthwiseConv(dim, kernel_size, **dd)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = DepthwiseConv(dim, kernel_size, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv1(self.norm(x)))
        y = self.conv2(self.bn(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.drop_path(y)


class L2ViT(Pyramid):
    """L2ViT.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths, num_heads: per stage.
        window_size: of the window attention, in tokens a side.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry a stage ({len(depths)}), got {num_heads}")

        def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
            heads, rest = num_heads[stage], dict(proj_drop=proj_drop_rate, **dd)
            if index % 2 == 0:
                mixer, cpe2 = WindowAttention(dim, heads, window_size, **rest), 3
            else:
                mixer = LinearAttention(dim, heads, "relu", normalizer="clamp", eps=100.0, temperature=True, **rest)
                cpe2 = LocalConcentration(dim, 7, drop_path, **dd)
            return Block(dim, mixer, mlp_ratio, None, drop_path, norm_layer=Norm, cpe1=3, cpe2=cpe2, **rest)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=Stem(in_chans, embed_dim, **dd),
            downsample=partial(Downsample, **dd),
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

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        init_convs(self)


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "l2vit_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1),
    "l2vit_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "l2vit_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.3),
}

# Windows that the maps of an image of 384 pixels are made of.
TAG_ARGS = {"l2vit_base.in22k_in1k_384": dict(window_size=12)}


def _cfg(file: str, **kwargs):
    return imagenet_cfg(
        f"https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/L2ViT-{file}.pth", first_conv="stem.proj.0",
        license="mit", paper_ids="arXiv:2501.16182", origin_url="https://github.com/ChuanyangZheng/L2ViT", **kwargs,
    )


default_cfgs = generate_default_cfgs({
    "l2vit_tiny.in1k": _cfg("Tiny-checkpoint-best-ema"),
    "l2vit_small.in1k": _cfg("Small-checkpoint-best-ema"),
    "l2vit_base.in1k": _cfg("Base-checkpoint-best-ema"),
    "l2vit_base.in22k_in1k": _cfg("Base-22k21k-finetune-224-checkpoint-best"),
    "l2vit_base.in22k_in1k_384": _cfg(
        "Base-22k21k-finetune-384-checkpoint-best", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0,
        crop_mode="squash",
    ),
    "l2vit_base.in22k": _cfg("Base-22k-pretrain-checkpoint-best", num_classes=21841),
})


register_variants(__name__, VARIANTS, create_from(L2ViT), TAG_ARGS)
