"""Vision-RWKV: a ViT's column with RWKV's two mixers, linear in the number of pixels.

Paper: Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures,
https://arxiv.org/abs/2403.02308
Authors' code and weights: https://github.com/OpenGVLab/Vision-RWKV (Apache-2.0)

RWKV replaces attention by an exponentially decaying mean of the values: no queries, one decay a channel, two running
sums. For an image it runs from both ends (`bi_wkv`), the decay is taken over the length of the sequence, and both
mixers see each token's four neighbours, a quarter of the channels each, before they project it (`q_shift`).

Differences to the authors' code: the mean is that of the paper's formula, from which their CUDA kernel departs a little
where it joins the parts of a sequence (logits move by at most 4e-5).
"""
import math
from functools import partial

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm, PatchEmbed, to_2tuple
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Columnar, PositionEmbed, keep_native, renamed
from ..backbones.block import Residual
from ..mixers import ChannelMix, SpatialMix
from ..mixers.linear import Linear
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints, of both of their codebases, to ours; resamples the positions."""
    state_dict, native = keep_native(state_dict)
    if not native:
        renames = [
            (r"^backbone\.", ""),
            (r"^patch_embed\.projection\.", "stem.proj."),
            (r"^pos_embed$", "pos_embed.weight"),
            (r"^ln1\.", "norm."),
            (r"^layers\.", "blocks."),
            (r"\.ln(\d)\.", r".norm\1."),
            (r"\.gamma(\d)$", r".ls\1.gamma"),
            (r"\.att\.", ".mixer."),
            (r"\.ffn\.", ".mlp."),
            (r"\.key_norm\.", ".norm."),
            (r"\.spatial_first$", ".bonus"),
            (r"\.spatial_", "."),
            (r"^head\.0\.", "head.hidden."),
            (r"^head\.2\.", "head.fc."),
        ]
        out = {}
        for key, value in state_dict.items():
            key = renamed(key, renames)
            out[key] = value.flatten() if ".mix_" in key else value
        state_dict = out
    if "pos_embed.weight" in state_dict:
        state_dict["pos_embed.weight"] = model.pos_embed.resampled(state_dict["pos_embed.weight"])
    return state_dict


class RWKVBlock(nn.Module):
    """x + gamma * drop_path(mixer(norm1(x))), then the same with an MLP, on (B, H, W, dim).

    Args:
        mixer: of tokens; mlp: of channels.
        post_norm: norm the results of the branches, in place of what goes into them.
        layer_scale: initial value of the branches' gains; None for no gains.
        drop_path: probability of dropping a branch, per sample.
        first: whether the tokens are normed beforehand (`norm0`), as before the first of the blocks.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        post_norm: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        first: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.post_norm = post_norm
        self.norm0 = Norm(dim, **dd) if first else nn.Identity()
        self.norm1 = Norm(dim, **dd)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls1 = Residual(dim, layer_scale, **dd)
        self.norm2 = Norm(dim, **dd)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls2 = Residual(dim, layer_scale, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm0(x)
        if self.post_norm:
            x = self.ls1(x, self.drop_path1(self.norm1(self.mixer(x))))
            return self.ls2(x, self.drop_path2(self.norm2(self.mlp(x))))
        x = self.ls1(x, self.drop_path1(self.mixer(self.norm1(x))))
        return self.ls2(x, self.drop_path2(self.mlp(self.norm2(x))))


class HiddenHead(ClassifierHead):
    """Pool, tanh(hidden(x)), dropout and classifier of tokens (B, H, W, in_features).

    Of two poolings side by side ("catavgmax"), each goes through the hidden layer.
    """

    def __init__(
        self, in_features: int, hidden: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(hidden, num_classes, pool_type, drop_rate, input_fmt="NHWC", **dd)
        self.hidden = Linear(in_features, hidden, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, in_features: int | None = None, **dd) -> None:
        """As timm's; the hidden layer stays, and decides the width of the classifier."""
        super().reset(num_classes, pool_type, **dd)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = self.global_pool(x).unflatten(-1, (-1, self.hidden.in_features))
        x = self.drop(self.hidden(pooled).tanh().flatten(-2))
        return x if pre_logits else self.fc(x)


class VRWKV(Columnar):
    """Vision-RWKV.

    Args:
        img_size: pixels, one number or (height, width), of the images that the positions are learned at; others get
            them resampled.
        patch_size: pixels a token, per axis.
        embed_dim: width, a multiple of 4.
        depth: number of blocks.
        mlp_ratio: hidden width of the channel mixing over embed_dim.
        post_norm: norms behind the mixers in place of in front of them.
        key_norm: norms inside both mixers.
        layer_scale: initial gains of the residual branches; None for none.
        head_hidden: width of a hidden layer before the classifier; None for none.
        global_pool, drop_rate, drop_path_rate: as in timm.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        key_norm: bool = False,
        layer_scale: float | None = None,
        head_hidden: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        grid = tuple(math.ceil(side / patch_size) for side in to_2tuple(img_size))

        def block(index: int, dim: int, drop_path: float) -> RWKVBlock:
            mixer = SpatialMix(dim, index, depth, key_norm, **dd)
            mlp = ChannelMix(dim, index, depth, mlp_ratio, key_norm, **dd)
            return RWKVBlock(dim, mixer, mlp, post_norm, layer_scale, drop_path, index == 0, **dd)

        head = None
        if head_hidden is not None:
            head = HiddenHead(embed_dim, head_hidden, num_classes, global_pool, drop_rate, **dd)
        super().__init__(
            stem=PatchEmbed(
                None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True,
                **dd,
            ),
            block=block,
            norm=Norm(embed_dim, **dd),
            embed_dim=embed_dim,
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            head=head,
            stem_stride=patch_size,
            pos_embed=PositionEmbed(embed_dim, grid, antialias=False, **dd),
            **dd,
        )


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "vrwkv_tiny": dict(embed_dim=192),
    "vrwkv_small": dict(embed_dim=384, post_norm=True, layer_scale=1.0, drop_path_rate=0.3),
    "vrwkv_base": dict(embed_dim=768, post_norm=True, layer_scale=1e-5, drop_path_rate=0.5),
    # Its positions are those of its pretraining at 192 pixels.
    "vrwkv_large": dict(
        embed_dim=1024, depth=24, img_size=192, post_norm=True, key_norm=True, layer_scale=1e-5, head_hidden=3072,
        drop_path_rate=0.1,
    ),
}


def _cfg(file: str, size: int, crop_pct: float) -> dict:
    return imagenet_cfg(
        f"https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/{file}.pth", input_size=(3, size, size),
        pool_size=(size // 16, size // 16), crop_pct=crop_pct, first_conv="stem.proj", license="apache-2.0",
        paper_ids="arXiv:2403.02308", origin_url="https://github.com/OpenGVLab/Vision-RWKV",
    )


default_cfgs = generate_default_cfgs({
    "vrwkv_tiny.in1k": _cfg("vrwkv_t_in1k_224", 224, 0.875),
    "vrwkv_small.in1k": _cfg("vrwkv_s_in1k_224", 224, 0.875),
    "vrwkv_base.in1k": _cfg("vrwkv_b_in1k_224", 224, 0.875),
    "vrwkv_large.in22k_ft_in1k_384": _cfg("vrwkv_l_22kto1k_384", 384, 1.0),
})


register_variants(__name__, VARIANTS, create_from(VRWKV))
