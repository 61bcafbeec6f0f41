"""Isotropic NAT and DiNAT, and the ViT-rpb they are compared with (DiNAT, section 4.4).

Paper: Dilated Neighborhood Attention Transformer, https://arxiv.org/abs/2209.15001
Authors' code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)

Columns of equal blocks on 16x16 patches, like ViT's, without class token or absolute position. Differences to the
authors' code: any input size works, the bias table of ViT-rpb is resampled.
"""
from collections.abc import Sequence

from timm.models import generate_default_cfgs

from ..backbones import Block, Columnar
from ..mixers import NeighborhoodAttention, RelativeAttention
from ._registry import create_from, register_variants
from .nat import Norm, checkpoint_filter_fn, dinat_cfg, patch_stem


class NATColumn(Columnar):
    """Isotropic NAT and DiNAT, and ViT-rpb.

    Args:
        patch_size: pixels a token, per axis.
        embed_dim, depth, num_heads: width, blocks, heads of all blocks.
        kernel_size: window, in tokens a side; None for attention to the whole map (ViT-rpb).
        dilations: one a block, a shorter list repeats.
        map_size: tokens a side that the bias table of ViT-rpb is learned at.
        The rest is as in `NAT`.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilations: Sequence[int] = (1,),
        map_size: int = 14,
        mlp_ratio: float = 4.0,
        pad_mode: str = "natten14",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(index: int, dim: int, drop_path: float) -> Block:
            if kernel_size is None:
                mixer = RelativeAttention(dim, num_heads, (map_size, map_size), proj_drop=proj_drop_rate, **dd)
            else:
                mixer = NeighborhoodAttention(
                    dim, num_heads, kernel_size, dilations[index % len(dilations)],
                    pad_mode=pad_mode, proj_drop=proj_drop_rate, **dd,
                )
            return Block(dim, mixer, mlp_ratio, None, drop_path, proj_drop_rate, norm_layer=Norm, **dd)

        super().__init__(
            stem=patch_stem(patch_size, in_chans, embed_dim, **dd),
            block=block,
            norm=Norm(embed_dim, **dd),
            embed_dim=embed_dim,
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            stem_stride=patch_size,
            **dd,
        )


_SMALL = dict(embed_dim=384, num_heads=12, drop_path_rate=0.1)
_BASE = dict(embed_dim=768, num_heads=24, drop_path_rate=0.4)

VARIANTS = {
    "nat_isotropic_small": _SMALL,
    "nat_isotropic_base": _BASE,
    "dinat_isotropic_small": _SMALL | dict(dilations=(1, 2)),
    "dinat_isotropic_base": _BASE | dict(dilations=(1, 2)),
    "vitrpb_small": _SMALL | dict(kernel_size=None),
    "vitrpb_base": _BASE | dict(kernel_size=None),
}

default_cfgs = generate_default_cfgs({
    f"{variant}.in1k": dinat_cfg(f"isotropic/{variant}_in1k_224", first_conv="stem.proj", pool_size=(14, 14))
    for variant in VARIANTS
})


register_variants(__name__, VARIANTS, create_from(NATColumn))
