"""VSSD: vision state-space duality without causality, softmax attention in the last stage.

Paper: VSSD: Vision Mamba with Non-Causal State Space Duality, https://arxiv.org/abs/2407.18559
Authors' code and weights: https://github.com/YuHengsss/VSSD

Mamba-2's decay is one number a head and token. Where tokens have no order, as in an image, VSSD keeps of it only what a
token weighs: all tokens add to one state, and all read from it. That is linear attention whose keys are weighted by
their time steps, and needs no scan. The frame (stem, downsampling, positional convolutions) is MILA's.
"""
from collections.abc import Sequence
from functools import partial

from timm.layers import LayerNorm
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Block, Pyramid, keep_native, renamed
from ..mixers import NonCausalSSD, SoftmaxAttention
from ._registry import create_from, imagenet_cfg, register_variants
from .mila import FRAME_KEYS, Downsample, Stem

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        *FRAME_KEYS,
        (r"\.attn\.to_qkv\.", ".mixer.qkv."),
        (r"\.attn\.to_out\.", ".mixer.proj."),
        (r"\.attn\.conv2d\.", ".mixer.conv."),
        (r"\.attn\.", ".mixer."),
    ]
    return {renamed(key, renames): value for key, value in state_dict.items()}


class VSSD(Pyramid):
    """VSSD.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths, num_heads: per stage.
        d_state: N, rows of a head's state.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        attention_stages: how many stages, up to the last, have softmax attention.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
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
        d_state: int = 64,
        mlp_ratio: float = 4.0,
        attention_stages: int = 1,
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
            heads = num_heads[stage]
            if stage < len(depths) - attention_stages:
                mixer = NonCausalSSD(dim, heads, d_state, proj_drop=proj_drop_rate, **dd)
            else:
                mixer = SoftmaxAttention(dim, heads, qkv_bias=False, proj_drop=proj_drop_rate, **dd)
            return Block(
                dim, mixer, mlp_ratio, None, drop_path, proj_drop_rate, norm_layer=Norm, cpe1=3, cpe2=3, **dd
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
    "vssd_micro": dict(embed_dim=48, depths=(2, 2, 8, 4), num_heads=(2, 4, 8, 16), d_state=48, drop_path_rate=0.1),
    "vssd_tiny": dict(embed_dim=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16), drop_path_rate=0.2),
    "vssd_small": dict(embed_dim=64, depths=(3, 4, 21, 5), num_heads=(2, 4, 8, 16), drop_path_rate=0.4),
    "vssd_base": dict(embed_dim=96, depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24), drop_path_rate=0.6),
}

# "mesa": trained with MESA, a distillation from averaged weights.
_FILES = {
    "vssd_micro.in1k": "vssd_micro_best",
    "vssd_tiny.mesa_in1k": "vssd_tiny_e300_with_mesa",
    "vssd_tiny.in1k": "vssd_tiny_best_ema",
    "vssd_small.mesa_in1k": "vssd_small_e300_with_mesa",
    "vssd_small.in1k": "vssd_small_best_ema",
    "vssd_base.mesa_in1k": "vssd_base_e300_with_mesa",
    "vssd_base.in1k": "vssd_base_best_ema",
}

default_cfgs = generate_default_cfgs({
    tag: imagenet_cfg(
        f"https://huggingface.co/YuhengSSS/VSSD/resolve/main/{file}.pth", first_conv="stem.conv1.0",
        paper_ids="arXiv:2407.18559", origin_url="https://github.com/YuHengsss/VSSD",
    )
    for tag, file in _FILES.items()
})


register_variants(__name__, VARIANTS, create_from(VSSD))
