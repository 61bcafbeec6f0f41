"""SOFT: a pyramid of softmax-free attention, Gaussian kernels through landmarks.

Papers:
    SOFT: Softmax-free Transformer with Linear Complexity, https://arxiv.org/abs/2110.11945
    Softmax-free Linear Transformers, https://arxiv.org/abs/2207.03341 (the normalized form)
Authors' code: https://github.com/fudan-zvg/SOFT (MIT)

Three stages of `GaussianAttention` in post-norm blocks, with patches of landmarks that keep their number at 49 for
images of 224, and a fourth of softmax attention with a class token, which is what the head sees.

Differences to the authors' code: attention's inverse does not depend on the other images of a batch.
"""
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import LayerNorm, trunc_normal_
from timm.models import generate_default_cfgs
from torch import nn

from ..backbones import Block, PositionEmbed, Pyramid, keep_native, renamed
from ..backbones.columnar import TokenHead
from ..backbones.layers import TokenMlp, conv_norm_acts
from ..mixers import GaussianAttention, SoftmaxAttention
from ..mixers.dropout import Dropout
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    renames = [
        (r"^patch_embed1\.", "stem."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^pos_embed1$", "stem.pos_embed.weight"),
        (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.downsample.pos_embed.weight"),
        (r"^cls_token$", "stages.3.downsample.cls_token"),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"\.att\.mha\.attn\.Qlandmark_op\.", ".mixer.landmarks."),
        (r"\.att\.mha\.attn\.Qnorm_act\.0\.", ".mixer.norm."),
        (r"\.att\.mha\.attn\.conv\.weight$", ".mixer.local"),
        (r"\.att\.mha\.ff\.", ".mixer.proj."),
        (r"\.att\.mha\.", ".mixer."),
        (r"\.att\.ff([12])\.", r".mlp.fc\1."),
        (r"\.att\.norm", ".norm"),
        (r"\.attn\.", ".mixer."),
        (r"^head\.", "head.fc."),
    ]
    out = {renamed(key, renames): value for key, value in state_dict.items()}
    # Two projections in one: W_q and W_v of the kernel's stages, q and kv of the last.
    for first, second, joint in ((".W_q.", ".W_v.", ".qv."), (".mixer.q.", ".mixer.kv.", ".mixer.qkv.")):
        for key in [key for key in out if first in key]:
            out[key.replace(first, joint)] = torch.cat((out.pop(key), out.pop(key.replace(first, second))))
    key = "stages.3.downsample.pos_embed.weight"
    if key in out:  # the class token's comes first
        out["stages.3.downsample.cls_pos"], out[key] = out[key][:, :1], out[key][:, 1:]
    for name, module in model.named_modules():
        if isinstance(module, PositionEmbed) and f"{name}.weight" in out:
            out[f"{name}.weight"] = module.resampled(out[f"{name}.weight"])
    return out


class Patches(nn.Module):
    """Overlapping patches by 3x3 convolutions with batch norm and ReLU, their positions, and perhaps a class token.

    Args:
        layers: (width, kernel size, stride) of each convolution.
        pos_embed_size: (rows, columns) of the map that the position embedding is learned at.
        class_token: put one before the tokens, which then are one row, (B, 1, 1 + H * W, dim).
    """

    def __init__(
        self,
        in_dim: int,
        layers: Sequence[tuple[int, int, int]],
        pos_embed_size: tuple[int, int],
        class_token: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim = layers[-1][0]
        self.proj = conv_norm_acts(in_dim, layers, partial(nn.ReLU, inplace=True), **dd).append(nn.ReLU(inplace=True))
        self.pos_embed = PositionEmbed(dim, pos_embed_size, "bilinear", antialias=False, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.cls_pos = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
            trunc_normal_(self.cls_pos, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "cls_pos"} if self.cls_token is not None else set()

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_dim, H, W) to (B, H / stride, W / stride, dim)"""
        x = self.pos_embed(self.proj(x).permute(0, 2, 3, 1))
        if self.cls_token is None:
            return x
        first = (self.cls_token + self.cls_pos).expand(x.shape[0], -1, -1)
        return torch.cat((first, x.flatten(1, 2)), 1).unsqueeze(1)


class Stem(Patches):
    """Patches of an image, (B, in_chans, H, W) to (B, H/4, W/4, dim)."""

    def __init__(self, in_chans: int, dim: int, pos_embed_size: tuple[int, int], device=None, dtype=None):
        super().__init__(in_chans, ((32, 3, 2), (32, 3, 1), (dim, 3, 2)), pos_embed_size, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x.contiguous(memory_format=torch.channels_last))


class Downsample(Patches):
    """Patches of a map, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(
        self, in_dim: int, dim: int, pos_embed_size: tuple[int, int], class_token: bool, device=None, dtype=None
    ):
        super().__init__(in_dim, ((dim, 3, 2),), pos_embed_size, class_token, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x.permute(0, 3, 1, 2))


class PostNormBlock(nn.Module):
    """norm(x + dropout(mixer(x))), then the same with an MLP, on (B, H, W, dim).

    Args:
        mixer: token mixer, (B, H, W, dim) -> (B, H, W, dim).
        mlp_ratio: hidden width of the MLP over dim.
        drop: probability of dropping an element of a branch, which SOFT does in place of whole branches.
        proj_drop: dropout after both linear layers of the MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.mixer = mixer
        self.drop1 = Dropout(drop)
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        tanh_gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = TokenMlp(dim, int(dim * mlp_ratio), act_layer=tanh_gelu, drop=proj_drop, **dd)
        self.drop2 = Dropout(drop)
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.drop1(self.mixer(x)))
        return self.norm2(x + self.drop2(self.mlp(x)))


class SOFT(Pyramid):
    """SOFT, plain and normalized.

    `forward_features` gives the last stage's tokens (B, 1 + N, dim), class token first; intermediates are maps, without
    it.

    Args:
        dims, depths, num_heads: per stage.
        ratios: sides of the patches that the landmarks of each stage but the last stand for, in tokens.
        local_kernels: in those stages, sides of the convolutions of values.
        normalized: attention's normalized form.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        pos_embed_size: (rows, columns) of the first stage's map that its position embedding is learned at; those of
            the others are half as large each.
        global_pool: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for none.
        drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)
    output_fmt = "NLC"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 2, 3, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        ratios: Sequence[int] = (8, 4, 2),
        local_kernels: Sequence[int] = (9, 5, 3),
        normalized: bool = False,
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
        if len(num_heads) != last + 1 or len(ratios) != last or len(local_kernels) != last:
            raise ValueError(
                f"num_heads must have one entry a stage ({last + 1}), ratios and local_kernels one less,"
                f" got {num_heads}, {ratios} and {local_kernels}"
            )
        later_stages = iter(range(1, last + 1))

        def downsample(in_dim: int, dim: int) -> Downsample:
            stage = next(later_stages)  # the skeleton asks for one after the other
            rows, cols = (-(-side // 2**stage) for side in pos_embed_size)
            return Downsample(in_dim, dim, (rows, cols), class_token=stage == last, **dd)

        def block(stage: int, index: int, dim: int, drop_path: float) -> nn.Module:
            heads = num_heads[stage]
            if stage == last:  # all tokens attend alike, the class token too
                mixer = SoftmaxAttention(dim, heads, proj_drop=proj_drop_rate, **dd)
                return Block(dim, mixer, mlp_ratio, None, drop_path, proj_drop_rate, norm_layer=Norm, **dd)
            mixer = GaussianAttention(
                dim, heads, ratios[stage], local_kernels[stage], normalized, proj_drop=proj_drop_rate, **dd
            )
            return PostNormBlock(dim, mixer, mlp_ratio, drop_path, proj_drop_rate, **dd)

        super().__init__(
            stem=Stem(in_chans, dims[0], pos_embed_size, **dd),
            downsample=downsample,
            block=block,
            norm=Norm(dims[-1], **dd),
            dims=dims,
            depths=depths,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            head=TokenHead(dims[-1], num_classes, global_pool, drop_rate, **dd),
            **dd,
        )
        self.token_stage = last  # its tokens are one row, class token first

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) to normed tokens (B, 1 + H/32 * W/32, num_features)."""
        x = self.stages(self.stem(x))
        if len(self.stages) > self.token_stage:
            x = x[:, 0]
        return self.norm(x)

    def forward_units(
        self, x: torch.Tensor, units: nn.Module, take: Sequence[int], norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.forward_stem(x)
        taken = []
        for i, stage in enumerate(units):
            H, W = x.shape[1:3]
            x = self.forward_unit(stage, x)
            if i == self.token_stage:
                x = x[:, 0]
            if i in take:
                y = self.norm(x) if norm and self._norm_fits(i) else x
                taken.append(y[:, 1:].unflatten(1, (-(-H // 2), -(-W // 2))) if i == self.token_stage else y)
        return x, taken


# ---- Variants -------------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": dict(depths=(1, 2, 3, 2)),
    "small": dict(depths=(1, 3, 20, 4)),
    "medium": dict(dims=(64, 128, 288, 512), depths=(1, 3, 29, 5), num_heads=(2, 4, 9, 16)),
    "large": dict(depths=(1, 3, 40, 5)),
    "huge": dict(dims=(64, 128, 352, 512), depths=(1, 5, 49, 5), num_heads=(2, 4, 11, 16)),
}

VARIANTS = {
    **{f"soft_{size}": args for size, args in _SIZES.items()},
    **{f"soft_norm_{size}": args | dict(normalized=True) for size, args in _SIZES.items()},
}


def _cfg(paper: str):
    # The authors share the weights without direct links.
    return imagenet_cfg(
        pool_size=None, crop_pct=0.9, first_conv="stem.proj.0", license="mit", paper_ids=f"arXiv:{paper}",
        origin_url="https://github.com/fudan-zvg/SOFT",
    )


default_cfgs = generate_default_cfgs({
    "soft_tiny.in1k": _cfg("2110.11945"),
    "soft_tiny.cuda_in1k": _cfg("2110.11945"),  # trained with the authors' CUDA kernel
    **{f"soft_{size}.untrained": _cfg("2110.11945") for size in ("small", "medium", "large", "huge")},
    **{f"soft_norm_{size}.in1k": _cfg("2207.03341") for size in ("tiny", "small", "medium", "large")},
    "soft_norm_huge.untrained": _cfg("2207.03341"),
})

register_variants(__name__, VARIANTS, create_from(SOFT))
