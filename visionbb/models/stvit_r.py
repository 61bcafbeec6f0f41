"""STViT-R-Swin: a Swin whose long third stage runs on a few semantic tokens, and recovers the map from them.

Paper: Making Vision Transformers Efficient from A Token Sparsification View, https://arxiv.org/abs/2303.08685
Authors' code and weights: https://github.com/changsn/STViT-R (MIT)

The third stage is a row of dumbbells, six layers each. A Swin block works on the whole map; the next two draw semantic
tokens from it, nine for each window: their places are those of the largest values, their content what these attend to,
first around the window, then in the whole map. Two layers let semantic tokens attend to each other, in their window
and everywhere. In the last, all tokens of the map attend to the semantic ones, and a full map goes on to the next
dumbbell, so that detectors and segmenters have one.

Differences to the authors' code: any image size, where theirs takes the map of 14 x 14 tokens of a 224 image alone (see
`Dumbbell`); keys and values are projected before the patches that overlap are cut, not after; downsampling stands at
the start of a stage.
"""
import re
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ..backbones import Block, Pyramid, keep_native, renamed
from ..backbones.backbone import drop_path_rates
from ..backbones.layers import conv_norm_acts
from ..mixers import CrossAttention, PatchCrossAttention, ShiftedWindowAttention, SoftmaxAttention, WindowAttention
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)

DUMBBELLS = 2  # the stage that consists of them
LAYERS = ("local", "generate", "refine", "near", "far", "recover")  # of a dumbbell


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours, and puts projections of the same tokens together."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^patch_embed\.proj\.(\d)\.c\.", lambda m: f"stem.proj.{3 * int(m[1]) // 2}."),
        (r"^patch_embed\.proj\.(\d)\.bn\.", lambda m: f"stem.proj.{3 * int(m[1]) // 2 + 1}."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (rf"^layers\.{DUMBBELLS}\.blocks\.(\d+)",
         lambda m: f"stages.{DUMBBELLS}.blocks.{int(m[1]) // len(LAYERS)}.{LAYERS[int(m[1]) % len(LAYERS)]}"),
        (r"^layers\.", "stages."),
        (r"\.attn\.relative_position_bias_table$", ".mixer.rpb"),
        (r"\.attn\.", ".mixer."),
        (r"\.layer_scale_([12])$", r".ls\1.gamma"),
        (r"^head\.", "head.fc."),
    ]
    out = {}
    for key, value in state_dict.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue  # computed from the size of the map
        key = renamed(key, renames)
        if key.endswith(".rpb"):  # theirs are of query - key
            side = round(value.shape[0] ** 0.5)
            value = value.view(side, side, -1).permute(2, 0, 1).flip(1, 2)
        out[key] = value
    for key in [key for key in out if re.search(r"\.(near|far)\.mixer\.q\.", key)]:
        keys_and_values = out.pop(key.replace(".q.", ".kv."))
        out[key.replace(".q.", ".qkv.")] = torch.cat((out.pop(key), keys_and_values))
    return out


class Stem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, H/4, W/4, dim): two 3x3 convolutions of stride 2, normed, hard-swish."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        layers = ((dim // 2, 3, 2), (dim, 3, 2))
        act = partial(nn.Hardswish, inplace=True)
        self.proj = conv_norm_acts(in_chans, layers, act, bias=False, device=device, dtype=dtype).append(act())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class CrossBlock(Block):
    """A `Block` whose tokens attend to others: x (B, N, dim), y (B, M, dim)."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.ls1(x, self.drop_path1(self.mixer(self.norm1(x), self.norm1(y))))
        return self.ls2(x, self.drop_path2(self.mlp(self.norm2(x))))


class GenerateBlock(Block):
    """A `CrossBlock` whose tokens, pooled of the others, only ask: nothing of them is kept, so no answer is dropped."""

    def forward(self, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        s = self.mixer(self.norm1(s), self.norm1(x))
        gain = self.ls1.gamma
        if gain is not None:
            s = s * gain
        return self.ls2(s, self.drop_path2(self.mlp(self.norm2(s))))


@register_notrace_module  # windows by the size of the map
class Dumbbell(nn.Module):
    """From a map to semantic tokens and back, on (B, H, W, dim) of any H, W.

    As few windows as may be, none with a side above `window_size`, share the map evenly, and each has `tokens` x
    `tokens` semantic tokens. Where sides are multiples of the window, windows are those of Swin; elsewhere neighbours
    overlap by a row or a column, and nothing is padded.

    Args:
        local: on the map.
        generate: (semantic tokens as a map, the map) -> semantic tokens.
        refine: (semantic tokens as a sequence, these and those of the map) -> semantic tokens.
        near, far: on the map of semantic tokens.
        recover: (tokens of the map, semantic tokens), sequences -> tokens of the map.
    """

    def __init__(
        self,
        local: Block,
        generate: GenerateBlock,
        refine: CrossBlock,
        near: Block,
        far: Block,
        recover: CrossBlock,
        window_size: int = 7,
        tokens: int = 3,
    ):
        super().__init__()
        self.local = local
        self.generate = generate
        self.refine = refine
        self.near = near
        self.far = far
        self.recover = recover
        self.window_size = window_size
        self.tokens = tokens

    def semantic_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """What they begin as: the largest values in each of the parts of a window, (B, n * tokens, m * tokens, dim)."""
        rows, cols = ((side + self.window_size - 1) // self.window_size * self.tokens for side in x.shape[1:3])
        return largest(largest(x, rows, 1), cols, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.local(x)
        H, W = x.shape[1], x.shape[2]
        s = self.generate(self.semantic_tokens(x), x)
        rows, cols = s.shape[1], s.shape[2]
        x, s = x.flatten(1, 2), s.flatten(1, 2)
        s = self.refine(s, torch.cat((s, x), 1)).unflatten(1, (rows, cols))
        s = self.far(self.near(s)).flatten(1, 2)
        return self.recover(x, s).unflatten(1, (H, W))


def largest(x: torch.Tensor, parts: int, axis: int) -> torch.Tensor:
    """Adaptive max pooling along one axis: the largest values of equal parts, which overlap where they share a place.

    ONNX has no operator for it.
    """
    length = x.shape[axis]
    part = torch.arange(parts, device=x.device)[:, None]
    begin, end = part * length // parts, ((part + 1) * length + parts - 1) // parts
    longest = (length + parts - 1) // parts + 1
    places = torch.minimum(begin + torch.arange(longest, device=x.device), end - 1)
    return x.index_select(axis, places.flatten()).unflatten(axis, (parts, longest)).amax(axis + 1)


class STViTRSwin(Pyramid):
    """STViT-R on Swin.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths: blocks per stage; the third's are dumbbells of six layers.
        num_heads: per stage.
        window_size: tokens a side of a window.
        patch_size: tokens a side of the part of the map that a window's semantic tokens are made of.
        tokens: semantic tokens a side of a window.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        layer_scale: initial gain of the residual branches of semantic tokens and recovery.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout in MLPs and after attention.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 3, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        patch_size: int = 10,
        tokens: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have one entry a stage ({len(depths)}), got {num_heads}")
        layers = [depth * (len(LAYERS) if i == DUMBBELLS else 1) for i, depth in enumerate(depths)]
        rates = drop_path_rates(drop_path_rate, layers)
        options = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, norm_layer=Norm, **dd)
        attention = dict(proj_drop=proj_drop_rate, **dd)

        def unit(stage: int, index: int, dim: int, _: float) -> nn.Module:
            heads = num_heads[stage]

            def swin(shift: int, drop_path: float) -> Block:
                mixer = ShiftedWindowAttention(dim, heads, window_size, shift, **attention)
                return Block(dim, mixer, drop_path=drop_path, **options)

            if stage != DUMBBELLS:
                return swin(window_size // 2 if index % 2 else 0, rates[stage][index])

            first, *others = rates[stage][len(LAYERS) * index : len(LAYERS) * (index + 1)]
            blocks = (
                (GenerateBlock, PatchCrossAttention(dim, heads, window_size, patch_size, tokens, **attention)),
                (CrossBlock, CrossAttention(dim, heads, **attention)),
                (Block, WindowAttention(dim, heads, tokens, **attention)),
                (Block, SoftmaxAttention(dim, heads, **attention)),
                (CrossBlock, CrossAttention(dim, heads, **attention)),
            )
            semantic = [
                cls(dim, mixer, layer_scale=layer_scale, drop_path=rate, **options)
                for (cls, mixer), rate in zip(blocks, others, strict=True)
            ]
            return Dumbbell(swin(0, first), *semantic, window_size=window_size, tokens=tokens)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=Stem(in_chans, embed_dim, **dd),
            downsample=partial(PatchMerging, norm_layer=Norm, **dd),
            block=unit,
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
    "stvit_r_swin_small": dict(embed_dim=96, depths=(2, 2, 3, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "stvit_r_swin_base": dict(embed_dim=128, depths=(2, 2, 3, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.4),
}

default_cfgs = generate_default_cfgs({
    f"stvit_r_swin_{size}.in1k": imagenet_cfg(
        f"https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-{size[0].upper()}.pth", crop_pct=0.9,
        first_conv="stem.proj.0", license="mit", paper_ids="arXiv:2303.08685",
        origin_url="https://github.com/changsn/STViT-R",
    )
    for size in ("small", "base")
})

register_variants(__name__, VARIANTS, create_from(STViTRSwin))
