"""The launches that the zoo's linear attentions make, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._aot import TYPES, Case
from .._launch import Launch
from ..rotary import Rotary
from .form import Form
from .state import empty_state
from .triton import key_gradient_launch, queries_launch, query_gradient_launch, sums_launch

IMAGES = 64  # at 224 pixels; the detectors take 2
DETECTION = ((200, 334), (100, 167))  # strides 4 and 8 of 800x1333 pixels


class Use(NamedTuple):
    """An attention of some models: its heads and sizes, what it is made of, and the maps it serves."""

    models: tuple[str, ...]
    heads: int
    d: int
    dv: int
    maps: tuple[tuple[int, int], ...]
    feature_map: str = "identity"
    normalizer: str = "div"
    rotary: str = ""  # "head" (of dv channels) or "map"
    parts: str = ""  # of "weight", "local", "gate"
    wide: bool = False  # features in float32 whatever the values are


def _sides(*sides: int) -> tuple[tuple[int, int], ...]:
    return tuple((side, side) for side in sides)


def _names(family: str, sizes: str) -> tuple[str, ...]:
    return tuple(f"{family}_{size}" for size in sizes.split())


_EARLY, _ALL = (*_sides(56, 28), *DETECTION), (*_sides(56, 28, 14, 7), *DETECTION)
_DEIT = ((14, 14), (1, 197))  # patches, and with the class token
USES = (
    *(
        Use(_names("ravlt", sizes), heads, d, d, _EARLY, rotary="head", parts="weight local gate")
        for sizes, heads, d in (("tiny small", 1, 64), ("base large", 2, 96))
    ),
    *(
        Use(_names("mavit", sizes), heads, d, d, _EARLY, "elu", "additive", "head", "local gate")
        for sizes, heads, d in (("tiny small", 1, 64), ("base large", 2, 96))
    ),
    *(
        Use(_names("nalaformer", sizes), heads, 2 * d, d, _EARLY, rotary="head", parts="local", wide=True)
        for sizes, heads, d in (("xtiny", 1, 32), ("tiny small", 1, 64), ("base large", 2, 96))
    ),
    Use(_names("mila", "tiny small base"), 2, 32, 32, _ALL, "elu", rotary="map", parts="local gate"),
    Use(_names("l2vit", "tiny small base"), 3, 32, 32, _ALL, "relu", "clamp"),
    Use(_names("care", "s0 s1 s2"), 2, 16, 16, _sides(14), "elu"),
    Use(_names("care", "s0 s1 s2"), 2, 32, 32, _sides(14, 7), "elu"),
    *(
        Use(("flowformer_19l",), 12, d, d, _sides(side), normalizer="none", parts="weight gate")
        for d, side in ((8, 56), (16, 28), (32, 14), (64, 7))
    ),
    Use(("deit_elu",), 3, 64, 64, _DEIT, "elu"),
    Use(("deit_relu",), 3, 64, 64, _DEIT, "relu"),
    Use(("deit_hedgehog",), 3, 128, 64, _DEIT),
    Use(("deit_flow",), 3, 64, 64, _DEIT, normalizer="none", parts="weight gate"),
    Use(("deit_rala",), 3, 64, 64, _DEIT, parts="weight local gate"),
    Use(("deit_mala",), 3, 64, 64, _DEIT, "elu", "additive", parts="local gate"),
    Use(("deit_focused",), 3, 64, 64, _DEIT, parts="local", wide=True),
    Use(("deit_polar",), 6, 128, 32, _DEIT, parts="local gate", wide=True),
)


def launches(use: Use, H: int, W: int, dtype: torch.dtype) -> Iterator[Launch]:
    """The launches of forward and backward on the chunks of a projection."""
    rotary = {
        "": None, "head": Rotary.closed(use.dv), "map": Rotary.half_open(use.heads * use.d),
    }[use.rotary]
    form = Form(use.feature_map, use.normalizer, 1.0, 1e-6, rotary)
    B, heads = 2 if (H, W) in DETECTION else IMAGES, use.heads

    def projection(channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return torch.empty(B, H, W, 2 * heads * channels, dtype=dtype).unflatten(-1, (2, heads, -1)).unbind(3)

    with torch.device("meta"):
        q, k = projection(use.d, torch.float32 if use.wide else dtype)
        v, g = projection(use.dv, dtype)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        weight = torch.empty(q.shape[:-1]) if "weight" in use.parts else None
        local = out if "local" in use.parts else None
        gate = g if "gate" in use.parts else None
        state = empty_state(q, v, form)
        stats = torch.empty(3, *q.shape[:-1])
        yield sums_launch(k, v, None, (weight, None, None), 1.0, form)[0]
        yield queries_launch(q, local, gate, state, out, form)
        local = None if gate is None else local
        yield query_gradient_launch(q, local, gate, out, state, dq, local, None if gate is None else out, stats, form)
        weights = (stats[0], stats[1], stats[2] if form.normalizer == "additive" else None)
        yield sums_launch(q, out, None if local is not None else gate, weights, 1.0, form)[0]
        yield key_gradient_launch(k, v, weight, state, dq, out, weight, form)


def work(launch: Launch, H: int, W: int) -> float:
    """Multiplications that are executed, padding included, over those that are useful."""
    a = launch.arguments
    blocks = -(-a["D"] // a["BLOCK_D"])
    tokens = a["splits"] * a["share"] if "share" in a else a["tiles"] * a["TOKENS"]
    return tokens / (H * W) * blocks * a["BLOCK_D"] / a["D"] * a["BLOCK_V"] / a["V"]


def cases() -> Iterator[Case]:
    """Every use on every map, in all types."""
    for dtype, name in TYPES.items():
        for use in USES:
            for H, W in use.maps:
                shape = f"{H}x{W} d{use.d}" + f"/{use.dv}" * (use.d != use.dv)
                for launch in launches(use, H, W, dtype):
                    yield Case("linear_attention", shape, use.models, name, launch, work(launch, H, W))
