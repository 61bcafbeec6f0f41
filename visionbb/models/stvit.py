"""STViT on DeiT: after four blocks, a few semantic tokens take the place of all others.

Paper: Making Vision Transformers Efficient from A Token Sparsification View, https://arxiv.org/abs/2303.08685
The authors released STViT-R alone (see stvit_r.py); model_cards/stvit.md says what is known of this one and what was
chosen here.

Of DeiT's twelve blocks, four work on the whole map. Two generate semantic tokens S, which stand for clusters of the
map's tokens X: in the first, centres that are pooled in space ask the map; in the second these, with learned global
centres G added, ask each other and the map once more:

    S = attend(pool(X), X), S = S + MLP(S);    S = S + G, S = S + attend(S, [S - G, X]), S = S + MLP(S).

The map is left behind, and the other six blocks work on 16 tokens where DeiT has 197. There is no class token.
"""
import math
from functools import partial

import torch
from timm.layers import LayerNorm, PatchEmbed, to_2tuple
from timm.models import generate_default_cfgs, register_notrace_module
from torch import nn

from ..backbones import Backbone, Block, Columnar, PositionEmbed
from ..backbones.backbone import drop_path_rates
from ..mixers import CrossAttention, SoftmaxAttention
from ._registry import create_from, imagenet_cfg, register_variants
from .stvit_r import CrossBlock, GenerateBlock, largest

Norm = partial(LayerNorm, eps=1e-6)
checkpoint_filter_fn = Backbone.checkpoint_filter_fn  # there are no checkpoints but ours


@register_notrace_module  # as many tokens as the size of the map asks for
class SemanticTokens(nn.Module):
    """A map (B, H, W, dim) to its semantic tokens (B, H / stride, W / stride, dim), in two layers.

    Args:
        generate: (pooled centres, tokens of the map), sequences -> semantic tokens.
        centres: adds the global centres to semantic tokens as a map.
        refine: (semantic tokens, what they attend to), sequences -> semantic tokens.
        stride: tokens of the map a semantic token, per axis; need not be whole.
    """

    def __init__(self, generate: GenerateBlock, centres: PositionEmbed, refine: CrossBlock, stride: float):
        super().__init__()
        self.generate = generate
        self.centres = centres
        self.refine = refine
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, cols = semantic_side(x.shape[1], self.stride), semantic_side(x.shape[2], self.stride)
        pooled = largest(largest(x, rows, 1), cols, 2).flatten(1, 2)
        x = x.flatten(1, 2)
        s = self.generate(pooled, x)
        queries = self.centres(s.unflatten(1, (rows, cols))).flatten(1, 2)
        return self.refine(queries, torch.cat((s, x), 1)).unflatten(1, (rows, cols))


def semantic_side(length: int, stride: float) -> int:
    """Semantic tokens along an axis of the map: as few as may be, none for more than `stride` of its tokens."""
    return math.ceil(length / stride)


class STViT(Columnar):
    """STViT on DeiT. Its units are `map_depth` blocks on the map, one that generates, and those on semantic tokens.

    Args:
        img_size: pixels, one number or (height, width), of the images that positions and global centres are learned
            at; others get them resampled.
        patch_size: pixels a token of the map, per axis.
        embed_dim, num_heads, mlp_ratio: as in DeiT.
        map_depth: blocks on the map; semantic_depth: those on semantic tokens. Two more generate the latter.
        semantic_stride: tokens of the map a semantic token, per axis: 3.5 makes 4 x 4 of 14 x 14.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.

    Raises:
        ValueError: semantic_stride below 1, or a width that does not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        map_depth: int = 4,
        semantic_depth: int = 6,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        semantic_stride: float = 3.5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if semantic_stride < 1:
            raise ValueError(f"semantic_stride must be at least 1, got {semantic_stride}")
        grid = tuple(math.ceil(side / patch_size) for side in to_2tuple(img_size))
        centres = tuple(semantic_side(side, semantic_stride) for side in grid)
        options = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, norm_layer=Norm, **dd)
        attention = dict(num_heads=num_heads, proj_drop=proj_drop_rate, **dd)
        (rates,) = drop_path_rates(drop_path_rate, [map_depth + 2 + semantic_depth])

        def unit(index: int, dim: int, _: float) -> nn.Module:
            if index != map_depth:
                rate = rates[index if index < map_depth else index + 1]
                return Block(dim, SoftmaxAttention(dim, **attention), drop_path=rate, **options)
            first, second = rates[map_depth : map_depth + 2]
            return SemanticTokens(
                GenerateBlock(dim, CrossAttention(dim, **attention), drop_path=first, **options),
                PositionEmbed(dim, centres, **dd),
                CrossBlock(dim, CrossAttention(dim, **attention), drop_path=second, **options),
                semantic_stride,
            )

        super().__init__(
            stem=PatchEmbed(
                None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True,
                **dd,
            ),
            block=unit,
            norm=Norm(embed_dim, **dd),
            embed_dim=embed_dim,
            depth=map_depth + 1 + semantic_depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            stem_stride=patch_size,
            pos_embed=PositionEmbed(embed_dim, grid, **dd),
            **dd,
        )
        for info in self.feature_info[map_depth:]:
            info["reduction"] = round(patch_size * semantic_stride)


# ---- Variants -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "stvit_deit_tiny": dict(embed_dim=192, num_heads=3, drop_path_rate=0.1),
    "stvit_deit_small": dict(embed_dim=384, num_heads=6, drop_path_rate=0.1),
    "stvit_deit_base": dict(embed_dim=768, num_heads=12, drop_path_rate=0.1),
}

default_cfgs = generate_default_cfgs({
    f"{variant}.untrained": imagenet_cfg(
        pool_size=(4, 4), crop_pct=0.9, first_conv="stem.proj", paper_ids="arXiv:2303.08685",
    )
    for variant in VARIANTS
})

register_variants(__name__, VARIANTS, create_from(STViT))
