"""The launches that VSSD's state-space duality makes, for the ahead-of-time report."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._aot import TYPES, Case
from .._launch import Launch
from .triton import key_gradient_launch, output_launch, sums_launch, value_gradient_launch

IMAGES = 64  # at 224 pixels; the detectors take 2
MAPS = ((56, 56), (28, 28), (14, 14))  # of the stages without softmax attention
DETECTION = ((200, 334), (100, 167), (50, 84))  # the same of 800x1333 pixels


class Use(NamedTuple):
    """The mixers of some models: heads of the first stage, doubled by each other stage, and sizes of the state."""

    models: tuple[str, ...]
    heads: int
    N: int
    P: int


USES = (
    Use(("vssd_micro",), 2, 48, 48),
    Use(("vssd_tiny", "vssd_small"), 2, 64, 64),
    Use(("vssd_base",), 3, 64, 64),
)


def launches(use: Use, stage: int, L: int, images: int, dtype: torch.dtype) -> Iterator[Launch]:
    """The launches of forward and backward on the parts of a convolved projection."""
    heads = use.heads * 2**stage
    with torch.device("meta"):
        x, B, C = torch.empty(images, L, heads * use.P + 2 * use.N, dtype=dtype).split(
            [heads * use.P, use.N, use.N], -1
        )
        x, B, C = x.unflatten(-1, (heads, -1)), B.unsqueeze(2), C.unsqueeze(2)
        weight, D = torch.empty(images, L, heads), torch.empty(heads)
        dx, dB, out = (torch.empty(t.shape, dtype=t.dtype) for t in (x, B, x.float()))
        launch, state = sums_launch(B, x, weight, dtype)
        yield launch
        yield output_launch(C, state, x, D, out)
        yield sums_launch(C, out, None, dtype)[0]
        yield key_gradient_launch(out, state, None, dB, dtype)
        yield key_gradient_launch(x, state, weight, dB, dtype)
        yield value_gradient_launch(B, state, x, D, out, weight, dx, weight)[0]


def work(launch: Launch, L: int) -> float:
    """Multiplications that are executed, padding included, over those that are useful."""
    a = launch.arguments
    tokens = a["splits"] * a["share"] if "share" in a else a["tiles"] * a["TOKENS"]
    padded = [-(-a[size] // a[f"BLOCK_{size}"]) * a[f"BLOCK_{size}"] / a[size] for size in "NP"]
    return tokens / L * padded[0] * padded[1]


def cases() -> Iterator[Case]:
    """Every mixer on every map of its stage, in all types."""
    for dtype, name in TYPES.items():
        for use in USES:
            for images, maps in ((IMAGES, MAPS), (2, DETECTION)):
                for stage, (H, W) in enumerate(maps):
                    shape = f"{H}x{W} h{use.heads * 2**stage} n{use.N} p{use.P}"
                    for launch in launches(use, stage, H * W, images, dtype):
                        yield Case("ssd", shape, use.models, name, launch, work(launch, H * W))
