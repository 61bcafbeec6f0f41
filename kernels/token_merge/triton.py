"""Triton kernels of merging, forward and backward. Nothing is added up by atomics: results are the same every time.

Forward: a program owns a few destinations and a block of channels; all of its destinations walk over their lists of
tokens in step. Backward: a program owns a few tokens, and gathers from their destinations. x is read where it lies, by
its strides; other tensors are contiguous.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .segments import segments

# Sizes that no binary depends on: one serves all numbers of tokens. Channels do count: they align the loads.
SIZES = ["N", "M", "tiles"]
TILE = 2048  # elements of a program at a time


@triton.jit
def _inverse(total):
    """1 / total, and 0 where there is no weight."""
    return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    x, order, starts, weight, merged, total, x_strides, N, M, C, tiles, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    block = program % blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    m = program % tiles * ROWS + tl.arange(0, ROWS)
    image = (program // tiles).to(tl.int64)
    slot = image * M + m
    first = tl.load(starts + slot, mask=m < M, other=0)
    count = tl.load(starts + slot + 1, mask=m < M, other=0) - first

    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    x += image * x_strides[0]
    for step in range(tl.max(count)):
        has = step < count
        token = tl.load(order + first + step, mask=has, other=0)
        if weight is None:
            w = has.to(tl.float32)
        else:
            w = tl.load(weight + token, mask=has, other=0.0).to(tl.float32)
        pointers = x + ((token - image * N) * x_strides[1])[:, None] + c[None, :]
        sums += w[:, None] * tl.load(pointers, mask=has[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        weights += w

    sums *= _inverse(weights)[:, None]
    pointers = merged + (slot * C)[:, None] + c[None, :]
    tl.store(pointers, sums.to(merged.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])
    tl.store(total + slot, weights, mask=(m < M) & (block == 0))


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    dmerged, dtotal, x, index, weight, merged, total, dx, dweight, x_strides, N, M, C, tiles,
    TOKENS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    n = program % tiles * TOKENS + tl.arange(0, TOKENS)
    image = (program // tiles).to(tl.int64)
    token = image * N + n
    exists = n < N
    slot = image * M + tl.load(index + token, mask=exists, other=0)
    share = _inverse(tl.load(total + slot))
    factor = share
    if weight is not None:
        factor *= tl.load(weight + token, mask=exists, other=0.0).to(tl.float32)

    change = tl.zeros([TOKENS], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = exists[:, None] & (c < C)[None, :]
        there = (slot * C)[:, None] + c[None, :]
        gradient = tl.load(dmerged + there, mask=mask, other=0.0).to(tl.float32)
        value = (gradient * factor[:, None]).to(dx.dtype.element_ty)
        tl.store(dx + (token * C)[:, None] + c[None, :], value, mask=mask)
        if x is not None:  # merged, a mean, moves towards the tokens that gain weight
            here = x + image * x_strides[0] + (n.to(tl.int64) * x_strides[1])[:, None] + c[None, :]
            way = tl.load(here, mask=mask, other=0.0).to(tl.float32)
            way -= tl.load(merged + there, mask=mask, other=0.0).to(tl.float32)
            change += tl.sum(gradient * way, 1)
    if x is not None:
        change = change * share + tl.load(dtotal + slot)
        tl.store(dweight + token, change.to(dweight.dtype.element_ty), mask=exists)


# ---- Launches -------------------------------------------------------------------------------------------------------

def _tile(C: int) -> tuple[int, int]:
    """Tokens, and the channels of each at a time."""
    block = min(256, triton.next_power_of_2(C))
    return TILE // block, block


def merge_launch(x, order, starts, weight, merged, total) -> Launch:
    (B, N, C), M = x.shape, merged.shape[1]
    rows, block = _tile(C)
    tiles = triton.cdiv(M, rows)
    arguments = dict(
        x=x, order=order, starts=starts, weight=weight, merged=merged, total=total, x_strides=x.stride()[:2],
        N=N, M=M, C=C, tiles=tiles, ROWS=rows, BLOCK_C=block,
    )
    return Launch(merge_kernel, B * tiles * triton.cdiv(C, block), arguments)


def gradient_launch(dmerged, dtotal, x, index, weight, merged, total, dx, dweight) -> Launch:
    (B, N, C), M = dx.shape, total.shape[1]
    tokens, block = _tile(C)
    tiles = triton.cdiv(N, tokens)
    arguments = dict(
        dmerged=dmerged, dtotal=dtotal, x=x, index=index, weight=weight, merged=merged, total=total, dx=dx,
        dweight=dweight, x_strides=None if x is None else x.stride()[:2], N=N, M=M, C=C, tiles=tiles, TOKENS=tokens,
        BLOCK_C=block,
    )
    return Launch(gradient_kernel, B * tiles, arguments)


# ---- The path's two functions ---------------------------------------------------------------------------------------

def _readable(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def token_merge(
    x: torch.Tensor, index: torch.Tensor, M: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, C = x.shape
    merged = torch.empty(B, M, C, dtype=x.dtype, device=x.device)
    total = torch.empty(B, M, dtype=torch.float32, device=x.device)
    merge_launch(_readable(x), *segments(index, M), _contiguous(weight), merged, total).run()
    return merged, total


def token_merge_backward(
    dmerged: torch.Tensor,
    dtotal: torch.Tensor,
    x: torch.Tensor | None,
    index: torch.Tensor,
    weight: torch.Tensor | None,
    merged: torch.Tensor | None,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x, and of the weight if x and merged are given."""
    dmerged, dtotal, index, weight = map(_contiguous, (dmerged, dtotal, index, weight))
    dx = torch.empty(*index.shape, dmerged.shape[-1], dtype=dmerged.dtype, device=dmerged.device)
    dweight = None if x is None else torch.empty_like(weight)
    gradient_launch(dmerged, dtotal, _readable(x), index, weight, merged, total, dx, dweight).run()
    return dx, dweight
