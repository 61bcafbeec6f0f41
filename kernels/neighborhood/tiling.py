"""How the Triton kernels cut a map: tiles of neighbouring tokens, and the chunks in which their windows are walked.

A program owns a tile of tokens of one dilation group, and walks over the rectangle of tokens that their windows touch,
a chunk of rows x cols at a time, under a mask. Any choice is right; this file makes the one with the least work.
"""
from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from .window import Window, attended_pairs, axis_range

CHUNK = 32  # tokens
COLUMNS = (16, 8, 32)  # of a chunk: windows of 8 queries for kernels up to 9, groups of at most 8, larger kernels
TENSOR_CORE_TILES = ((8, 8), (16, 4), (4, 16))  # 64 tokens, the rows of Hopper's matrix instruction
SMALL_TILES = ((4, 8), (8, 4))  # less work, for float32: exact products have no tensor cores to feed


class Tiling(NamedTuple):
    tile: tuple[int, int]  # tokens that a program owns, height and width
    chunk: tuple[int, int]  # tokens that it meets at a time

    def executed(self, H: int, W: int, window: Window, inverse: bool) -> int:
        """(query, key) pairs that are computed for one head of one map, masked ones and padding included."""
        steps = [
            sum(-(-span // chunk) for span in spans(length, window, axis, tile, inverse))
            for axis, (length, tile, chunk) in enumerate(zip((H, W), self.tile, self.chunk, strict=True))
        ]
        return math.prod((*self.tile, *self.chunk, *steps))

    def work(self, H: int, W: int, window: Window, inverse: bool) -> float:
        """Executed over useful pairs."""
        return self.executed(H, W, window, inverse) / attended_pairs(H, W, window)


def spans(length: int, window: Window, axis: int, tile: int, inverse: bool) -> list[int]:
    """For every tile of an axis, the number of keys its queries see; inversely, of queries that see its keys."""
    kernel, dilation, stride = window.kernel[axis], window.dilation[axis], window.stride[axis]
    start, count = axis_range(length, kernel, dilation, stride, window.causal[axis], window.disc)
    found = []
    for group in range(min(dilation, length)):
        low, high = start[group::dilation], (start + count)[group::dilation]
        first = np.arange(0, len(low), tile)
        last = np.minimum(first + tile, len(low)) - 1
        if inverse:  # both ends of a window grow with the query, so those who see a key are neighbours
            found += (np.searchsorted(low, last, "right") - np.searchsorted(high, first, "right")).tolist()
        else:
            found += (high[last] - low[first]).tolist()
    return found


@functools.lru_cache(maxsize=1024)
def choose(
    H: int, W: int, window: Window, *, tensor_cores: bool, inverse: bool = False, toeplitz: bool = False
) -> Tiling:
    """The tiling with the least executed work; the earlier candidate among equals.

    Args:
        tensor_cores: whether the products run on them.
        inverse: tiles of keys, chunks of the queries that see them.
        toeplitz: for the gradient of the bias, whose chunks are as wide as the tile's windows, and meet it in at least
            16 pairs of a query row and a key row.
    """
    candidates = []
    for tile, cols in itertools.product(TENSOR_CORE_TILES if tensor_cores else SMALL_TILES, COLUMNS):
        rows = CHUNK // cols
        if toeplitz:
            widest = max(spans(W, window, 1, tile[1], inverse))
            rows, cols = max(rows, 16 // tile[0]), max(cols, 1 << (widest - 1).bit_length())
        candidates.append(Tiling(tile, (rows, cols)))
    # Larger chunks, where a wide kernel leaves no choice, cost registers.
    return min(candidates, key=lambda t: (max(CHUNK, math.prod(t.chunk)), t.executed(H, W, window, inverse)))
