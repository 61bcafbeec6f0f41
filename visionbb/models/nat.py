"""NAT, DiNAT and DiNAT_s: pyramids of neighborhood attention, plain and dilated.

Papers:
    Neighborhood Attention Transformer, https://arxiv.org/abs/2204.07143
    Dilated Neighborhood Attention Transformer, https://arxiv.org/abs/2209.15001
Authors' code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)

NAT and DiNAT have overlapping convolutions as stem and downsampling, DiNAT_s keeps Swin's body. Heads are 32 wide. The
dilations belong to a run, not to the weights: they fill the map at the resolution of the pretrained tag, and
`dilations=` sets them for any other.

Differences to the authors' code: downsampling stands at the start of a stage; the head pools.
"""
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import nn

from ..backbones import Block, Pyramid, keep_native, renamed
from ..mixers import NeighborhoodAttention
from ..mixers.attention import resample_rpb
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-5)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Renames the keys of the authors' checkpoints, and of their copies in the transformers library, to ours."""
    state_dict, native = keep_native(state_dict)
    if native:
        return state_dict
    state_dict = _from_transformers(state_dict)
    # Pyramids call a stage levels.{i} (DiNAT_s: layers.{i}.blocks), columns a block layers.{i}.
    column = not any(".blocks." in key for key in state_dict)
    renames = [
        (r"^patch_embed\.", "stem."),
        *([(r"^layers\.(\d+)", r"blocks.\1")] if column else []),
        (r"^(?:levels|layers)\.(\d+)\.blocks", r"stages.\1.blocks"),
        (r"^(?:levels|layers)\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample"),
        (r"\.attn\.", ".mixer."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^head\.", "head.fc."),
    ]
    # The index of ViT-rpb is computed from the size of the map.
    kept = {key: value for key, value in state_dict.items() if not key.endswith("relative_position_index")}
    out = {renamed(key, renames): value for key, value in kept.items()}
    wanted = model.state_dict()
    for key, value in out.items():
        if key.endswith(".rpb") and key in wanted:  # another kernel size, or ViT-rpb learned at another resolution
            out[key] = resample_rpb(value, wanted[key].shape[1:])
    return out


def _from_transformers(state_dict: dict) -> dict:
    """The authors' key names for a checkpoint of transformers' NatForImageClassification or Dinat...; others as is."""
    if not any(key.startswith(("nat.", "dinat.")) for key in state_dict):
        return state_dict
    renames = [
        (r"^(?:nat|dinat)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.norm", "patch_embed.norm"),
        (r"^encoder\.levels\.(\d+)\.layers", r"levels.\1.blocks"),
        (r"^encoder\.levels", "levels"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"attention\.self\.", "attn."),
        (r"attention\.output\.dense", "attn.proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    ]
    out = {}
    for key, value in state_dict.items():
        key = renamed(key, renames)
        if key.endswith("layer_scale_parameters"):
            block = key.removesuffix("layer_scale_parameters")
            out[f"{block}gamma1"], out[f"{block}gamma2"] = value
        else:
            out[key] = value
    for key in [key for key in out if ".attn.query." in key]:
        parts = [out.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        out[key.replace("query", "qkv")] = torch.cat(parts)
    return out


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, and a norm: overlapping patches of stride 4 (NAT, section 3.3)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
            nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        )
        self.norm = Norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last from the first layer on, so that none of the large early maps is ever transposed.
        return self.norm(self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 and a norm, (B, H, W, in_dim) to (B, H/2, W/2, dim)."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False, **dd)
        self.norm = Norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Pyramid):
    """NAT, DiNAT and DiNAT_s.

    Args:
        embed_dim: width of the first stage, doubled by each of the others.
        depths, num_heads: per stage.
        kernel_size: window, in tokens a side.
        dilations: per stage, a list with one dilation a block; shorter lists repeat. None: 1 everywhere.
        mlp_ratio: hidden width of the MLPs over that of the tokens.
        layer_scale: initial gain of the residual branches, None for no gains.
        patch_body: Swin's stem and downsampling (4x4 patches, patch merging) for the convolutions: DiNAT_s.
        pad_mode: for maps smaller than a window: "natten14" (what the weights know), "mask" or "error".
        global_pool, drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        patch_body: bool = False,
        pad_mode: str = "natten14",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        dilations = dilations or [[1]] * len(depths)
        if len(num_heads) != len(depths) or len(dilations) != len(depths):
            raise ValueError(
                f"num_heads and dilations must have one entry a stage ({len(depths)}), got {num_heads} and {dilations}"
            )
        for stage, of_stage in enumerate(dilations):
            if not isinstance(of_stage, Sequence) or not of_stage:
                raise ValueError(f"dilations[{stage}] must be a list of dilations, got {of_stage!r}")

        def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
            mixer = NeighborhoodAttention(
                dim, num_heads[stage], kernel_size, dilations[stage][index % len(dilations[stage])],
                pad_mode=pad_mode, proj_drop=proj_drop_rate, **dd,
            )
            return Block(dim, mixer, mlp_ratio, layer_scale, drop_path, proj_drop_rate, norm_layer=Norm, **dd)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(
            stem=patch_stem(4, in_chans, embed_dim, **dd) if patch_body else ConvStem(in_chans, embed_dim, **dd),
            downsample=partial(PatchMerging, norm_layer=Norm, **dd) if patch_body else partial(ConvDownsample, **dd),
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


def patch_stem(size: int, in_chans: int, dim: int, **dd) -> nn.Module:
    """Non-overlapping patches and a norm; images are zero-padded at the right and bottom to whole patches."""
    return PatchEmbed(
        None, size, in_chans, dim, norm_layer=Norm, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True, **dd
    )


# ---- Variants -------------------------------------------------------------------------------------------------------

_M, _TSBL = (3, 4, 6, 5), (3, 4, 18, 5)

# The authors' dilations, per stage and repeating: kernel * dilation fills the map at 224, nearly so at 384.
_DIL_224, _DIL_384 = ((1, 8, 1), (1, 4), (1, 2), (1,)), ((1, 13, 1), (1, 6), (1, 3), (1,))
_DIL_S_224, _DIL_S_384 = ((1, 8), (1, 4), (1, 2), (1,)), ((1, 13), (1, 6), (1, 3), (1,))


def _conv(embed_dim, depths, mlp_ratio, layer_scale, drop_path_rate, dilations=None, kernel_size=7):
    heads = tuple(embed_dim // 32 * 2**i for i in range(4))
    return dict(embed_dim=embed_dim, depths=depths, num_heads=heads, kernel_size=kernel_size, dilations=dilations,
                mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path_rate=drop_path_rate)


def _patch(embed_dim, depths, drop_path_rate):
    return _conv(embed_dim, depths, 4.0, None, drop_path_rate, _DIL_S_224) | dict(patch_body=True)


VARIANTS = {
    "nat_mini": _conv(64, _M, 3.0, None, 0.2),
    "nat_tiny": _conv(64, _TSBL, 3.0, None, 0.2),
    "nat_small": _conv(96, _TSBL, 2.0, 1e-5, 0.3),
    "nat_base": _conv(128, _TSBL, 2.0, 1e-5, 0.5),
    "dinat_mini": _conv(64, _M, 3.0, None, 0.2, _DIL_224),
    "dinat_tiny": _conv(64, _TSBL, 3.0, None, 0.2, _DIL_224),
    "dinat_small": _conv(96, _TSBL, 2.0, None, 0.3, _DIL_224),  # no gains, unlike nat_small
    "dinat_base": _conv(128, _TSBL, 2.0, 1e-5, 0.5, _DIL_224),
    "dinat_large": _conv(192, _TSBL, 2.0, None, 0.35, _DIL_224),
    "dinat_large_11x11": _conv(192, _TSBL, 2.0, None, 0.35, _DIL_224, kernel_size=11),
    "dinat_s_tiny": _patch(96, (2, 2, 6, 2), 0.2),
    "dinat_s_small": _patch(96, (2, 2, 18, 2), 0.3),
    "dinat_s_base": _patch(128, (2, 2, 18, 2), 0.5),
    "dinat_s_large": _patch(192, (2, 2, 18, 2), 0.35),
    # For the digits demo: images of 32x32, maps of 8, 4, 2 and 1 tokens a side.
    "nat_digits": dict(embed_dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3, mlp_ratio=2.0),
}

# Arguments that go with a pretrained tag rather than with the architecture.
TAG_ARGS = {
    "dinat_large.in22k_in1k_384": dict(dilations=_DIL_384),
    "dinat_s_large.in22k_in1k_384": dict(dilations=_DIL_S_384),
}


def cfg(file: str, paper: str, first_conv: str = "stem.proj.0", **kwargs):
    return imagenet_cfg(
        f"https://shi-labs.com/projects/{file}" if file else "", first_conv=first_conv, license="mit",
        paper_ids=f"arXiv:{paper}", origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    )


def _nat_cfg(size: str):
    return cfg(f"nat/checkpoints/CLS/nat_{size}.pth", "2204.07143")


def dinat_cfg(file: str, **kwargs):
    return cfg(f"dinat/checkpoints/{file}.pth", "2209.15001", **kwargs)


_SIZES = ("mini", "tiny", "small", "base")
_PATCH = dict(first_conv="stem.proj")
_22K = dict(num_classes=21841)
_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs({
    **{f"nat_{size}.in1k": _nat_cfg(size) for size in _SIZES},
    **{f"dinat_{size}.in1k": dinat_cfg(f"imagenet1k/dinat_{size}_in1k_224") for size in _SIZES},
    "dinat_large.in22k_in1k": dinat_cfg("imagenet1k/dinat_large_in22k_in1k_224"),
    "dinat_large.in22k_in1k_384": dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384", **_384),
    "dinat_large.in22k": dinat_cfg("imagenet22k/dinat_large_in22k_224", **_22K),
    "dinat_large_11x11.in22k_in1k_384": dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11", **_384),
    "dinat_large_11x11.in22k_interp": dinat_cfg("imagenet22k/dinat_large_in22k_224_11x11interp", **_22K),
    **{
        f"dinat_s_{size}.in1k": dinat_cfg(f"imagenet1k/dinat_s_{size}_in1k_224", **_PATCH)
        for size in ("tiny", "small", "base")
    },
    "dinat_s_large.in22k_in1k": dinat_cfg("imagenet1k/dinat_s_large_in1k_224", **_PATCH),
    "dinat_s_large.in22k_in1k_384": dinat_cfg("imagenet1k/dinat_s_large_in1k_384", **_PATCH, **_384),
    "dinat_s_large.in22k": dinat_cfg("imagenet22k/dinat_s_large_in22k_224", **_PATCH, **_22K),
    "nat_digits.untrained": cfg(
        "", "2204.07143", num_classes=10, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0,
        mean=(0.5,) * 3, std=(0.5,) * 3,
    ),
})


register_variants(__name__, VARIANTS, create_from(NAT), TAG_ARGS)
