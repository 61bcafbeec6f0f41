"""MILA (MLLA): Mamba's block around linear attention, pure linear attention in all four stages.

Paper: Demystify Mamba in Vision: A Linear Attention Perspective, https://arxiv.org/abs/2405.16605
Authors' code and weights: https://github.com/LeapLabTHU/MLLA (MIT)

What makes Mamba strong, the paper finds, is its block and its forget gate. MILA keeps the block (`MambaMixer`) and lets
positional encodings do what the forget gate does: rotary embedding, local convolution of the values (LePE), positional
convolutions. Without the gate there is no scan: tokens are mixed in parallel, all to all, at linear cost.

Differences to the authors' code: downsampling stands at the start of a stage; rotary angles follow the map, so that any
image size works.
"""
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_notrace_module
from torch import nn

from ..backbones import Block, Pyramid, keep_native, renamed
from ..backbones.layers import MapConvNormActs, PointwiseConv, conv_norm_acts
from ..mixers import DepthwiseConv, LinearAttention
from ..mixers.linear import Linear
from ..mixers.slabs import in_slabs
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)

# The authors' keys of what surrounds the mixers, to ours; VSSD has the same.
FRAME_KEYS = [
    (r"^patch_embed\.conv1\.", "stem.conv1.0."),
    (r"^patch_embed\.", "stem."),
    # Three modules for each of the authors' layers: convolution, norm, activation.
    (r"^(stem\.conv\d)\.(\d)\.conv\.", lambda m: f"{m[1]}.{3 * int(m[2])}."),
    (r"^(stem\.conv\d)\.(\d)\.norm\.", lambda m: f"{m[1]}.{3 * int(m[2]) + 1}."),
    (r"^layers\.(\d+)\.blocks", r"stages.\1.blocks"),
    (r"^layers\.(\d+)\.downsample\.conv\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"\.downsample\.0\.conv", ".downsample.expand"),
    (r"\.downsample\.1\.conv", ".downsample.conv"),
    (r"\.downsample\.2\.conv", ".downsample.reduce"),
    (r"\.downsample\.2\.norm", ".downsample.norm"),
    (r"^head\.", "head.fc."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        *FRAME_KEYS,
        (r"\.(in_proj|act_proj|dwc|out_proj)\.", r".mixer.\1."),
        (r"\.attn\.qk\.", ".mixer.attn.qkv."),
        (r"\.attn\.lepe\.", ".mixer.attn.local."),
    ]
    out = {}
    for key, value in state_dict.items():
        if key.endswith("rope.rotations"):
            continue  # computed from the size of the map
        key = renamed(key, renames)
        out[key] = value
    return out


@register_notrace_module  # slabs by the size of the image
class Stem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/4, W/4, dim): a residual pair of convolutions between two strides."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        half, relu = dim // 2, partial(nn.ReLU, inplace=True)
        layers = partial(conv_norm_acts, act_layer=relu, bias=False, device=device, dtype=dtype)
        self.conv1 = layers(in_chans, [(half, 3, 2)]).append(relu())
        self.conv2 = layers(half, [(half, 3, 1), (half, 3, 1)])
        self.conv3 = layers(half, [(4 * dim, 3, 2), (dim, 1, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting() or self.training:  # batch statistics are of the whole batch
            return self.layers(x)
        else:
            return in_slabs(self.layers, x, self.conv3[0].out_channels * x.shape[2] * x.shape[3] // 16)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last from the first layer on, so that none of the large early maps is ever transposed.
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return self.conv3(self.conv2(x).add_(x)).permute(0, 2, 3, 1)


class Downsample(MapConvNormActs):
    """An inverted bottleneck of stride 2, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        hidden = 4 * dim
        super().__init__(OrderedDict(
            expand=PointwiseConv(in_dim, hidden, **dd),
            act1=nn.ReLU(inplace=True),
            conv=nn.Conv2d(hidden, hidden, 3, 2, 1, groups=hidden, **dd),
            act2=nn.ReLU(inplace=True),
            reduce=PointwiseConv(hidden, dim, **dd),
            norm=nn.BatchNorm2d(dim, **dd),
        ))


class MambaMixer(nn.Module):
    """Mamba's block with linear attention for the scan, on (B, H, W, dim): out(attn(silu(conv(in x))) * silu(act x)).

    The attention takes its input for values, and leaves gate and output projection to the block.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_proj = Linear(dim, dim, **dd)
        self.act_proj = Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv(dim, 3, **dd)
        self.attn = LinearAttention(
            dim, num_heads, "elu", rotary="map", local_kernel=3, value_proj=False, out_proj=False, **dd
        )
        self.out_proj = Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.act_proj(x), inplace=True)
        x = F.silu(self.dwc(self.in_proj(x)))
        return self.out_proj(self.attn(x, gate))


class MILA(Pyramid):
    """MILA.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths, num_heads: per stage.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout in the MLPs.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
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
            return Block(
                dim, MambaMixer(dim, num_heads[stage], **dd), mlp_ratio, None, drop_path, proj_drop_rate,
                norm_layer=Norm, cpe1=3, cpe2=3, **dd,
            )

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


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "mila_tiny": dict(embed_dim=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16), drop_path_rate=0.2),
    "mila_small": dict(embed_dim=64, depths=(3, 6, 21, 6), num_heads=(2, 4, 8, 16), drop_path_rate=0.3),
    "mila_base": dict(embed_dim=96, depths=(3, 6, 21, 6), num_heads=(3, 6, 12, 24), drop_path_rate=0.5),
}

# Files of the authors' cloud folder, by what its links call them.
_FILES = {
    "mila_tiny": "7a19712877cb4242889c", "mila_small": "0e5d0b1409d540aaa80c", "mila_base": "91c85c5a1061496d8796",
}

default_cfgs = generate_default_cfgs({
    f"{variant}.in1k": imagenet_cfg(
        f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1", first_conv="stem.conv1.0", license="mit",
        paper_ids="arXiv:2405.16605", origin_url="https://github.com/LeapLabTHU/MLLA",
    )
    for variant, file in _FILES.items()
})


register_variants(__name__, VARIANTS, create_from(MILA))
