"""The launches that the zoo's scans make, for the ahead-of-time report."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._aot import TYPES, Case
from .._launch import Launch
from .triton import (
    Before,
    Gradients,
    Grid,
    Lines,
    before_launches,
    gradient_launch,
    linear_scan_launch,
    of_groups,
    of_routes,
    output_launches,
)

IMAGES = 64  # at 224 pixels; the detectors take one at a time
MAPS = ((56, 56), (28, 28), (14, 14), (7, 7))
DETECTION = ((200, 304), (100, 152), (50, 76), (25, 38))  # the same of 800x1216 pixels


class Use(NamedTuple):
    """Scans along four routes in a pyramid's stages, each with twice the channels and ranks of the one before."""

    models: tuple[str, ...]
    D: int
    R: int
    N: int
    merge: str = "sum"
    stages: int = 4


class Sequence(NamedTuple):
    """Scans of sequences, or of a map along four routes that leave the time steps where they are."""

    models: tuple[str, ...]
    lengths: tuple[int, ...]
    D: int
    N: int
    both: bool = False  # directions
    R: int = 0  # along routes


def _names(family: str, sizes: str) -> tuple[str, ...]:
    return tuple(f"{family}_{size}" for size in sizes.split())


PYRAMIDS = (
    Use(_names("vmamba", "tiny small"), 96, 6, 1),
    Use(_names("vmamba", "base"), 128, 8, 1),
    Use(_names("vmamba", "tiny_s2l5 small_s2l15"), 192, 6, 1),
    Use(_names("vmamba", "base_s2l15"), 256, 8, 1),
    Use(_names("vanilla_vmamba", "tiny small"), 192, 6, 16),
    Use(_names("vanilla_vmamba", "base"), 256, 8, 16),
    Use(_names("medmamba", "tiny small"), 96, 3, 16),
    Use(_names("medmamba", "base"), 128, 4, 16),
    Use(_names("local_vmamba", "tiny small"), 192, 6, 16, "stack"),
    Use(_names("efficient_vmamba", "tiny"), 96, 3, 16, "scatter", 2),
    Use(_names("efficient_vmamba", "small"), 128, 4, 16, "scatter", 2),
    Use(_names("efficient_vmamba", "base"), 192, 6, 16, "scatter", 2),
)
SEQUENCES = (
    *(
        Sequence((f"vim_{size}",), (length,), D, 16, both=True)
        for size, D, length in (
            ("tiny", 384, 197), ("small", 768, 197), ("base", 1536, 197), ("tiny_stride8", 384, 730),
            ("small_stride8", 768, 730),
        )
    ),
    Sequence(_names("local_vim", "tiny tiny_middle_cls_token"), (196, 197), 384, 16),
    Sequence(_names("local_vim", "small"), (196,), 768, 16),
    *(
        Sequence(_names("mambavision", sizes), (length // 4**stage,), D * 2**stage, 8)
        for sizes, D, length in (
            ("tiny tiny2", 160, 196), ("small", 192, 196), ("base", 256, 196), ("large large2", 392, 196),
            ("large3", 512, 256),
        )
        for stage in range(2)
    ),
    *(
        Sequence(_names("plainmamba", size), (196, 3800), D, 16, R=R)
        for size, D, R in (("l1", 384, 12), ("l2", 768, 24), ("l3", 896, 28))
    ),
)


def routed(images: int, L: int, steps: int, D: int, R: int, N: int, permute: str, dtype: torch.dtype) -> Lines:
    """Four routes, on the meta device."""
    with torch.device("meta"):
        return of_routes(
            torch.empty(images, L, D, dtype=dtype), torch.empty(images, L, 4 * (R + 2 * N), dtype=dtype),
            torch.empty(4, D, R), torch.empty(4, D), torch.empty(4, D, N), torch.empty(4, D),
            torch.empty(4, steps, dtype=torch.int32), permute,
        )


def grouped(images: int, L: int, D: int, N: int, reverse: bool, dtype: torch.dtype) -> Lines:
    """A sequence with one group, on the meta device."""
    with torch.device("meta"):
        u, B = torch.empty(images, L, D, dtype=dtype), torch.empty(images, L, 1, N, dtype=dtype)
        return of_groups(u, u, torch.empty(D, N), B, B, torch.empty(D), torch.empty(D), True, reverse)


def launches(lines: Lines, merge: str) -> Iterator[Launch]:
    """Of forward and backward; of lines that are launched one after another, the first."""
    (B, L, K, D), shared = lines.x.shape, merge in ("sum", "stack")
    with torch.device("meta"):
        out = torch.empty(B, L, 1, D).expand(-1, -1, K, -1)
        dout = out if merge in ("sum", "scatter") else torch.empty(B, L, K, D)
        grid = Grid.of(lines, merge == "sum")
        state = lines.zeros(B, K, grid.chunks, *lines.A.shape[1:])
        forward = output_launches(lines, grid, dout, state, merge == "sum")
        for _, (launch, *_) in itertools.groupby(forward, lambda launch: launch.kernel):
            yield launch
        grid = Grid.of(lines, shared)
        before, found, ddelta = Before.of(lines, grid, None), Gradients.of(lines, grid, out), torch.empty(dout.shape)
        yield from before_launches(lines, grid, dout, before)
        if lines.delta is None:
            lines = lines._replace(delta=ddelta, weight=None)
        yield gradient_launch(lines, grid, dout, before, found, ddelta, shared, 0, 1)


def work(launch: Launch) -> float:
    """Steps and channels that are executed, padding included, over those that are useful."""
    a = launch.arguments
    steps = a["steps"] if "steps" in a else a["chunks"]
    tiles = -(-steps // a["STEPS"])
    return tiles * a["STEPS"] / steps * a["blocks"] * a["CHANNELS"] / a["D"]


def _scans(dtype: torch.dtype) -> Iterator[tuple[str, tuple[str, ...], str, Lines]]:
    """(shape, models, merge, lines)."""
    for use in PYRAMIDS:
        for images, maps in ((IMAGES, MAPS), (1, DETECTION)):
            for stage, (H, W) in enumerate(maps[:use.stages]):
                D, R = use.D * 2**stage, use.R * 2**stage
                steps = -(-H // 2) * -(-W // 2) if use.merge == "scatter" else H * W
                lines = routed(images, H * W, steps, D, R, use.N, "all", dtype)
                yield f"{H}x{W} d{D} n{use.N} r{R} {use.merge}", use.models, use.merge, lines
    for use in SEQUENCES:
        for L in use.lengths:
            if use.R:
                lines = routed(IMAGES, L, L, use.D, use.R, use.N, "u", dtype)
                yield f"l{L} d{use.D} n{use.N} r{use.R} u", use.models, "sum", lines
                continue
            for reverse in (False, True)[: 1 + use.both]:
                lines = grouped(IMAGES, L, use.D, use.N, reverse, dtype)
                yield f"l{L} d{use.D} n{use.N}" + " reversed" * reverse, use.models, "groups", lines


def cases() -> Iterator[Case]:
    """Every scan on every map, in bfloat16 and float32; and the bare recurrence, which no model has."""
    for dtype in (torch.bfloat16, torch.float32):
        for shape, models, merge, lines in _scans(dtype):
            for launch in launches(lines, merge):
                yield Case("scan", shape, models, TYPES[dtype], launch, work(launch))
    with torch.device("meta"):
        b = torch.empty(8, 197, 384)
        for h0, late, reverse in itertools.product((None, b[:, 0]), (False, True), (False, True)):
            launch = linear_scan_launch(b, b, h0, b, late, reverse)
            yield Case("scan", "l197 d384", (), "fp32", launch, work(launch))
