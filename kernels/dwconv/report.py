"""The launches that the zoo's depthwise convolutions make, for the ahead-of-time report."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._aot import TYPES, Case
from .._launch import Launch
from .triton import forward_launch, weight_gradient_launch

IMAGES = 128
SIDES = (56, 28, 14, 7)


class Layers(NamedTuple):
    """Models with a positional convolution 3x3 and a local one 5x5 per block, and a third inside the MLP."""

    models: tuple[str, ...]
    dims: tuple[int, int, int, int]
    hidden: tuple[int, int, int, int]


def _layers(dims: tuple[int, int, int, int], ratio: float, *models: str) -> Layers:
    return Layers(models, dims, tuple(int(dim * ratio) for dim in dims))


LAYERS = (
    _layers((64, 128, 256, 512), 3.5, "ravlt_tiny", "mavit_tiny"),
    _layers((64, 128, 320, 512), 3.5, "ravlt_small", "mavit_small", "nalaformer_small"),
    _layers((96, 192, 384, 512), 3.5, "ravlt_base", "mavit_base"),
    _layers((96, 192, 448, 640), 3.5, "ravlt_large", "mavit_large", "nalaformer_large"),
    _layers((32, 64, 128, 384), 3.5, "nalaformer_xtiny"),
    _layers((64, 128, 256, 512), 4, "nalaformer_tiny"),
    _layers((96, 192, 384, 512), 4, "nalaformer_base"),
)
# Any other kernel that the op takes, on the tiles that need most registers: large-kernel and strip convolutions.
KERNELS = ((5, 5), (7, 7), (9, 9), (11, 11), (11, 1), (1, 11))
WIDEST = (14, 256)


class Shape(NamedTuple):
    side: int
    channels: int
    kernel: tuple[int, int]
    residual: bool

    def __str__(self) -> str:
        return f"{self.side}² c{self.channels} k{self.kernel[0]}x{self.kernel[1]}" + " residual" * self.residual


def launches(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Launch, float]]:
    """The launches of forward and backward with a bias, each with its work: multiply-adds inside the map or not."""
    with torch.device("meta"):
        x = torch.empty(IMAGES, shape.side, shape.side, shape.channels, dtype=dtype)
        weight, bias = torch.empty(*shape.kernel, shape.channels, dtype=dtype), torch.empty(shape.channels, dtype=dtype)
        forward = forward_launch(x, weight, bias, torch.empty_like(x), 1, shape.residual)
        gradient, *_ = weight_gradient_launch(x, x, shape.kernel, 1)
    a = forward.arguments
    work = forward.programs * a["ROWS"] * a["TILE_W"] * a["BLOCK_C"] / x.numel()
    yield from ((forward, work), (gradient, work))


def cases() -> Iterator[Case]:
    """Every distinct layer in bfloat16 and float32, with the models that have it."""
    users: dict[Shape, dict[str, None]] = {}
    for layers in LAYERS:
        for side, dim, hidden in zip(SIDES, layers.dims, layers.hidden, strict=True):
            for shape in (
                Shape(side, dim, (3, 3), True), Shape(side, dim, (5, 5), False), Shape(side, hidden, (3, 3), True)
            ):
                users.setdefault(shape, {}).update(dict.fromkeys(layers.models))
    for kernel in KERNELS:
        users.setdefault(Shape(*WIDEST, kernel, True), {})
    for dtype, (shape, models) in itertools.product((torch.bfloat16, torch.float32), users.items()):
        for launch, work in launches(shape, dtype):
            yield Case("dwconv", str(shape), tuple(models), TYPES[dtype], launch, work)
