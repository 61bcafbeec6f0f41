"""LookupViT: a ViT whose work is done on a few compressed tokens, beside a full map that they look things up in.

Paper: LookupViT: Compressing visual information to a limited number of tokens, https://arxiv.org/abs/2407.12753
No public code of the authors: model_cards/lookupvit.md says what is known of the network and what was chosen here.

Two streams of tokens go through the column: lookup tokens L, the patches of a ViT on their full map, and compressed
tokens Z, that map resized to a few tokens a side. In every block Z gathers from L, passes through an ordinary ViT
block, and is handed back to L by the weights it gathered with; L itself only has a small MLP:

    Z = Z + MHBC(Z, L);    Z = ViTBlock(Z);    L = L + MHBC^T(Z);    L = L + MLP(L).

Cost is linear in the number of patches, and L keeps a map for detectors and segmenters. No parameter depends on the
number of compressed tokens: it may change from one call to the next.
"""
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm, PatchEmbed, get_device_dtype, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_notrace_module
from torch import nn

from ..backbones import Backbone, Block, Columnar, PositionEmbed
from ..backbones.layers import TokenMlp
from ..mixers import BidirectionalCrossAttention, SoftmaxAttention
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)
checkpoint_filter_fn = Backbone.checkpoint_filter_fn  # there are no checkpoints but ours
Streams = tuple[torch.Tensor, torch.Tensor]  # compressed tokens (B, rows, columns, dim), lookup tokens (B, H, W, dim)


def checked_size(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    rows, cols = to_2tuple(size)
    if rows < 1 or cols < 1:
        raise ValueError(f"{name} must be at least 1 a side, got {size}")
    return rows, cols


@register_notrace_module  # asks for the size of the map
class Compress(nn.Module):
    """The map of lookup tokens (B, H, W, dim) to that of compressed tokens, (B, rows, columns, dim), bilinear.

    Where the map shrinks all of its tokens take part (antialiasing). Arguments as in `LookupViT`.
    """

    def __init__(self, size: int | tuple[int, int], train_sizes: Sequence[int | tuple[int, int]] = ()):
        super().__init__()
        self.size = checked_size(size, "compressed_size")
        self.train_sizes = [checked_size(size, "train_sizes") for size in train_sizes]

    def drawn(self) -> tuple[int, int]:
        if torch.jit.is_scripting():
            return self.size
        else:
            if self.training and self.train_sizes:
                return self.train_sizes[int(torch.randint(len(self.train_sizes), ()))]
            return self.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.drawn()
        wide = x if x.dtype == torch.float64 else x.float()
        z = F.interpolate(wide.permute(0, 3, 1, 2), list(size), mode="bilinear", antialias=True)
        return z.permute(0, 2, 3, 1).to(x.dtype)


@register_notrace_module  # sequences and back, by the size of the maps
class LookupBlock(nn.Module):
    """Compressed tokens z (B, rows, columns, dim) and lookup tokens x (B, H, W, dim), one block further.

    Args:
        num_heads: of the attention between the streams and of that inside z.
        mlp_ratio: hidden width of the MLP of z over dim.
        lookup_mlp_ratio: of the MLP of x.
        drop_path: probability of dropping a residual branch, per sample.
        proj_drop: dropout in the MLPs and after attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_compressed = Norm(dim, **dd)
        self.norm_lookup = Norm(dim, **dd)
        self.cross = BidirectionalCrossAttention(dim, num_heads, proj_drop=proj_drop, **dd)
        self.refine = Block(
            dim, SoftmaxAttention(dim, num_heads, proj_drop=proj_drop, **dd), mlp_ratio, None, drop_path, proj_drop,
            norm_layer=Norm, **dd,
        )
        self.norm_back = Norm(dim, **dd)
        self.norm_mlp = Norm(dim, **dd)
        self.mlp = TokenMlp(dim, int(dim * lookup_mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> Streams:
        found, weights = self.cross.gather(self.norm_compressed(z).flatten(1, 2), self.norm_lookup(x).flatten(1, 2))
        z = self.refine(z + self.drop_path(found).view(z.shape))
        given = self.cross.hand_back(self.norm_back(z).flatten(1, 2), weights)
        x = x + self.drop_path(given).view(x.shape)
        return z, x + self.drop_path(self.mlp(self.norm_mlp(x)))


class LookupHead(ClassifierHead):
    """Both streams pooled by themselves, their mean, dropout and classifier.

    Without pooling ("") it gives all tokens as a sequence, (B, rows * columns + H * W, dim), compressed tokens first.
    """

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0, device=None,
        dtype=None,
    ):
        super().__init__(in_features, num_classes, pool_type, drop_rate, input_fmt="NHWC", device=device, dtype=dtype)

    def forward(self, streams: list[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        z, x = streams[0], streams[1]
        if self.global_pool.is_identity():
            x = torch.cat((z.flatten(1, 2), x.flatten(1, 2)), 1)
        else:
            x = 0.5 * (self.global_pool(z) + self.global_pool(x))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class LookupViT(Columnar):
    """LookupViT. Intermediates are maps of lookup tokens; `forward_features` gives both streams.

    Args:
        img_size: pixels, one number or (height, width), of the images that positions are learned at; others get them
            resampled.
        patch_size: pixels a lookup token, per axis.
        embed_dim, depth, num_heads, mlp_ratio: as in ViT.
        lookup_mlp_ratio: hidden width of the MLP of lookup tokens over embed_dim.
        compressed_size: compressed tokens, one number a side or (rows, columns); `set_compressed_size` changes it.
        train_sizes: such sizes, one of which is drawn at random for every batch in training; none: compressed_size.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.

    Raises:
        ValueError: a size below 1, or a width that does not fit.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        compressed_size: int | tuple[int, int] = 7,
        train_sizes: Sequence[int | tuple[int, int]] = (),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        grid = tuple(math.ceil(side / patch_size) for side in to_2tuple(img_size))

        def block(index: int, dim: int, drop_path: float) -> LookupBlock:
            return LookupBlock(dim, num_heads, mlp_ratio, lookup_mlp_ratio, drop_path, proj_drop_rate, **dd)

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
            head=LookupHead(embed_dim, num_classes, global_pool, drop_rate, **dd),
            stem_stride=patch_size,
            pos_embed=PositionEmbed(embed_dim, grid, **dd),
            **dd,
        )
        self.blocks = nn.ModuleList(self.blocks)  # a Sequential passes one argument on, these take two
        self.norm_compressed = Norm(embed_dim, **dd)
        self.compress = Compress(compressed_size, train_sizes)

    @torch.jit.ignore
    def set_compressed_size(self, size: int | tuple[int, int]) -> None:
        """As many compressed tokens from now on, with the same weights: one number a side, or (rows, columns)."""
        self.compress.size = checked_size(size, "compressed_size")

    def forward_stem(self, x: torch.Tensor) -> Streams:
        x = self.pos_embed(self.stem(x))
        return self.compress(x), x

    def forward_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, in_chans, H, W) to normed tokens: compressed ones (B, rows, columns, num_features) and lookup tokens
        (B, H / patch_size, W / patch_size, num_features)."""
        z, x = self.forward_stem(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                z, x = checkpoint(block, z, x)
            else:
                z, x = block(z, x)
        return self.final_norm((z, x))

    def forward_head(self, x: list[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """Both streams to (B, num_classes), or to (B, head_hidden_size) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward_unit(self, unit: nn.Module, x: Streams) -> Streams:
        return checkpoint(unit, *x) if self.grad_checkpointing else unit(*x)

    def as_map(self, x: Streams) -> torch.Tensor:
        return x[1]

    def final_norm(self, x: Streams) -> list[torch.Tensor]:
        return [self.norm_compressed(x[0]), self.norm(x[1])]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        head = self.head
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or self.head is not head:  # which alone reads them
            self.norm_compressed = nn.Identity()
        return take

    def bare_head(self) -> nn.Module:
        return LookupHead(self.num_features, 0, "", **get_device_dtype(self))


# ---- Variants -------------------------------------------------------------------------------------------------------

_WIDTHS = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}

VARIANTS = {
    f"lookupvit_{width}_patch16_{side}x{side}": dict(compressed_size=side, **args)
    for width, args in _WIDTHS.items()
    for side in (5, 7, 10)
}

default_cfgs = generate_default_cfgs({
    f"{variant}.untrained": imagenet_cfg(pool_size=None, first_conv="stem.proj", paper_ids="arXiv:2407.12753")
    for variant in VARIANTS
})

register_variants(__name__, VARIANTS, create_from(LookupViT))
