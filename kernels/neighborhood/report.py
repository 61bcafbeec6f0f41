"""The launches that NAT, DiNAT, DiNAT_s and the isotropic models make, for the ahead-of-time report."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._aot import TYPES, Case
from .._launch import Launch
from .tiling import Tiling
from .triton import forward_launch, key_gradient_launch, padded, query_gradient_launch
from .window import Window

IMAGES, HEADS, HEAD_DIM = 128, 4, 32  # head_dim is 32 in every model; the other two change no binary

NAT = ((1,),) * 4
DINAT = ((1, 8), (1, 4), (1, 2), (1,))
DINAT_384 = ((1, 13), (1, 6), (1, 3), (1,))


class Maps(NamedTuple):
    """Models, and the square maps they attend on: kernel size, sides, and the dilations used at each side."""

    models: tuple[str, ...]
    kernel: int
    sides: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]


_NAT = tuple(f"nat_{size}" for size in ("mini", "tiny", "small", "base"))
_DINAT = tuple(f"dinat_{size}" for size in ("mini", "tiny", "small", "base", "large"))
_DINAT_S = tuple(f"dinat_s_{size}" for size in ("tiny", "small", "base", "large"))
MAPS = (
    Maps(_NAT, 7, (56, 28, 14, 7), NAT),
    Maps(_NAT, 7, (96, 48, 24, 12), NAT),
    Maps((*_DINAT, *_DINAT_S), 7, (56, 28, 14, 7), DINAT),
    Maps((*_DINAT, *_DINAT_S), 7, (96, 48, 24, 12), DINAT),
    Maps(("dinat_large_384", "dinat_s_large_384"), 7, (96, 48, 24, 12), DINAT_384),
    Maps(("dinat_large_384_11x11",), 11, (96, 48, 24, 12), DINAT),
    Maps(("nat_isotropic_small", "nat_isotropic_base"), 7, (14, 24), ((1,), (1,))),
    Maps(("dinat_isotropic_small", "dinat_isotropic_base"), 7, (14, 24), ((1, 2), (1, 2))),
)


def launches(side: int, kernel: int, dilation: int, dtype: torch.dtype) -> Iterator[tuple[Launch, float]]:
    """The launches of forward and backward on a packed qkv tensor, with a bias in float32, each with its work."""
    window = Window((kernel, kernel), (dilation, dilation))
    scale = HEAD_DIM**-0.5
    with torch.device("meta"):
        qkv = torch.empty(IMAGES, side, side, 3, HEADS, HEAD_DIM, dtype=dtype)
        q, k, v = qkv.unbind(3)
        dq, dk, dv = torch.empty_like(qkv).unbind(3)
        out = torch.empty(q.shape, dtype=dtype)
        lse, stats = torch.empty(q.shape[:-1]), torch.empty(*q.shape[:-1], 2)
        biases = padded(torch.empty(HEADS, 2 * kernel - 1, 2 * kernel - 1))
        forward = forward_launch(q, k, v, biases, out, lse, window, scale)
        query, _ = query_gradient_launch(out, lse, q, k, v, biases, out, lse, stats, dq, window, scale)
        key = key_gradient_launch(out, q, k, v, biases, stats, dk, dv, window, scale)
    for launch, inverse in ((forward, False), (query, False), (key, True)):
        a = launch.arguments
        tiling = Tiling((a["TILE_H"], a["TILE_W"]), (a["ROWS"], a["COLS"]))
        yield launch, tiling.work(side, side, window, inverse)


def cases() -> Iterator[Case]:
    """Every distinct (map, kernel, dilation) in bfloat16 and float32, with the models that use it."""
    users: dict[tuple[int, int, int], dict[str, None]] = {}
    for maps in MAPS:
        for side, dilations in zip(maps.sides, maps.dilations, strict=True):
            for dilation in dilations:
                users.setdefault((side, maps.kernel, dilation), {}).update(dict.fromkeys(maps.models))
    for dtype, ((side, kernel, dilation), models) in itertools.product((torch.bfloat16, torch.float32), users.items()):
        shape = f"{side}²" + f" d{dilation}" * (dilation > 1) + f" k{kernel}" * (kernel != 7)
        for launch, work in launches(side, kernel, dilation, dtype):
            yield Case("neighborhood", shape, tuple(models), TYPES[dtype], launch, work)
