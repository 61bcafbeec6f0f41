"""The Triton kernel of token matching: the tiles of FlashAttention's forward, of which only row maxima remain.

A program owns a tile of sources and walks over destinations tile by tile; the products of a tile stay in registers. It
keeps the largest affinity of every row, and its place. Where sources are too few to keep a GPU busy, the destinations
of a tile are shared by several programs, whose maxima are compared afterwards. Tokens are read where they lie, by their
strides; past the end, the last token is read in place of the missing ones.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .form import factors

NEVER = tl.constexpr(float("-inf"))

# Sizes that no binary depends on: one serves all numbers of tokens. The width of a token does count.
SIZES = ["N", "M", "tiles", "splits", "share"]
PROGRAMS = 512  # that keep any GPU busy
SHARE = 256  # destinations that are worth a program


@triton.jit
def _load(tensor, strides, image, token, channel, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) of a (B, tokens, D) tensor, zero past the last channel."""
    pointers = (tensor + image * strides[0] + token.to(tl.int64) * strides[1])[:, None] + channel[None, :]
    if D % BLOCK_D == 0:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
    return values


@triton.jit(do_not_specialize=SIZES)
def match_kernel(
    src, dst, factor, slope, offset, score, index, src_strides, dst_strides, N, M, tiles, splits, share,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SOURCES: tl.constexpr, DESTINATIONS: tl.constexpr,
):
    """score and index: (B, splits, N); the best among `share` destinations, of the first split from 0 on."""
    program = tl.program_id(0)
    n = program % tiles * SOURCES + tl.arange(0, SOURCES)
    program //= tiles
    split, image = program % splits, (program // splits).to(tl.int64)
    exists = n < N
    n = tl.minimum(n, N - 1)

    rows = tl.load(factor + image * N + n)
    best = tl.full([SOURCES], NEVER, tl.float32)
    place = tl.zeros([SOURCES], tl.int32)
    end = tl.minimum((split + 1) * share, M)
    for first in range(split * share, end, DESTINATIONS):
        m = first + tl.arange(0, DESTINATIONS)
        inside = m < end
        m = tl.minimum(m, M - 1)
        products = tl.zeros([SOURCES, DESTINATIONS], tl.float32)
        for d in range(0, D, BLOCK_D):
            channel = d + tl.arange(0, BLOCK_D)
            sources = _load(src, src_strides, image, n, channel, D, BLOCK_D)
            destinations = _load(dst, dst_strides, image, m, channel, D, BLOCK_D)
            products = tl.dot(sources, tl.trans(destinations), products, input_precision="ieee")
        affinity = products * rows[:, None] * tl.load(slope + image * M + m)[None, :]
        if offset is not None:
            affinity += tl.load(offset + image * M + m)[None, :]
        affinity = tl.where(inside[None, :], affinity, NEVER)
        highest, at = tl.max(affinity, 1, return_indices=True)  # the first of equals
        place = tl.where(highest > best, first + at, place)
        best = tl.maximum(best, highest)

    out = (image * splits + split) * N + n
    tl.store(score + out, best, mask=exists)
    tl.store(index + out, place.to(tl.int64), mask=exists)


def match_launch(
    src: torch.Tensor, dst: torch.Tensor, factor: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor | None
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch, and what it writes: scores and indices of every split, (B, splits, N)."""
    (B, N, D), M = src.shape, dst.shape[1]
    narrow = src.element_size() == 2
    sources, destinations, block = (128, 64, 64) if narrow else (64, 64, 32)
    tiles = triton.cdiv(N, sources)
    wanted = min(triton.cdiv(PROGRAMS, max(1, B * tiles)), triton.cdiv(M, SHARE))
    share = triton.cdiv(triton.cdiv(M, wanted), destinations) * destinations
    splits = triton.cdiv(M, share)
    score = torch.empty(B, splits, N, dtype=torch.float32, device=src.device)
    index = torch.empty(B, splits, N, dtype=torch.long, device=src.device)
    arguments = dict(
        src=src, dst=dst, factor=factor, slope=slope, offset=offset, score=score, index=index,
        src_strides=src.stride()[:2], dst_strides=dst.stride()[:2], N=N, M=M, tiles=tiles, splits=splits, share=share,
        D=D, BLOCK_D=min(block, max(16, triton.next_power_of_2(D))), SOURCES=sources, DESTINATIONS=destinations,
    )
    return Launch(match_kernel, B * splits * tiles, arguments, 128 if narrow else 256, stages=2), score, index


def token_match(
    src: torch.Tensor, dst: torch.Tensor, dst_weight: torch.Tensor | None, dst_mask: torch.Tensor | None, affinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs are read by their strides, and copied only if channels are not contiguous."""
    src, dst = (x if x.stride(-1) == 1 else x.contiguous() for x in (src, dst))
    launch, score, index = match_launch(src, dst, *factors(src, dst, dst_weight, dst_mask, affinity))
    launch.run()
    if score.shape[1] == 1:
        return score[:, 0], index[:, 0]
    score, split = score.max(1)  # the first of equals
    return score, index.gather(1, split[:, None])[:, 0]
