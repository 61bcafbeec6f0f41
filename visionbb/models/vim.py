"""Vim: a plain column of Mamba blocks that scan the patches from both ends, with the class token in the middle.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417
Authors' code and weights: https://github.com/hustvl/Vim (Apache-2.0)

ViT's patches, class token and learned positions, but in place of attention and MLP one Mamba block a layer, at a cost
linear in the number of patches. A scan sees what lies before a token, so every block scans twice, from the first patch
and from the last, and the class token stands half-way: each scan has half of the image to tell it. The residual stream
is float32.

Differences to the authors' code: any image size works; the class token carries its position embedding in itself; the
scan from the last patch begins with time steps as Mamba's (theirs with biases of zero).
"""
import argparse
import math

import torch
from timm.layers import resample_abs_pos_embed_nhwc, to_2tuple
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import (
    ClassTokenStem,
    StreamNorm,
    TokenColumnar,
    TokenMixerBlock,
    fold_class_position,
    keep_native,
    renamed,
)
from ..mixers import BidirectionalMamba
from ._registry import create_from, imagenet_cfg, register_variants

# The authors' files hold the command line of their training beside the weights.
torch.serialization.add_safe_globals([argparse.Namespace])


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours; positions are resampled to the model's map.

    Raises:
        ValueError: the position embedding is not that of a class token and a square map.
    """
    state_dict, native = keep_native(state_dict)
    if not native:
        if "cls_token" in state_dict and "pos_embed" in state_dict:
            folded = fold_class_position(state_dict.pop("cls_token"), state_dict.pop("pos_embed"), middle=True)
            state_dict |= folded
        renames = [
            (r"^patch_embed\.", "stem.patch_embed."),
            (r"^layers\.", "blocks."),
            (r"(\.\d+)\.norm\.", r"\1.norm1."),
            (r"^norm_f\.", "norm."),
            (r"^head\.", "head.fc."),
            (r"\.mixer\.A_b_log$", ".mixer.s6_reverse.A_log"),
            (r"\.mixer\.(D|conv1d|x_proj|dt_proj)_b\b", r".mixer.s6_reverse.\1"),
            (r"\.mixer\.(A_log|D|conv1d|x_proj|dt_proj)\b", r".mixer.s6.\1"),
            (r"\.conv1d\.", ".conv."),
            (r"\.(x_proj|dt_proj)\.weight$", r".\1"),
            (r"\.dt_proj\.bias$", ".dt_bias"),
        ]
        state_dict = {renamed(key, renames): value for key, value in state_dict.items()}
    if "stem.pos_embed" in state_dict:
        size = model.stem.pos_embed.shape[1:3]
        learned = state_dict["stem.pos_embed"]
        state_dict["stem.pos_embed"] = resample_abs_pos_embed_nhwc(learned, size, antialias=False)
    return state_dict


class Vim(TokenColumnar):
    """Vision Mamba.

    Args:
        img_size: pixels, one number or (height, width), of the images that positions are learned at; others get them
            resampled.
        patch_size: pixels of a patch, per axis.
        stride: pixels from one patch to the next; patches overlap where it is smaller than patch_size.
        embed_dim, depth: width and number of blocks.
        d_state: numbers that a channel's state is made of.
        global_pool: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for none.
        drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout after the scans.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        padded = (math.ceil(side / patch_size) * patch_size for side in to_2tuple(img_size))
        grid = tuple((side - patch_size) // stride + 1 for side in padded)

        def block(index: int, dim: int, drop_path: float) -> TokenMixerBlock:
            mixer = BidirectionalMamba(dim, d_state, proj_drop=proj_drop_rate, **dd)
            return TokenMixerBlock(dim, mixer, drop_path, StreamNorm, **dd)

        super().__init__(
            stem=ClassTokenStem(
                patch_size, in_chans, embed_dim, grid, stride, middle=True, antialias=False, **dd
            ),
            block=block,
            norm=StreamNorm(embed_dim, **dd),
            embed_dim=embed_dim,
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            stem_stride=stride,
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As the authors: the mixers' linear layers as PyTorch's, what they add to the stream over sqrt(depth)."""
        super().init_weights(needs_reset)
        for block in self.blocks:
            block.mixer.in_proj.reset_parameters()
            block.mixer.out_proj.reset_parameters()
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))


# ---- Variants -------------------------------------------------------------------------------------------------------

# "stride8" are the authors' Vim-Ti+ and Vim-S+: the same networks, fine-tuned on four times as many patches.
VARIANTS = {
    "vim_tiny": dict(embed_dim=192),
    "vim_tiny_stride8": dict(embed_dim=192, stride=8),
    "vim_small": dict(embed_dim=384, drop_path_rate=0.05),
    "vim_small_stride8": dict(embed_dim=384, stride=8),
    "vim_base": dict(embed_dim=768, drop_path_rate=0.1),
}

_FILES = {
    "vim_tiny": "Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc",
    "vim_tiny_stride8": "Vim-tiny-midclstok/resolve/main/vim_t_midclstok_ft_78p3acc",
    "vim_small": "Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc",
    "vim_small_stride8": "Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc",
    "vim_base": "Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc",
}

default_cfgs = generate_default_cfgs({
    f"{variant}.in1k": imagenet_cfg(
        f"https://huggingface.co/hustvl/{file}.pth", pool_size=None, first_conv="stem.patch_embed.proj",
        license="apache-2.0", paper_ids="arXiv:2401.09417", origin_url="https://github.com/hustvl/Vim",
    )
    for variant, file in _FILES.items()
})


register_variants(__name__, VARIANTS, create_from(Vim))
