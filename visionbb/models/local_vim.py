"""LocalVim: a plain column of Mamba blocks that walk the map along four routes, chosen for each layer.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan, https://arxiv.org/abs/2403.09338
Authors' code and weights: https://github.com/hunto/LocalMamba (Apache-2.0)

Vim's blocks with LocalVMamba's routes: a scan along each of four, with its own convolution and parameters, and a gate
on the channels of its result before the sum. There is no class token: tokens are averaged. In every layer the residual
stream, which is float32, turns with the place of its tokens on the map (a rotary embedding of the whole width), beside
learned positions at the stem. The later models with a class token in the middle of the routes, as Vim has it, do
without the turning.

Differences to the authors' code: any image size works; on maps of other sizes angles are scaled to the map of the
training, as theirs are where the image size is given, but not resampled as tables; time steps begin as Mamba's (theirs
with biases of zero); columns are right for maps that are not square, too.
"""
import math
from collections.abc import Sequence

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed_nhwc, to_2tuple
from timm.models import generate_default_cfgs, register_notrace_module
from torch import nn

from ..backbones import (
    ClassTokenStem,
    Columnar,
    MixerBlock,
    PositionEmbed,
    StreamNorm,
    TokenColumnar,
    TokenMixerBlock,
    fold_class_position,
    keep_native,
    renamed,
)
from ..mixers import LocalMamba
from ._registry import create_from, register_variants
from .local_vmamba import cfg, searched


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours; positions are resampled to the model's map.

    Raises:
        ValueError: the position embedding is not that of a square map, with a class token if the model has one.
    """
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    if "cls_token" in state_dict:
        folded = fold_class_position(state_dict.pop("cls_token"), state_dict.pop("pos_embed"), middle=True)
        size = model.stem.pos_embed.shape[1:3]
        folded["stem.pos_embed"] = resample_abs_pos_embed_nhwc(folded["stem.pos_embed"], size, antialias=False)
        state_dict |= folded
    elif "pos_embed" in state_dict:
        state_dict["pos_embed.weight"] = model.pos_embed.resampled(state_dict.pop("pos_embed"))
    stem = "stem.patch_embed." if isinstance(model, TokenColumnar) else "stem."
    renames = [
        (r"^patch_embed\.", stem),
        (r"^layers\.", "blocks."),
        (r"^(blocks\.\d+)\.norm\.", r"\1.norm1."),
        (r"^norm_f\.", "norm."),
        (r"^head\.", "head.fc."),
        (r"\.(A_log|D|conv1d|x_proj|dt_proj)_(\d)\b", r".s6.\2.\1"),
        (r"\.conv1d\.", ".conv."),
        (r"\.(x_proj|dt_proj)\.weight$", r".\1"),
        (r"\.dt_proj\.bias$", ".dt_bias"),
        (r"\.global_reduce\.", ".fc1."),
        (r"\.channel_select\.", ".fc2."),
    ]
    out = {}
    for key, value in state_dict.items():
        if key.startswith("rope."):
            continue  # computed from the size of the map
        key = renamed(key, renames)
        out[key] = value
    return out


@register_notrace_module  # angles by the size of the map
class MapRotary(nn.Module):
    """Turns pairs of neighbouring channels by angles that grow with the row or the column: on (B, H, W, dim).

    The first half of the pairs turns with the row, the second with the column, pair j of a half by base ** (-4 j / dim)
    a token on a map of `size` tokens a side; on any other, angles span the same range.
    """

    def __init__(self, dim: int, size: int = 14, base: float = 10000.0):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        self.pairs, self.size, self.base = dim // 4, size, base

    def angles(self, length: int, x: torch.Tensor) -> torch.Tensor:
        frequency = self.base ** (torch.arange(self.pairs, device=x.device, dtype=x.dtype) / -self.pairs)
        return torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * (self.size / length) * frequency

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, H, W, _ = x.shape
        rows, cols = self.angles(H, x)[:, None].expand(-1, W, -1), self.angles(W, x).expand(H, -1, -1)
        angle = torch.cat((rows, cols), -1)
        cos, sin = angle.cos(), angle.sin()
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@register_notrace_module  # the type of the stream
class RotaryMixerBlock(MixerBlock):
    """Mamba's block on a stream that turns first; on (B, H, W, dim), float32 at least."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__(dim, mixer, drop_path, StreamNorm, device=device, dtype=dtype)
        self.rotary = MapRotary(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rotary(x.to(torch.promote_types(x.dtype, torch.float32)))
        return x + self.drop_path1(self.mixer(self.norm1(x)))


def init_outputs_(blocks: Sequence[MixerBlock]) -> None:
    """As the authors: what the mixers add to the stream as PyTorch's linear layers, over sqrt(depth)."""
    for block in blocks:
        block.mixer.out_proj.reset_parameters()
        with torch.no_grad():
            block.mixer.out_proj.weight.div_(math.sqrt(len(blocks)))


class LocalVim(Columnar):
    """LocalVim.

    Args:
        img_size: pixels, one number or (height, width), of the images that positions are learned at; others get them
            resampled.
        patch_size: pixels of a patch, per axis.
        embed_dim, depth: width, a multiple of 4, and number of blocks.
        routes: of each block, in the words of `visionbb.kernels.scan_routes`; a shorter list repeats.
        d_state: numbers that a channel's state is made of.
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout after the scans.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 20,
        routes: Sequence[Sequence[str]] = (("row", "row_reversed", "window2", "window2_reversed"),),
        d_state: int = 16,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(index: int, dim: int, drop_path: float) -> RotaryMixerBlock:
            mixer = LocalMamba(dim, routes[index % len(routes)], d_state, proj_drop=proj_drop_rate, **dd)
            return RotaryMixerBlock(dim, mixer, drop_path, **dd)

        grid = tuple(-(-side // patch_size) for side in to_2tuple(img_size))
        super().__init__(
            stem=PatchEmbed(
                None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True,
                **dd,
            ),
            pos_embed=PositionEmbed(embed_dim, grid, antialias=False, **dd),
            block=block,
            norm=StreamNorm(embed_dim, **dd),
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

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        init_outputs_(self.blocks)

    def forward_units(
        self, x: torch.Tensor, units: nn.Module, take: Sequence[int], norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, taken = super().forward_units(x, units, take, norm)
        return x, [t.to(self.pos_embed.weight.dtype) for t in taken]  # the stream may be wider than the parameters


class ClassTokenLocalVim(TokenColumnar):
    """LocalVim with a class token in the middle of every route, for the rotary embedding.

    Args:
        global_pool: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for none.
        The rest is as in `LocalVim`.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 20,
        routes: Sequence[Sequence[str]] = (("row", "row_reversed", "window2", "window2_reversed"),),
        d_state: int = 16,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}

        def block(index: int, dim: int, drop_path: float) -> TokenMixerBlock:
            mixer = LocalMamba(dim, routes[index % len(routes)], d_state, proj_drop=proj_drop_rate, **dd)
            return TokenMixerBlock(dim, mixer, drop_path, StreamNorm, **dd)

        grid = tuple(-(-side // patch_size) for side in to_2tuple(img_size))
        super().__init__(
            stem=ClassTokenStem(patch_size, in_chans, embed_dim, grid, middle=True, antialias=False, **dd),
            block=block,
            norm=StreamNorm(embed_dim, **dd),
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

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        super().init_weights(needs_reset)
        init_outputs_(self.blocks)


# ---- Variants -------------------------------------------------------------------------------------------------------

_SEARCHED = searched(
    "h v- w7 w7-, h- w2- w7 w7-, h h- v w7, h h- v v-, h h- v v-, h h- v v-, h- v v- w7, h- v v- w2-, h h- v v-, "
    "h h- v v-, h v v- w2, h v v- w2-, h h- v- w7, h- v v- w2, h h- v v-, h v w2 w2-, v v- w2 w7, h h- v w2, "
    "h h- w2- w7, v v- w2 w2-"
)

# The authors' code defines small twice; the second, without the search, is what it builds.
VARIANTS = {
    "local_vim_tiny": dict(embed_dim=192, routes=_SEARCHED, drop_path_rate=0.1),
    "local_vim_small": dict(embed_dim=384, routes=searched("h h- w2 w2-"), drop_path_rate=0.1),
}
CLASS_TOKEN_VARIANTS = {
    "local_vim_tiny_middle_cls_token": dict(embed_dim=192, routes=_SEARCHED, drop_path_rate=0.1),
}

default_cfgs = generate_default_cfgs({
    "local_vim_tiny.in1k": cfg("local_vim_tiny", pool_size=(14, 14), first_conv="stem.proj"),
    # The authors' page links LocalVMamba's file for small.
    "local_vim_small.in1k": cfg(None, pool_size=(14, 14), first_conv="stem.proj"),
    "local_vim_tiny_middle_cls_token.in1k": cfg(
        "local_vim_tiny_middle_cls_token", pool_size=None, first_conv="stem.patch_embed.proj"
    ),
})


register_variants(__name__, VARIANTS, create_from(LocalVim))
register_variants(__name__, CLASS_TOKEN_VARIANTS, create_from(ClassTokenLocalVim))
