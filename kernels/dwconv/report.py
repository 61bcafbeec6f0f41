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
    """One convolution of every block of some models, by the channels of each stage; 0 where a stage has none."""

    models: tuple[str, ...]
    channels: tuple[int, int, int, int]
    kernel: tuple[int, int]
    residual: bool


def _enhanced(dims: tuple[int, int, int, int], ratio: float, *models: str) -> tuple[Layers, ...]:
    """A positional convolution 3x3 and a local one 5x5 per block, and a third inside the MLP."""
    hidden = tuple(int(dim * ratio) for dim in dims)
    return Layers(models, dims, (3, 3), True), Layers(models, dims, (5, 5), False), Layers(models, hidden, (3, 3), True)


def _mixer(kernel: int, channels: tuple[int, int, int, int], *models: str) -> tuple[Layers, ...]:
    """A convolution inside the mixer, or of its result."""
    return (Layers(models, channels, (kernel, kernel), False),)


def _positional(dims: tuple[int, int, int, int], *models: str) -> tuple[Layers, ...]:
    """A convolution 3x3 around each mixer and MLP."""
    return (Layers(models, dims, (3, 3), True),)


def _care(dims: tuple[int, int, int, int], ratios: tuple[tuple[int, int], ...], *models: str) -> tuple[Layers, ...]:
    """Groups of a quarter of the channels, strips in the first two stages, and two inverted bottlenecks."""
    group = tuple(dim // 4 for dim in dims)
    first, second = (tuple(ratio[i] * dim for ratio, dim in zip(ratios, dims, strict=True)) for i in range(2))
    return (
        *(Layers(models, (*group[:2], 0, 0), strip, False) for strip in ((11, 1), (1, 11))),
        *_mixer(3, group, *models), *_mixer(7, group, *models),
        *_mixer(3, tuple(3 * width // 4 for width in first), *models), *_mixer(3, second, *models),
    )


def _pyramid(dim: int) -> tuple[int, int, int, int]:
    return dim, 2 * dim, 4 * dim, 8 * dim


LAYERS = (
    *_enhanced((64, 128, 256, 512), 3.5, "ravlt_tiny", "mavit_tiny"),
    *_enhanced((64, 128, 320, 512), 3.5, "ravlt_small", "mavit_small", "nalaformer_small"),
    *_enhanced((96, 192, 384, 512), 3.5, "ravlt_base", "mavit_base"),
    *_enhanced((96, 192, 448, 640), 3.5, "ravlt_large", "mavit_large", "nalaformer_large"),
    *_enhanced((32, 64, 128, 384), 3.5, "nalaformer_xtiny"),
    *_enhanced((64, 128, 256, 512), 4, "nalaformer_tiny"),
    *_enhanced((96, 192, 384, 512), 4, "nalaformer_base"),
    *_positional(_pyramid(64), "mila_tiny", "mila_small", "vssd_tiny", "vssd_small"),
    *_positional(_pyramid(96), "mila_base", "vssd_base", "l2vit_tiny", "l2vit_small"),
    *_positional(_pyramid(128), "l2vit_base"),
    *_positional(_pyramid(48), "vssd_micro"),
    *_mixer(3, _pyramid(64), "mila_tiny", "mila_small"),
    *_mixer(3, _pyramid(96), "mila_base", "vmamba_tiny", "vmamba_small"),
    *_mixer(3, _pyramid(128), "vmamba_base"),
    *_mixer(
        3, _pyramid(192), "vmamba_tiny_s2l5", "vmamba_small_s2l15", "vanilla_vmamba_tiny", "vanilla_vmamba_small"
    ),
    *_mixer(3, _pyramid(256), "vmamba_base_s2l15", "vanilla_vmamba_base"),
    *_mixer(3, (192, 288, 480, 0), "vssd_micro"),  # values, B and C
    *_mixer(3, (256, 384, 640, 0), "vssd_tiny", "vssd_small"),
    *_mixer(3, (320, 512, 896, 0), "vssd_base"),
    *_mixer(7, _pyramid(96), "l2vit_tiny", "l2vit_small"),
    *_mixer(7, _pyramid(128), "l2vit_base"),
    *_care(_pyramid(32), ((2, 2), (2, 4), (4, 4), (4, 4)), "care_s0"),
    *_care(_pyramid(32), ((2, 4), (2, 4), (4, 4), (4, 4)), "care_s1"),
    *_care((32, 64, 192, 384), ((4, 4),) * 4, "care_s2"),
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
        for side, channels in zip(SIDES, layers.channels, strict=True):
            if channels:
                shape = Shape(side, channels, layers.kernel, layers.residual)
                users.setdefault(shape, {}).update(dict.fromkeys(layers.models))
    for kernel in KERNELS:
        users.setdefault(Shape(*WIDEST, kernel, True), {})
    for dtype, (shape, models) in itertools.product((torch.bfloat16, torch.float32), users.items()):
        for launch, work in launches(shape, dtype):
            yield Case("dwconv", str(shape), tuple(models), TYPES[dtype], launch, work)
