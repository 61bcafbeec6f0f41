"""Flowformer: a pyramid of flow attention, which conserves the flow through sources (keys) and sinks (queries).

Paper: Flowformer: Linearizing Transformers with Conservation Flows, https://arxiv.org/abs/2202.06258
Authors' code: https://github.com/thuml/Flowformer (MIT)

Non-overlapping patches, a learned position embedding before the first stage, twelve heads in every stage, and layer
scale on the MLP alone.

Differences to the authors' code: the position embedding is resampled, so that any image will do.
"""
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Block, PatchConv, PositionEmbed, Pyramid, keep_native, renamed
from ..backbones.block import Residual
from ..mixers import LinearAttention
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^patch_embed\.0\.", "stem."),
        (r"^patch_embed\.(\d+)\.", r"stages.\1.downsample."),
        (r"^blocks\.(\d+)\.", r"stages.\1.blocks."),
        (r"^pos_embed$", "stem.pos_embed.weight"),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma$", ".ls2.gamma"),
        (r"^head\.", "head.fc."),
    ]
    out = {}
    for key, value in state_dict.items():
        if key.endswith(("total_ops", "total_params")):
            continue  # an operation counter's
        key = renamed(key, renames)
        out[key] = value
    if "stem.pos_embed.weight" in out:
        out["stem.pos_embed.weight"] = model.stem.pos_embed.resampled(out["stem.pos_embed.weight"])
    return out


class Stem(nn.Module):
    """Patches of 4x4 pixels and their positions."""

    def __init__(self, in_chans: int, dim: int, pos_embed_size: tuple[int, int], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = PatchConv(in_chans, dim, 4, **dd)
        self.pos_embed = PositionEmbed(dim, pos_embed_size, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.pos_embed(x.permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Patches of 2x2 tokens, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = PatchConv(in_dim, dim, 2, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Flowformer(Pyramid):
    """Flowformer.

    Args:
        dims, depths: per stage.
        num_heads: in every stage.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        layer_scale: initial gain of the MLPs' branches; attention's branches have none.
        pos_embed_size: (rows, columns) of the map that the position embedding is learned at.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        pos_embed_size: tuple[int, int] = (56, 56),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
            mixer = LinearAttention(
                dim, num_heads, "sigmoid", "flow", normalizer="none", proj_drop=proj_drop_rate, **dd
            )
            block = Block(dim, mixer, mlp_ratio, layer_scale, drop_path, proj_drop_rate, norm_layer=Norm, **dd)
            block.ls1 = Residual(dim)
            return block

        super().__init__(
            stem=Stem(in_chans, dims[0], pos_embed_size, **dd),
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

VARIANTS = {"flowformer_19l": dict(dims=(96, 192, 384, 768), depths=(3, 3, 10, 3), drop_path_rate=0.2)}

# The authors offer the weights in a shared folder without direct links.
default_cfgs = generate_default_cfgs({
    "flowformer_19l.in1k": imagenet_cfg(
        first_conv="stem.proj", license="mit", paper_ids="arXiv:2202.06258",
        origin_url="https://github.com/thuml/Flowformer",
    ),
})

register_variants(__name__, VARIANTS, create_from(Flowformer))
