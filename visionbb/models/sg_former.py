"""SG-Former: attention of all tokens to keys that are fine where the map is significant, and coarse elsewhere.

Paper: SG-Former: Self-guided Transformer with Evolving Token Reallocation, https://arxiv.org/abs/2308.12216
Authors' code and weights: https://github.com/OliverRensu/SG-Former (no licence; written from the paper's formulas)

Blocks come in pairs. The first attends at two scales, far and near, and what attention its tokens get is the map of
their significance. The second lets all tokens attend to a few keys, weighted sums of groups of tokens: the quarter that
is least significant gives the fewest, the quarter that is most the most. So the keys follow the content of the image,
and the cost stays a small fraction of that of full attention, which only the last stage has.

Differences to the authors' code: any image size, where theirs takes 224 and few beside; downsampling, and the norm
before it, stand at the start of a stage; keys are built once (see `SelfGuidedAttention`).
"""
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import LayerNorm, build_sincos2d_pos_embed
from timm.models import generate_default_cfgs, register_notrace_module
from torch import nn

from ..backbones import Block, PositionEmbed, Pyramid, keep_native, renamed
from ..backbones.backbone import drop_path_rates
from ..backbones.block import ConvMlp
from ..backbones.layers import PointwiseConv
from ..mixers import DepthwiseConv, HybridScaleAttention, LocalSumAttention, SelfGuidedAttention
from ..mixers.linear import InplaceGELU
from ..mixers.slabs import in_slabs
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)

# Of self-guided attention in a stage of that sr_ratio: tokens a key and quarters of the map, part by part.
GROUPS = {
    8: dict(group_sizes=(196, 56, 28), quarters=(1, 2, 1)),
    4: dict(group_sizes=(49, 14, 7), quarters=(1, 2, 1)),
    2: dict(group_sizes=(2, 1), quarters=(2, 2)),
}
PAIR = ("hybrid", "guided")  # names of the even and the odd block


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours, and puts projections of the same tokens together."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    last = len(model.stages)
    renames = [
        (r"^patch_embed1\.conv\.(\d)\.c\.", lambda m: f"stem.conv{int(m[1]) // 2 + 1}."),
        (r"^patch_embed1\.conv\.(\d)\.bn\.", lambda m: f"stem.norm{int(m[1]) // 2 + 1}."),
        (r"^patch_embed1\.norm\.", "stem.norm."),
        (r"^pos_embed$", "stem.pos_embed.weight"),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"\.downsample\.conv(\d)\.c\.", r".downsample.conv\1."),
        (r"\.downsample\.conv(\d)\.bn\.", r".downsample.norm\1."),
        (rf"^norm{last}\.", "norm."),
        (r"^norm(\d)\.", r"stages.\1.downsample.norm."),
        (rf"^block{last}\.", f"stages.{last - 1}.blocks."),
        (r"^block(\d)\.(\d+)", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) // 2}." + PAIR[int(m[2]) % 2]),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
        (r"\.attn\.sr\.", ".mixer.reduce."),
        (r"\.attn\.f(\d)\.", lambda m: f".mixer.groups.{int(m[1]) - 1}."),
        (r"\.attn\.lepe_conv\.", ".mixer.local."),
        (r"\.attn\.", ".mixer."),
        (r"^head\.", "head.fc."),
    ]
    out = {renamed(key, renames): value for key, value in state_dict.items()}
    for key in [key for key in out if ".mixer.lepe_linear." in key]:
        mixer, _, kind = key.rpartition(".lepe_linear.")
        local, parts = out.pop(key), {}
        for name in ("q", "q1", "q2", "kv", "kv1", "kv2"):
            if f"{mixer}.{name}.{kind}" in out:
                parts[name] = out.pop(f"{mixer}.{name}.{kind}")
        if "q1" in parts:  # hybrid
            out[f"{mixer}.in_proj.{kind}"] = torch.cat((parts["q1"], parts["q2"], parts["kv2"], local))
            out[f"{mixer}.kv.{kind}"] = parts["kv1"]
        elif "kv1" in parts:  # self-guided: half of the heads of either
            (k1, v1), (k2, v2) = parts["kv1"].chunk(2), parts["kv2"].chunk(2)
            out[f"{mixer}.in_proj.{kind}"] = torch.cat((parts["q"], local))
            out[f"{mixer}.kv.{kind}"] = torch.cat((k1, k2, v1, v2))
        else:
            out[f"{mixer}.in_proj.{kind}"] = torch.cat((parts["q"], parts["kv"], local))
    out["stem.pos_embed.weight"] = model.stem.pos_embed.resampled(out["stem.pos_embed.weight"])
    return out


class WholeNorm(nn.GroupNorm):
    """LayerNorm over map and channels, (B, C, H, W), with a gain and bias a channel."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(1, dim, device=device, dtype=dtype)


class SinCosEmbed(PositionEmbed):
    """A learned position embedding that begins as sines and cosines of the column and the row, as MoCo v3 has them."""

    def reset_parameters(self) -> None:
        _, rows, cols, dim = self.weight.shape
        table = build_sincos2d_pos_embed(
            [rows, cols], dim, reverse_coord=True, interleave_sin_cos=True, device=self.weight.device
        )
        with torch.no_grad():
            self.weight.copy_(table.view(1, cols, rows, dim).transpose(1, 2))


@register_notrace_module  # slabs by the size of the image
class Stem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/4, W/4, dim): three 3x3 convolutions, each normed, and positions.

    Args:
        pos_embed_size: (rows, columns) of the map that the position embedding is learned at.
    """

    def __init__(self, in_chans: int, dim: int, pos_embed_size: tuple[int, int], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, 1, bias=False, **dd)
        self.norm1 = WholeNorm(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False, **dd)
        self.norm2 = WholeNorm(dim, **dd)
        self.conv3 = nn.Conv2d(dim, dim, 3, 2, 1, bias=False, **dd)
        self.norm3 = WholeNorm(dim, **dd)
        self.act = InplaceGELU()
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.pos_embed = SinCosEmbed(dim, pos_embed_size, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            x = self.layers(x)
        else:
            x = in_slabs(self.layers, x, 2 * self.conv1.out_channels * x.shape[2] * x.shape[3] // 4)
        return self.pos_embed(x)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last from the first layer on, so that none of the large early maps is ever transposed.
        x = self.act(self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        x = self.act(self.norm2(self.conv2(x)))
        return self.norm(self.norm3(self.conv3(x)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """norm, then 1x1, 3x3 depthwise of stride 2 and 1x1, each normed, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = Norm(in_dim, **dd)
        self.conv1 = PointwiseConv(in_dim, dim, bias=False, **dd)
        self.norm1 = WholeNorm(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, 2, 1, groups=dim, bias=False, **dd)
        self.norm2 = WholeNorm(dim, **dd)
        self.conv3 = PointwiseConv(dim, dim, bias=False, **dd)
        self.norm3 = WholeNorm(dim, **dd)
        self.act = InplaceGELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm1(self.conv1(self.norm(x).permute(0, 3, 1, 2))))
        x = self.act(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x)).permute(0, 2, 3, 1)


class HybridBlock(Block):
    """A block of `HybridScaleAttention`: also returns the significance map."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, significance = self.mixer(self.norm1(x))
        x = self.ls1(x, self.drop_path1(y))
        return self.ls2(x, self.drop_path2(self.mlp(self.norm2(x)))), significance


class GuidedBlock(Block):
    """A block of `SelfGuidedAttention`."""

    def forward(self, x: torch.Tensor, significance: torch.Tensor) -> torch.Tensor:
        x = self.ls1(x, self.drop_path1(self.mixer(self.norm1(x), significance)))
        return self.ls2(x, self.drop_path2(self.mlp(self.norm2(x))))


class GuidedPair(nn.Module):
    """A hybrid-scale block, and the self-guided one that its significance map guides, on (B, H, W, dim)."""

    def __init__(self, hybrid: HybridBlock, guided: GuidedBlock | None):
        super().__init__()
        self.hybrid = hybrid
        self.guided = guided

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, significance = self.hybrid(x)
        return x if self.guided is None else self.guided(x, significance)


class SGFormer(Pyramid):
    """SG-Former.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths: blocks per stage; of an odd number, the last stands without the block that it would guide.
        num_heads: per stage.
        sr_ratios: tokens a side of a patch in hybrid-scale attention, per stage but the last; 2, 4 or 8.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        pos_embed_size: (rows, columns) of the map that the position embedding is learned at.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout in MLPs and after attention.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 16, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        sr_ratios: Sequence[int] = (8, 4, 2),
        mlp_ratio: float = 4.0,
        pos_embed_size: tuple[int, int] = (56, 56),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        last = len(depths) - 1
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry a stage ({len(depths)}), got {num_heads}")
        if len(sr_ratios) < last or not set(sr_ratios) <= set(GROUPS):
            raise ValueError(f"sr_ratios must be {last} of {', '.join(map(str, sorted(GROUPS)))}, got {sr_ratios}")
        rates = drop_path_rates(drop_path_rate, depths)

        def block(cls: type[Block], mixer: nn.Module, dim: int, drop_path: float) -> Block:
            mlp = ConvMlp(dim, int(dim * mlp_ratio), 3, InplaceGELU, proj_drop_rate, act_last=True, **dd)
            return cls(dim, mixer, drop_path=drop_path, norm_layer=Norm, mlp_conv=mlp, **dd)

        def unit(stage: int, index: int, dim: int, _: float) -> nn.Module:
            heads = num_heads[stage]
            if stage == last:
                return block(Block, LocalSumAttention(dim, heads, proj_drop_rate, **dd), dim, rates[stage][index])
            ratio, (first, *second) = sr_ratios[stage], rates[stage][2 * index : 2 * index + 2]
            hybrid = HybridScaleAttention(dim, heads, ratio, proj_drop=proj_drop_rate, **dd)
            hybrid = block(HybridBlock, hybrid, dim, first)
            if not second:
                return GuidedPair(hybrid, None)
            guided = SelfGuidedAttention(dim, heads, **GROUPS[ratio], proj_drop=proj_drop_rate, **dd)
            return GuidedPair(hybrid, block(GuidedBlock, guided, dim, second[0]))

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=Stem(in_chans, embed_dim, pos_embed_size, **dd),
            downsample=partial(Downsample, **dd),
            block=unit,
            norm=Norm(dims[-1], **dd),
            dims=dims,
            depths=[(depth + 1) // 2 for depth in depths[:-1]] + [depths[-1]],
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As the authors: convolutions by what fans out of an input, normal of variance 2 / fan-out."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DepthwiseConv)):
                groups = module.groups if isinstance(module, nn.Conv2d) else len(module.weight)
                nn.init.normal_(module.weight, std=(2 * groups / module.weight[:, 0].numel()) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "sgformer_small": dict(embed_dim=64, depths=(2, 4, 16, 1), num_heads=(2, 4, 8, 16), drop_path_rate=0.1),
    "sgformer_medium": dict(embed_dim=64, depths=(2, 6, 28, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.2),
    "sgformer_base": dict(embed_dim=96, depths=(4, 6, 24, 2), num_heads=(4, 6, 12, 24), drop_path_rate=0.4),
}

# The authors offer the weights in a shared folder without direct links.
default_cfgs = generate_default_cfgs({
    f"{variant}.in1k": imagenet_cfg(
        crop_pct=0.9, first_conv="stem.conv1", paper_ids="arXiv:2308.12216",
        origin_url="https://github.com/OliverRensu/SG-Former",
    )
    for variant in VARIANTS
})

register_variants(__name__, VARIANTS, create_from(SGFormer))
