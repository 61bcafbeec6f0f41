"""DeiT with another attention: plain ViTs, class token and all, whose softmax attention is swapped for one of `MIXERS`.

Paper: Training data-efficient image transformers & distillation through attention (DeiT),
https://arxiv.org/abs/2012.12877. Those of the attentions stand with their mixers and in model_cards/drop_ins.md.

The rest of the network is timm's DeiT: with softmax attention and the same weights it gives the same numbers. So
`inherit_attention` starts a drop-in from a trained ViT.

Differences to the papers' code, where they have a DeiT: any image size works, position tables are resampled; the class
token carries its position embedding in itself.
"""
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import LayerNorm, resample_abs_pos_embed_nhwc, to_2tuple
from timm.models import VisionTransformer, generate_default_cfgs
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn

from ..backbones import ClassTokenStem, TokenBlock, TokenColumnar, fold_class_position, keep_native, renamed
from ..mixers import AgentAttention, GaussianAttention, LinearAttention, SoftmaxAttention
from ..mixers.landmarks import resized
from ._registry import create_from, imagenet_cfg, register_variants

Norm = partial(LayerNorm, eps=1e-6)


class Mixer(NamedTuple):
    """How a drop-in is built: a mixer with `forward_tokens`; `inherit_attention` needs its `num_heads`, `in_proj`,
    `projections` and `begin_plain` too."""

    build: Callable[..., nn.Module]  # (dim, num_heads, proj_drop=, device=, dtype=, ...)
    grid: str = ""  # the argument that takes the (rows, columns) of patches that position tables are learned at


# Rotary embeddings, which RALA and MALA have in their own networks, have no place for a class token.
_LEPE = dict(local_kernel=5, gate="mul")
MIXERS = {
    "softmax": Mixer(SoftmaxAttention),  # timm's DeiT itself: the teacher, and the test of all that is around a mixer
    "elu": Mixer(partial(LinearAttention, feature_map="elu")),
    "relu": Mixer(partial(LinearAttention, feature_map="relu")),
    "hedgehog": Mixer(partial(LinearAttention, feature_map="hedgehog")),
    "flow": Mixer(partial(LinearAttention, feature_map="sigmoid", key_weight="flow", normalizer="none")),
    "mala": Mixer(partial(LinearAttention, feature_map="elu", normalizer="additive", **_LEPE)),
    "rala": Mixer(partial(LinearAttention, feature_map="elu", key_weight="global_query", **_LEPE)),
    "focused": Mixer(
        partial(LinearAttention, feature_map="focused", local_kernel=5, share_local=True), grid="key_pos_size"
    ),
    "polar": Mixer(
        partial(LinearAttention, feature_map="polar", share_local=True, **_LEPE), grid="key_pos_size"
    ),
    "agent": Mixer(partial(AgentAttention, prefix_tokens=1), grid="map_size"),
    # As in SOFT's own stage of this map size; the normalized form does not grow with the image.
    "soft": Mixer(partial(GaussianAttention, ratio=2, normalized=True)),
}


# Agent-DeiT's an, ah, aw, ac are of agents and the tokens they collect, na, ha, wa, ca of tokens and their agents.
AGENT_BIASES = {"n": "table", "h": "rows", "w": "cols", "c": "prefix"}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """The keys of checkpoints of DeiT, Agent-DeiT and timm's ViTs to ours; position tables are resampled.

    Raises:
        ValueError: the position embedding is not that of a class token and a square map.
    """
    state_dict, native = keep_native(state_dict)
    if not native:
        if "cls_token" in state_dict and "pos_embed" in state_dict:
            state_dict |= fold_class_position(state_dict.pop("cls_token"), state_dict.pop("pos_embed"))
        for key in [key for key in state_dict if re.search(r"\.(a[nhwc]|[nhwc]a)_bias$", key)]:
            pair, value = key[-7:-5], state_dict.pop(key)
            if "n" not in pair:  # (1, heads, ...), agents last where they are the second of the pair
                value = value[0].movedim(-1, 1) if pair[1] == "a" else value[0]
            state_dict[f"{key[:-7]}biases.{pair.index('a')}.{AGENT_BIASES[pair.strip('a')]}"] = value
        renames = [
            (r"^patch_embed\.", "stem.patch_embed."), (r"^head\.", "head.fc."), (r"\.attn\.", ".mixer."),
            (r"\.dwc\.", ".local."),
        ]
        state_dict = {renamed(key, renames): value for key, value in state_dict.items()}
    for key, table in model.named_parameters():
        if key in state_dict and key.endswith(("pos_embed", "key_pos")):
            state_dict[key] = resample_abs_pos_embed_nhwc(state_dict[key], table.shape[1:3])
        elif key in state_dict and key.endswith((".rows", ".cols")):
            state_dict[key] = resized(state_dict[key], *table.shape[2:])
    return state_dict


class DropIn(TokenColumnar):
    """DeiT with another attention.

    Args:
        mixer: the attention, a row of `MIXERS`.
        mixer_args: further arguments of the mixer.
        img_size: pixels, one number or (height, width), of the images that position tables are learned at; others get
            them resampled.
        patch_size: pixels a token, per axis.
        embed_dim, depth, num_heads, mlp_ratio: as in DeiT.
        global_pool: "token" (the class token), "avg", "max" or "avgmax" of the others, "" for none.
        drop_rate, drop_path_rate: as in timm; proj_drop_rate: dropout inside the blocks.

    Raises:
        ValueError: an unknown name, or a shape that does not fit.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        mixer: str = "elu",
        mixer_args: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
        grid = tuple(math.ceil(side / patch_size) for side in to_2tuple(img_size))
        build, tables = MIXERS[mixer]
        args = ({tables: grid} if tables else {}) | dict(mixer_args or {})

        def block(index: int, dim: int, drop_path: float) -> TokenBlock:
            attention = build(dim, num_heads, proj_drop=proj_drop_rate, **args, **dd)
            return TokenBlock(dim, attention, mlp_ratio, None, drop_path, proj_drop_rate, norm_layer=Norm, **dd)

        super().__init__(
            stem=ClassTokenStem(patch_size, in_chans, embed_dim, grid, **dd),
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


# ---- Starting from a trained ViT ------------------------------------------------------------------------------------

@torch.no_grad()
def inherit_attention(model: TokenColumnar, source: str | nn.Module, checkpoint_path: str | None = None) -> list[str]:
    """Starts a drop-in from a trained ViT, in place: the same network with another attention, before any training.

    Kept are the embeddings (positions resampled to the model's size), norms, MLPs, the attention's projections of q, k,
    v and of its result, and the head if it is for as many classes and pools alike; otherwise the model keeps its own.
    What a ViT has no parameters for begins without effect (`begin_plain` of the mixers): local convolutions and
    position tables at zero, gates at one, Hedgehog's maps as the identity. What the mixer does not project (SOFT has no
    keys) is left out.

    Args:
        model: the drop-in.
        source: a ViT with a class token, as large: the name of a model of timm's, which comes with its pretrained
            weights or those of `checkpoint_path` (timm fits its first convolution to the model's in_chans), or a
            module, timm's or another drop-in.
        checkpoint_path: a file of weights for the model that `source` names, in place of the pretrained ones.

    Returns:
        The names of the model's parameters that come from no parameter of the source. Gates, which are rows of `qkv`,
        are not among them.

    Raises:
        TypeError: the model or the source is of another kind.
        ValueError: the source is of another size, or has what the model has no place for; the message names it.
    """
    if not isinstance(model, TokenColumnar):
        raise TypeError(f"model must be a drop-in, a TokenColumnar, got {type(model).__name__}")
    if isinstance(source, str):
        source = timm.create_model(
            source, pretrained=checkpoint_path is None, checkpoint_path=checkpoint_path or "", in_chans=model.in_chans
        )
    elif checkpoint_path is not None:
        raise ValueError("checkpoint_path goes with the name of a model; load the weights of a module beforehand")
    traits = _traits(source)
    for name, wanted in _traits(model).items():
        if traits[name] != wanted:
            raise ValueError(f"source must have {name} {wanted}, as the drop-in, got {traits[name]}")

    given = checkpoint_filter_fn(source.state_dict(), model)
    if (source.num_classes, _pooling(source)) != (model.num_classes, _pooling(model)):
        given = {key: value for key, value in given.items() if not key.startswith("head.")}
    projections = {}  # key to ours: those of the source, by name, and the names of ours
    for index, (ours, theirs) in enumerate(zip(model.blocks, source.blocks, strict=True)):
        for kind in ("weight", "bias"):
            key, names = _in_proj(theirs)
            value = given.pop(f"blocks.{index}.mixer.{key}.{kind}", None)
            if value is not None:
                parts = dict(zip(names, value.chunk(len(names)), strict=True))
                key, names = _in_proj(ours)
                projections[f"blocks.{index}.mixer.{key}.{kind}"] = parts, names
    own = dict(model.named_parameters())
    if foreign := sorted((given.keys() | projections.keys()) - own.keys()):
        raise ValueError(f"source has parameters that the drop-in has no place for: {', '.join(foreign)}")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{key} must be {tuple(own[key].shape)} in source, got {tuple(value.shape)}")

    for block in model.blocks:
        for module in block.mixer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        block.mixer.begin_plain()
    for key, (parts, names) in projections.items():
        rows = zip(names, own[key].chunk(len(names)), strict=True)
        given[key] = torch.cat([parts.get(name, part).to(part) for name, part in rows])
    for key, value in given.items():
        own[key].copy_(value)
    return [key for key in own if key not in given]


def _in_proj(block: nn.Module) -> tuple[str, Sequence[str]]:
    """The name of the attention's first linear layer, and of its parts."""
    return ("qkv", "qkv") if isinstance(block, ViTBlock) else (block.mixer.in_proj, block.mixer.projections)


def _pooling(vit: nn.Module) -> str:
    return vit.global_pool if isinstance(vit, VisionTransformer) else vit.head.pool_type


def _traits(vit: nn.Module) -> dict[str, Any]:
    """What a drop-in and its source must have in common, beside the shapes of parameters."""
    if isinstance(vit, VisionTransformer) and all(type(block) is ViTBlock for block in vit.blocks):
        stem, attention, prefix = vit, vit.blocks[0].attn, vit.num_prefix_tokens
    elif isinstance(vit, TokenColumnar):
        stem, attention, prefix = vit.stem, vit.blocks[0].mixer, 1
    else:
        raise TypeError(
            f"source must be a timm VisionTransformer of plain pre-norm blocks or a drop-in, got {type(vit).__name__}"
        )
    block = vit.blocks[0]
    return {
        "in_chans": vit.in_chans,
        "patch_size": stem.patch_embed.patch_size,
        "number of class tokens": prefix,
        "embed_dim": vit.num_features,
        "depth": len(vit.blocks),
        "num_heads": attention.num_heads,
        "norm": (type(block.norm1).__name__, block.norm1.eps),
        "activation": type(block.mlp.act).__name__,
    }


# ---- Variants -------------------------------------------------------------------------------------------------------

_SIZES = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}

VARIANTS = {
    f"deit_{size}_patch16_224_{mixer}": dict(mixer=mixer, **args)
    for mixer in MIXERS if mixer != "softmax"
    for size, args in _SIZES.items()
}
VARIANTS["deit_base_patch16_224_agent"] |= dict(mixer_args=dict(num_agents=81))

_AGENT_DEIT = dict(tiny="57e0904221824ee7b7af", small="fdd43304372541db8ea7", base="5115f15fdd7e4ab58fbc")


def _cfg(url: str = "") -> dict[str, Any]:
    return imagenet_cfg(
        url, pool_size=None, crop_pct=0.9, first_conv="stem.patch_embed.proj", paper_ids="arXiv:2012.12877",
    )


default_cfgs = generate_default_cfgs({
    **{f"{variant}.untrained": _cfg() for variant in VARIANTS if not variant.endswith("_agent")},
    **{
        f"deit_{size}_patch16_224_agent.in1k": _cfg(f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1")
        for size, file in _AGENT_DEIT.items()
    },
})


register_variants(__name__, VARIANTS, create_from(DropIn))
