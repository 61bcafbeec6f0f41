"""RAVLT, MAViT and NaLaFormer: linear attention where tokens are many, softmax attention where they are few.

Papers:
    Breaking the Low-Rank Dilemma of Linear Attention (RALA, RAVLT), https://arxiv.org/abs/2411.07635
    Rectifying Magnitude Neglect in Linear Attention (MALA, MAViT), https://arxiv.org/abs/2507.00698
    Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention (NaLaFormer),
        https://arxiv.org/abs/2506.21137
Authors' code: https://github.com/qhfan/RALA, https://github.com/qhfan/MALA (weights for both),
https://github.com/ZacharyMeng/NaLaFormer (MIT, no weights yet)

One architecture: convolutional stem, blocks with a positional convolution and a convolution inside the MLP, a
projection with batch norm before pooling. All three are hybrids, with linear attention in the first two stages and
softmax attention, in the same frame of rotary embedding, local enhancement and gate, in the last two. Each paper is a
row of `ATTENTIONS`.

Differences to the authors' code: downsampling stands at the start of a stage; 1x1 convolutions are linear layers.
"""
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import ClassifierHead, LayerNorm
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Block, Pyramid, keep_native, renamed
from ..backbones.layers import MapConvNormActs, conv_norm_acts, init_convs
from ..mixers import LinearAttention, SoftmaxAttention
from ..mixers.linear import Linear
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)

# What the three papers' attentions have in common, and what each adds; `frame` holds for their softmax twins too.
_FRAME = dict(rotary="head", local_kernel=5, gate="mul")
ATTENTIONS = {
    "rala": dict(frame=_FRAME, linear=dict(feature_map="elu", key_weight="global_query")),
    "mala": dict(frame=_FRAME, linear=dict(feature_map="elu", normalizer="additive")),
    "nala": dict(frame=_FRAME | dict(gate="silu", out_norm=True), linear=dict(feature_map="norm_aware")),
}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d+)\.blocks", r"stages.\1.blocks"),
        (r"^layers\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample"),
        (r"^head\.", "head.fc."),
        (r"^(proj|norm)\.", r"head.\1."),
        (r"\.(norm[12])\.norm\.", r".\1."),
        (r"\.pos\.", ".cpe1."),
        (r"\.attn\.qkv[og]\.", ".mixer.qkv."),
        (r"\.attn\.lepe\.", ".mixer.local."),
        (r"\.attn\.ln\.", ".mixer.norm."),
        (r"\.attn\.(?:out_)?proj\.", ".mixer.proj."),
        (r"\.ffn\.dwconv\.", ".mlp.conv."),
        (r"\.ffn\.", ".mlp."),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
    ]
    out = {}
    for key, value in state_dict.items():
        if key.endswith("RoPE.angle") or key.startswith("extra_norms."):
            continue  # computed from the size of the map; norms of the detectors' feature maps
        key = renamed(key, renames)
        if key.endswith(".gamma"):
            value = value.flatten()
        elif value.ndim == 4 and value.shape[-1] == 1:
            value = value.flatten(1)
        out[key] = value
    return out


class ConvStem(nn.Module):
    """Four 3x3 convolutions with batch norm, the first and the last of stride 2."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        layers = ((dim // 2, 3, 2), (dim // 2, 3, 1), (dim // 2, 3, 1), (dim, 3, 2))
        self.proj = conv_norm_acts(in_chans, layers, nn.GELU, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last from the first layer on, so that none of the large early maps is ever transposed.
        return self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class ConvDownsample(MapConvNormActs):
    """3x3 convolution of stride 2 and batch norm, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            OrderedDict(reduction=nn.Conv2d(in_dim, dim, 3, 2, 1, **dd), norm=nn.BatchNorm2d(dim, **dd))
        )


class ProjectedHead(ClassifierHead):
    """timm's pool, dropout and classifier on silu(norm(proj(x))), x (B, H, W, in_features)."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(hidden, num_classes, pool_type, drop_rate, input_fmt="NHWC", **dd)
        self.proj = Linear(in_features, hidden, **dd)
        self.norm = nn.BatchNorm2d(hidden, **dd)
        self.act = nn.SiLU()

    def reset(self, num_classes: int, pool_type: str | None = None, in_features: int | None = None, **dd) -> None:
        """As timm's; the projection stays, and decides the width of the classifier."""
        super().reset(num_classes, pool_type, **dd)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.norm(self.proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.drop(self.global_pool(self.act(x)))
        return x if pre_logits else self.fc(x)


class RAVLT(Pyramid):
    """RAVLT, MAViT and NaLaFormer.

    Args:
        dims, depths, num_heads: per stage.
        attention: paper, a row of `ATTENTIONS`.
        linear_stages: how many stages, from the first, have linear attention; the others have softmax attention.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        layer_scale: initial gain of the residual branches, one value or one a stage.
        second_cpe: a positional convolution before the MLP too (NaLaFormer).
        head_hidden: width of the projection before pooling.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        attention: str = "rala",
        linear_stages: int = 2,
        mlp_ratio: float = 3.5,
        layer_scale: float | Sequence[float] = 1.0,
        second_cpe: bool = False,
        head_hidden: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        gains = [layer_scale] * len(depths) if isinstance(layer_scale, (int, float)) else layer_scale
        if len(num_heads) != len(depths) or len(gains) != len(depths):
            raise ValueError(
                f"num_heads and layer_scale must have one entry a stage ({len(depths)}), got {num_heads} and {gains}"
            )
        frame, linear = (ATTENTIONS[attention][part] for part in ("frame", "linear"))

        def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
            if stage < linear_stages:
                mixer = LinearAttention(dim, num_heads[stage], **linear, **frame, proj_drop=proj_drop_rate, **dd)
            else:
                mixer = SoftmaxAttention(dim, num_heads[stage], **frame, proj_drop=proj_drop_rate, **dd)
            return Block(
                dim, mixer, mlp_ratio, gains[stage], drop_path, proj_drop_rate,
                norm_layer=Norm, cpe1=3, cpe2=3 if second_cpe else 0, mlp_conv=3, **dd,
            )

        super().__init__(
            stem=ConvStem(in_chans, dims[0], **dd),
            downsample=partial(ConvDownsample, **dd),
            block=block,
            norm=nn.Identity(),
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            head=ProjectedHead(dims[-1], head_hidden, num_classes, global_pool, drop_rate, **dd),
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        init_convs(self)


# ---- Variants -------------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": dict(dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), drop_path_rate=0.1),
    "small": dict(dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8), drop_path_rate=0.15),
    "base": dict(dims=(96, 192, 384, 512), depths=(4, 6, 12, 6), num_heads=(1, 2, 6, 8), drop_path_rate=0.4,
                 layer_scale=(1.0, 1.0, 1e-6, 1e-6)),
    "large": dict(dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(1, 2, 7, 10), drop_path_rate=0.55,
                  layer_scale=1e-6),
}
_XTINY = dict(dims=(32, 64, 128, 384), depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 12), drop_path_rate=0.1)
_NALA = dict(attention="nala", second_cpe=True)

VARIANTS = {
    **{f"ravlt_{size}": args for size, args in _SIZES.items()},
    **{
        f"mavit_{size}": args | dict(attention="mala", head_hidden=2560 if size == "large" else 2048)
        for size, args in _SIZES.items()
    },
    "nalaformer_xtiny": _XTINY | _NALA,
    **{
        f"nalaformer_{size}": args | _NALA | dict(mlp_ratio=4.0 if size in ("tiny", "base") else 3.5)
        for size, args in _SIZES.items()
    },
    # For scenes of digits: images of 128x128, maps of 32, 16, 8 and 4 tokens a side.
    "ravlt_digits": dict(dims=(32, 64, 128, 256), depths=(1, 1, 2, 1), mlp_ratio=2.0, head_hidden=256),
}


def _cfg(url: str, paper: str, origin: str, **kwargs):
    return imagenet_cfg(
        url, first_conv="stem.proj.0", paper_ids=f"arXiv:{paper}", origin_url=f"https://github.com/{origin}", **kwargs,
    )


def _hub(family: str, size: str) -> str:
    return f"https://huggingface.co/aldjalkdf/{family}/resolve/main/{family}_{size[0].upper()}.pth"


default_cfgs = generate_default_cfgs({
    **{
        f"ravlt_{size}.in1k": _cfg(_hub("RAVLT", size), "2411.07635", "qhfan/RALA", license="mit") for size in _SIZES
    },
    **{f"mavit_{size}.in1k": _cfg(_hub("MAViT", size), "2507.00698", "qhfan/MALA") for size in _SIZES},
    **{
        f"nalaformer_{size}.untrained": _cfg("", "2506.21137", "ZacharyMeng/NaLaFormer", license="mit")
        for size in ("xtiny", *_SIZES)
    },
    "ravlt_digits.untrained": _cfg(
        "", "2411.07635", "qhfan/RALA", license="mit", num_classes=10, input_size=(3, 40, 40), pool_size=(2, 2),
        crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3,
    ),
})


register_variants(__name__, VARIANTS, create_from(RAVLT))
