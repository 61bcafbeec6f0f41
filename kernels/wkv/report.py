"""The launches that Vision-RWKV's bidirectional WKV makes, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from .._aot import TYPES, Case
from .._launch import Launch
from .triton import gradient_launch, output_launch, sums_launches

IMAGES = 64
MAPS = ((14, 14), (24, 24), (64, 64))  # patches of 16 pixels: of 224, 384 and, in detectors and segmenters, 1024 pixels
USES = (("vrwkv_tiny", 192), ("vrwkv_small", 384), ("vrwkv_base", 768), ("vrwkv_large", 1024))


def launches(L: int, C: int, dtype: torch.dtype) -> Iterator[Launch]:
    """The launches of forward and backward, whose keys and values are results of their own projections."""
    with torch.device("meta"):
        w = torch.empty(C)
        k = torch.empty(IMAGES, L, C, dtype=dtype)
        y = torch.empty(IMAGES, L, C)
        *forward, states = sums_launches(w, k, k, None)
        yield from forward
        yield output_launch(w, w, k, k, 1e-6, states, k, None)
        yield output_launch(w, w, k, k, 1e-6, states, y, y)
        *backward, states = sums_launches(w, y, k, y)
        yield from backward
        yield gradient_launch(k, w, w, k, k, y, y, states, k, k)[0]


def work(launch: Launch) -> float:
    """Tokens and channels that are computed, padding included, over those that there are."""
    a = launch.arguments
    tokens = a["chunks"] * a["CHUNK"] / a["L"] if "L" in a else 1.0
    return tokens * -(-a["C"] // a["BLOCK_C"]) * a["BLOCK_C"] / a["C"]


def cases() -> Iterator[Case]:
    """Every width on every map, in all types."""
    for dtype, name in TYPES.items():
        for model, C in USES:
            for H, W in MAPS:
                for launch in launches(H * W, C, dtype):
                    yield Case("bi_wkv", f"{H}x{W} c{C}", (model,), name, launch, work(launch))
