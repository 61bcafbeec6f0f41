"""The rotary embedding in Triton: a kernel of its own, and what other kernels turn their tokens by.

Cosines and sines come from the table of one axis (`table.turns`), which is small enough to stay in the processors'
caches; two loads are cheaper than a sine.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .table import Rotary, turns

TILE = 2048  # elements of a program


@triton.jit
def rotation(turns, half, row, col, head, channel, D: tl.constexpr, RUN: tl.constexpr):
    """Cosines and sines, (tokens, channels / 2) each, of some channels of a head.

    turns, half, RUN: see `table`. row, col: (tokens,). channel: (channels,) from a multiple of 16 on; may pass the end.
    """
    channel = (head * D + channel).to(tl.int32) % (2 * half)
    position = tl.where((channel < half)[None, :], row[:, None], col[:, None])
    entry = position * half + (channel % half)[None, :]
    turn = tl.load(turns + tl.max_contiguous(tl.multiple_of(entry, (1, RUN)), (1, RUN)))
    return tl.split(tl.reshape(turn, [turn.shape[0], turn.shape[1] // 2, 2]))


@triton.jit
def turned(x, cos, sin):
    """x (tokens, channels) turned by `rotation`; back, by -sin."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)


@triton.jit(do_not_specialize=["N", "W", "heads", "tiles", "half"])
def rotary_kernel(
    x, out, turns, x_strides, N, W, heads, tiles, half,
    INVERSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, RUN: tl.constexpr,
):
    """A program turns TOKENS tokens of a head; `out` is contiguous."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    image = (program // tiles).to(tl.int64)
    n = program % tiles * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < D)[None, :]
    n = tl.minimum(n, N - 1)  # the table holds no position past the map
    row, col = n // W, n % W
    tokens = x + image * x_strides[0] + head * x_strides[3]
    tokens += row.to(tl.int64) * x_strides[1] + col.to(tl.int64) * x_strides[2]
    value = tl.load(tokens[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    cos, sin = rotation(turns, half, row, col, head, d, D, RUN)
    value = turned(value, cos, -sin if INVERSE else sin)
    tokens = out + ((image * N + n) * heads + head) * D
    tl.store(tokens[:, None] + d[None, :], value.to(out.dtype.element_ty), mask=mask)


def table(H: int, W: int, D: int, rotary: Rotary | None, device: torch.device) -> dict:
    """What `rotation` needs, as arguments of the kernel that calls it; without an embedding, `turns` is None.

    turns: the table, (positions, half) numbers, a cosine and a sine by turns; half: half of the span; RUN: the
    channels whose entries are neighbours wherever a run of them starts, up to 16, so that they are loaded at once.
    """
    if rotary is None:
        return dict(turns=None, half=0, RUN=1)
    half = rotary.span // 2
    return dict(turns=turns(max(H, W), rotary, device, torch.float32), half=half, RUN=math.gcd(16, half, D))


def rotary_launch(x: torch.Tensor, out: torch.Tensor, rotary: Rotary, inverse: bool) -> Launch:
    B, H, W, heads, head_dim = x.shape
    block = max(2, triton.next_power_of_2(head_dim))
    tiles = triton.cdiv(H * W, TILE // block)
    arguments = dict(
        x=x, out=out, x_strides=x.stride()[:4], N=H * W, W=W, heads=heads, tiles=tiles,
        **table(H, W, head_dim, rotary, x.device), INVERSE=inverse, D=head_dim, BLOCK_D=block, TOKENS=TILE // block,
    )
    return Launch(rotary_kernel, B * tiles * heads, arguments)


def rotary2d(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    """Contiguous; x is read by its strides, and copied only if channels are not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotary_launch(x, out, rotary, inverse).run()
    return out
