"""Triton kernels of attention's column mean: the tiles of FlashAttention's forward, of which only sums remain.

`lse_kernel` walks over the keys of a tile of queries for the log-sum-exp of every row, as FlashAttention does (Dao,
arXiv 2307.08691). `columns_kernel` walks over the queries of a tile of keys, computes the scores once more, and adds up
their attention. q and k are read where they lie, by their strides; past the end, the last token is read in place of the
missing ones.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch

LOG2E = tl.constexpr(1.4426950408889634)  # scores are kept in units of log 2, where exp2 is one instruction
NEVER = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-1e30)  # where a running maximum starts: finite, so that tiles without a key give no NaN

# Sizes that no binary depends on: one serves all numbers of tokens and heads.
SIZES = ["N", "M", "heads", "tiles"]
TILE = 64  # tokens that a program owns, and that it meets at a time


@triton.jit
def _load(tensor, strides, token, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) of one head, zero past its last channel."""
    pointers = (tensor + token.to(tl.int64) * strides[2])[:, None] + channel[None, :]
    if D % BLOCK_D == 0:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
    return values


@triton.jit
def _products(
    a, a_strides, rows, b, b_strides, columns, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr
):
    """Of tokens `rows` of a with tokens `columns` of b; channels come in blocks, so that float32 leaves registers."""
    products = tl.zeros([TILE, TILE], tl.float32)
    for d in range(0, D, BLOCK_D):
        channel = d + tl.arange(0, BLOCK_D)
        row, column = _load(a, a_strides, rows, channel, D, BLOCK_D), _load(b, b_strides, columns, channel, D, BLOCK_D)
        products = tl.dot(row, tl.trans(column), products, input_precision="ieee")
    return products


@triton.jit
def _bias(key_bias, image, m, M):
    """(keys,) in units of log 2, -inf past the last key; `key_bias` is (B, M) or None."""
    bias = tl.where(m < M, 0.0, NEVER)
    if key_bias is not None:
        bias += tl.load(key_bias + image * M + tl.minimum(m, M - 1)).to(tl.float32) * LOG2E
    return bias


@triton.jit(do_not_specialize=SIZES)
def lse_kernel(
    q, k, key_bias, lse, q_strides, k_strides, N, M, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):
    """lse: (B, heads, N), contiguous, in units of log 2, as is `scale`."""
    program = tl.program_id(0)
    n = program % tiles * TILE + tl.arange(0, TILE)
    program //= tiles
    head, image = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    q += image * q_strides[0] + head * q_strides[1]
    k += image * k_strides[0] + head * k_strides[1]
    queries = tl.minimum(n, N - 1)

    maximum = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, M, TILE):
        m = first + tl.arange(0, TILE)
        scores = _products(q, q_strides, queries, k, k_strides, tl.minimum(m, M - 1), D, BLOCK_D, TILE) * scale
        scores += _bias(key_bias, image, m, M)[None, :]
        higher = tl.maximum(maximum, tl.max(scores, 1))
        total = total * tl.exp2(maximum - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        maximum = higher
    tl.store(lse + (image * heads + head) * N + n, maximum + tl.log2(total), mask=n < N)


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    q, k, key_bias, weight, lse, out, q_strides, k_strides, N, M, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):
    """out: (B, heads, M), weight like lse; both contiguous. Keys lie along the rows of a tile, whose sums are cheap."""
    program = tl.program_id(0)
    m = program % tiles * TILE + tl.arange(0, TILE)
    program //= tiles
    head, image = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    q += image * q_strides[0] + head * q_strides[1]
    k += image * k_strides[0] + head * k_strides[1]
    keys = tl.minimum(m, M - 1)
    bias = _bias(key_bias, image, m, M)

    rows = (image * heads + head) * N
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, N, TILE):
        n = first + tl.arange(0, TILE)
        scores = _products(k, k_strides, keys, q, q_strides, tl.minimum(n, N - 1), D, BLOCK_D, TILE) * scale
        scores += bias[:, None]
        attention = tl.exp2(scores - tl.load(lse + rows + n, mask=n < N, other=float("inf"))[None, :])
        if weight is not None:
            attention *= tl.load(weight + rows + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(attention, 1)
    if weight is None:
        total /= N
    tl.store(out + (image * heads + head) * M + m, total, mask=m < M)


# ---- Launches -------------------------------------------------------------------------------------------------------

def _launch(kernel: triton.JITFunction, q: torch.Tensor, k: torch.Tensor, tokens: int, scale: float, **own) -> Launch:
    """One program a head and tile of `tokens`; adds to `own` what both kernels share."""
    (B, heads, N, D), M = q.shape, k.shape[2]
    tiles = triton.cdiv(tokens, TILE)
    wide = q.element_size() == 4
    arguments = own | dict(
        q=q, k=k, q_strides=q.stride()[:3], k_strides=k.stride()[:3], N=N, M=M, heads=heads, tiles=tiles,
        scale=scale * LOG2E.value, D=D, BLOCK_D=min(32 if wide else 64, max(16, triton.next_power_of_2(D))), TILE=TILE,
    )
    return Launch(kernel, B * heads * tiles, arguments, 256 if wide else 128, stages=2)


def lse_launch(q, k, key_bias, lse, scale: float) -> Launch:
    return _launch(lse_kernel, q, k, q.shape[2], scale, key_bias=key_bias, lse=lse)


def columns_launch(q, k, key_bias, weight, lse, out, scale: float) -> Launch:
    return _launch(columns_kernel, q, k, k.shape[2], scale, key_bias=key_bias, weight=weight, lse=lse, out=out)


def attention_column_mean(
    q: torch.Tensor, k: torch.Tensor, key_bias: torch.Tensor | None, weight: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """q and k are read by their strides, and copied only if channels are not contiguous."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    key_bias, weight = (None if x is None else x.contiguous() for x in (key_bias, weight))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    out = torch.empty(k.shape[:3], dtype=torch.float32, device=q.device)
    lse_launch(q, k, key_bias, lse, scale).run()
    columns_launch(q, k, key_bias, weight, lse, out, scale).run()
    return out
