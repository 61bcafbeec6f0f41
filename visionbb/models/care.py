"""CARE Transformer: linear attention and convolutions side by side on parts of the channels, with a memory unit.

Paper: CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction,
    https://arxiv.org/abs/2411.16170
Authors' code: https://github.com/zhouyuan888888/CARE-Transformer

The channels of a map are memory, and three equal groups that are mixed apart from each other: one by linear attention
(in the first two stages by a cross of two strip convolutions), two by depthwise convolutions. Two inverted bottlenecks
then let them interact, first the three with each other, then all with the memory.

Differences to the authors' code: 1x1 convolutions are linear layers; maps of odd sides are padded; in training, the
predictions of the two heads come apart only after `set_distilled_training()`, as in timm's distilled models.
"""
import re
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath, LayerNorm, SelectAdaptivePool2d
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import PatchConv, Pyramid, keep_native, renamed
from ..backbones.block import Residual
from ..backbones.layers import init_convs
from ..mixers import DepthwiseConv, LinearAttention
from ..mixers.dropout import Dropout
from ..mixers.linear import InplaceGELU, Linear
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, _ = keep_native(state_dict)
    if not any(".token_mixer." in key for key in state_dict):  # both call their stem the same
        return state_dict
    renames = [
        (r"^stem\.0\.", "stem.proj."),
        (r"^stem\.1\.", "stem.norm."),
        (r"\.downsample\.0\.", ".downsample.norm."),
        (r"\.downsample\.1\.", ".downsample.proj."),
        (r"\.token_mixer\.qk\.", ".attn.qkv."),
        (r"\.token_mixer\.dwconvatt_([12])\.", r".attn.strip\1."),
        (r"\.token_mixer\.dwconv([12])\.", r".conv\1."),
        (r"\.inter_layer\.inter([12])_", r".inter\1."),
        (r"\.gamma$", ".ls.gamma"),
        (r"^head\.", "head.fc.0."),
        (r"^dist_head\.", "head.fc.1."),
    ]
    out = {}
    for key, value in state_dict.items():
        key = renamed(key, renames)
        out[key] = value.flatten(1) if re.search(r"\.(qkv|fc[12])\.weight$", key) else value
    return out


class Stem(nn.Module):
    """Patches of 4x4 pixels and batch norm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = PatchConv(in_chans, dim, 4, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x.contiguous(memory_format=torch.channels_last))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Batch norm and patches of 2x2 tokens, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(in_dim, **dd)
        self.proj = PatchConv(in_dim, dim, 2, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class CrossConv(nn.Module):
    """The sum of a column and a row of a depthwise convolution: long reach for the cost of two strips."""

    def __init__(self, dim: int, kernel_size: int = 11, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.strip1 = DepthwiseConv(dim, (kernel_size, 1), **dd)
        self.strip2 = DepthwiseConv(dim, (1, kernel_size), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.strip1(x) + self.strip2(x)


class Interaction(nn.Module):
    """fc2(conv(gelu(fc1(norm(x))))), an inverted bottleneck on (B, H, W, dim).

    Args:
        ratio: hidden width over dim.
        project: back to dim; else the hidden map is the result.
        drop: dropout after the convolution.
    """

    def __init__(self, dim: int, ratio: int, project: bool = True, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.fc1 = Linear(dim, ratio * dim, **dd)
        self.act = InplaceGELU()
        self.conv = DepthwiseConv(ratio * dim, 3, **dd)
        self.drop = Dropout(drop)
        self.fc2 = Linear(ratio * dim, dim, **dd) if project else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.drop(self.conv(self.act(self.fc1(x)))))


class CAREBlock(nn.Module):
    """Asymmetric decoupled mixing, then dual interaction, on (B, H, W, dim).

    Args:
        group_dim: width of each of the three groups that are mixed, the last channels; those before them are memory.
        head_dim: of linear attention on the first group; 0 for a cross of strip convolutions.
        ratios: hidden widths of the interactions of the groups, and of all channels, over theirs.
        last: end with the hidden map of the second interaction, ratios[1] * dim wide, without residual.
        layer_scale: initial gain of the residual branch.
    """

    def __init__(
        self,
        dim: int,
        group_dim: int,
        head_dim: int,
        ratios: tuple[int, int],
        last: bool = False,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.splits = [dim - 3 * group_dim, group_dim, group_dim, group_dim]
        if head_dim:
            self.attn = LinearAttention(
                group_dim, group_dim // head_dim, "elu", value_proj=False, out_proj=False, **dd
            )
        else:
            self.attn = CrossConv(group_dim, **dd)
        self.conv1 = DepthwiseConv(group_dim, 3, **dd)
        self.conv2 = DepthwiseConv(group_dim, 7, **dd)
        self.inter1 = Interaction(3 * group_dim, ratios[0], drop=proj_drop, **dd)
        self.inter2 = Interaction(dim, ratios[1], project=not last, drop=proj_drop, **dd)
        self.ls = None if last else Residual(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, first, near, far = x.split(self.splits, -1)
        first = first.contiguous()  # once for all that read it
        groups = torch.cat((self.attn(first), self.conv1(near), self.conv2(far)), -1)
        joined = torch.cat((memory, self.inter1(groups).add_(groups)), -1)
        y = self.inter2(joined)
        if self.ls is None:
            return self.drop_path(y)
        return self.ls(x, self.drop_path(y.add_(joined)))


class NormClassifier(nn.Module):
    """A classifier behind norm and dropout."""

    def __init__(self, in_features: int, num_classes: int, drop_rate: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = Norm(in_features, **dd)
        self.drop = Dropout(drop_rate)
        self.fc = Linear(in_features, num_classes, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(x)))


class DistilledHead(nn.Module):
    """Pooling and GELU, then two classifiers, for the labels and for a teacher, whose predictions are averaged.

    They come apart, as a pair, in training with `distilled_training` set. Without classes, the result is what they see.
    """

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, device=None, dtype=None
    ):
        super().__init__()
        self.in_features = self.num_features = in_features
        self.drop_rate = drop_rate
        self.distilled_training = False
        self.act = nn.GELU()
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, in_features: int | None = None, **dd) -> None:
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type), input_fmt="NHWC")
            self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc = nn.ModuleList(
            NormClassifier(self.num_features, num_classes, self.drop_rate, **dd) if num_classes else nn.Identity()
            for _ in range(2)
        ).train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.act(self.global_pool(x))
        if pre_logits:
            return x
        of_labels, of_teacher = self.fc[0](x), self.fc[1](x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return of_labels, of_teacher
        return (of_labels + of_teacher) / 2


class CARE(Pyramid):
    """CARE Transformer.

    Args:
        dims, depths: per stage.
        ratios: per stage, the hidden widths of the two interactions over that of their input.
        head_dims: per stage, of linear attention; 0 for strip convolutions in its place.
        layer_scale: initial gain of the residual branches.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 4, 8, 4),
        ratios: Sequence[tuple[int, int]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
        head_dims: Sequence[int] = (0, 0, 16, 32),
        layer_scale: float = 1e-6,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if len(ratios) != len(depths) or len(head_dims) != len(depths):
            raise ValueError(
                f"ratios and head_dims must have one entry a stage ({len(depths)}), got {ratios} and {head_dims}"
            )
        for dim in dims:
            if dim % 4:
                raise ValueError(f"dims must be multiples of 4 (memory and three groups), got {tuple(dims)}")

        def block(stage: int, index: int, dim: int, drop_path: float) -> CAREBlock:
            last = stage == len(depths) - 1 and index == depths[-1] - 1
            return CAREBlock(
                dim, dim // 4, head_dims[stage], ratios[stage], last, layer_scale, drop_path, proj_drop_rate, **dd
            )

        num_features = dims[-1] * ratios[-1][1]
        super().__init__(
            stem=Stem(in_chans, dims[0], **dd),
            downsample=partial(Downsample, **dd),
            block=block,
            norm=nn.Identity(),
            dims=dims,
            depths=depths,
            num_features=num_features,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            head=DistilledHead(num_features, num_classes, global_pool, drop_rate, **dd),
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        init_convs(self)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the predictions of both heads, (of labels, of teacher), or their mean."""
        self.head.distilled_training = enable


# ---- Variants -------------------------------------------------------------------------------------------------------

_SMALL = dict(dims=(32, 64, 128, 256), depths=(3, 6, 10, 6), ratios=((2, 4), (2, 4), (4, 4), (4, 4)),
              drop_path_rate=0.1)

VARIANTS = {
    "care_s0": _SMALL | dict(depths=(2, 4, 8, 4), ratios=((2, 2), (2, 4), (4, 4), (4, 4))),
    "care_s1": _SMALL,
    "care_s2": _SMALL | dict(dims=(32, 64, 192, 384), ratios=((4, 4),) * 4),
}

# The authors offer the weights in a shared folder without direct links.
default_cfgs = generate_default_cfgs({
    f"{name}.in1k": imagenet_cfg(
        first_conv="stem.proj", classifier=("head.fc.0.fc", "head.fc.1.fc"), paper_ids="arXiv:2411.16170",
        origin_url="https://github.com/zhouyuan888888/CARE-Transformer",
    )
    for name in VARIANTS
})

register_variants(__name__, VARIANTS, create_from(CARE))
