"""Triton kernels of the non-causal form, forward and backward: matrix products with the state, (N, P) a head.

    forward     S = sum_s B_s (w_s x_s)^T                       sums_kernel
                y_t = C_t S + D x_t                             output_kernel
    backward    dS = sum_t C_t dy_t^T                           sums_kernel
                dx_s = w_s (B_s dS) + D dy_s, and dw_s, dD      value_gradient_kernel
                dC_t = sum_heads S dy_t                         key_gradient_kernel
                dB_s = sum_heads dS (w_s x_s)                   key_gradient_kernel

with the weights w = -A dt, one number a token and head, which PyTorch makes and differentiates. The forward's S is not
kept, but summed up again. `sums_kernel` splits the tokens into shares, whose partial sums are added up afterwards, in a
fixed order; the other kernels own a tile of tokens. Tensors are read where they lie, by their strides, and are zero
past their last token and channel; consecutive programs take the heads of the same tokens, which are neighbours in
memory, and which share B and C.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, shares
from .._product import product

# Sizes that no binary depends on: one serves all resolutions, batches and numbers of heads.
SIZES = ["L", "heads", "per_group", "images", "tiles", "splits", "share"]
TILE = 64  # tokens of a program that owns a tile: the rows of Hopper's matrix instruction
CHUNK = 32  # tokens that a program of the sums meets at a time
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # for `product`: as precise as the inputs are


# ---- Kernels --------------------------------------------------------------------------------------------------------

@triton.jit
def _load(tensor, strides, image, token, head, channel, L, CHANNELS: tl.constexpr):
    """(tokens, channels) of a (B, L, heads, CHANNELS) tensor."""
    tensor += image * strides[0] + head * strides[2]
    pointers = (tensor + token.to(tl.int64) * strides[1])[:, None] + channel[None, :]
    return tl.load(pointers, mask=(token < L)[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def _store(tensor, value, index, exists, channel, CHANNELS: tl.constexpr):
    """To a contiguous (B, L, heads, CHANNELS) tensor; `index` counts tokens and heads."""
    pointers, mask = tensor + (index * CHANNELS)[:, None] + channel[None, :], (channel < CHANNELS)[None, :]
    tl.store(pointers, value.to(tensor.dtype.element_ty), mask=exists[:, None] & mask)


@triton.jit
def _state(state, n, p, N: tl.constexpr, P: tl.constexpr):
    """Rows n and columns p of a head's state."""
    return tl.load(state + n[:, None] * P + p[None, :], mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def _tile(L, heads, tiles, TOKENS: tl.constexpr):
    """Index into (B, L, heads) of the program's tokens, and the tokens; the image and head, in int64."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    image = (program // tiles).to(tl.int64)
    token = program % tiles * TOKENS + tl.arange(0, TOKENS)
    return (image * L + token) * heads + head, token, image, head


@triton.jit
def _read(
    queries, queries_strides, state, image, token, head, p, L, heads, per_group,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):
    """(tokens, channels p): queries times the state of a head."""
    state += (image * heads + head) * (N * P)
    total = tl.zeros([token.shape[0], p.shape[0]], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        rows = _load(queries, queries_strides, image, token, head // per_group, n, L, N)
        total = product(rows, _state(state, n, p, N, P), total, PARTS)
    return total


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    keys, values, weight, partial, keys_strides, values_strides, L, heads, per_group, images, splits, share,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """sum_s keys_s (weight_s values_s)^T over one share of the tokens, BLOCK_N of its rows.

    keys (B, L, G, N), values (B, L, heads, P), weight (B, L, heads) or None for ones, partial
    (splits, B, heads, N, P).
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    n = program % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    program //= BLOCKS
    head = (program % heads).to(tl.int64)
    program //= heads
    split = program % splits
    image = (program // splits).to(tl.int64)

    total = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, L), TOKENS):
        token = first + tl.arange(0, TOKENS)
        rows = _load(keys, keys_strides, image, token, head // per_group, n, L, N)
        if weight is not None:
            weights = tl.load(weight + (image * L + token) * heads + head, mask=token < L, other=0.0)
            rows = rows.to(tl.float32) * weights[:, None]
        columns = _load(values, values_strides, image, token, head, p, L, P)
        total = product(tl.trans(rows), columns, total, PARTS)
    partial += ((split * images + image) * heads + head) * (N * P)
    tl.store(partial + n[:, None] * P + p[None, :], total, mask=(n < N)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    queries, state, x, skip, out, queries_strides, x_strides, L, heads, per_group, tiles,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y of a tile and head: `queries` are C, `skip` is D or None."""
    index, token, image, head = _tile(L, heads, tiles, TOKENS)
    p = tl.arange(0, BLOCK_P)
    y = _read(queries, queries_strides, state, image, token, head, p, L, heads, per_group, N, P, BLOCK_N, PARTS)
    if skip is not None:
        y += tl.load(skip + head).to(tl.float32) * _load(x, x_strides, image, token, head, p, L, P).to(tl.float32)
    _store(out, y, index, token < L, p, P)


@triton.jit(do_not_specialize=SIZES)
def value_gradient_kernel(
    queries, state, x, skip, dout, weight, dx, dweight, dskip, queries_strides, x_strides, dout_strides,
    L, heads, per_group, tiles,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The gradients of x and its weights of a tile and head, and the tile's part of D's, dskip (B, tiles, heads).

    `queries` are B, and `state` is the gradient of the state.
    """
    index, token, image, head = _tile(L, heads, tiles, TOKENS)
    p = tl.arange(0, BLOCK_P)
    dvalues = _read(queries, queries_strides, state, image, token, head, p, L, heads, per_group, N, P, BLOCK_N, PARTS)
    exists = token < L
    values = _load(x, x_strides, image, token, head, p, L, P).to(tl.float32)
    tl.store(dweight + index, tl.sum(dvalues * values, 1), mask=exists)
    dvalues *= tl.load(weight + index, mask=exists, other=0.0)[:, None]
    if skip is not None:
        dy = _load(dout, dout_strides, image, token, head, p, L, P).to(tl.float32)
        dvalues += tl.load(skip + head).to(tl.float32) * dy
        tl.store(dskip + tl.program_id(0), tl.sum(dy * values))  # the order of programs is (B, tiles, heads)
    _store(dx, dvalues, index, exists, p, P)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    values, state, weight, out, values_strides, L, heads, per_group, tiles,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """sum_heads state (weight_t values_t), BLOCK_N rows for a tile of one group: out (B, L, G, N)."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    groups = heads // per_group
    program = tl.program_id(0)
    n = program % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= BLOCKS
    group = (program % groups).to(tl.int64)
    program //= groups
    image = (program // tiles).to(tl.int64)
    token = program % tiles * TOKENS + tl.arange(0, TOKENS)
    exists = token < L

    total = tl.zeros([TOKENS, BLOCK_N], tl.float32)
    for i in range(per_group):
        head = group * per_group + i
        matrix = state + (image * heads + head) * (N * P)
        weights = tl.full([TOKENS], 1.0, tl.float32)
        if weight is not None:
            weights = tl.load(weight + (image * L + token) * heads + head, mask=exists, other=0.0)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            rows = _load(values, values_strides, image, token, head, p, L, P)
            if weight is not None:
                rows = rows.to(tl.float32) * weights[:, None]
            total = product(rows, tl.trans(_state(matrix, n, p, N, P)), total, PARTS)
    _store(out, total, (image * L + token) * groups + group, exists, n, N)


# ---- Launches -------------------------------------------------------------------------------------------------------

def _read_by_strides(**tensors: torch.Tensor) -> dict:
    return tensors | {f"{name}_strides": x.stride()[:3] for name, x in tensors.items()}


def _arguments(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype, block_n: int, block_p: int) -> dict:
    """What all kernels share; the blocks are the most rows and columns of a state that a program takes at a time."""
    def block(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    (_, L, heads, P), (groups, N) = values.shape, keys.shape[2:]
    return dict(
        L=L, heads=heads, per_group=heads // groups, N=N, P=P, BLOCK_N=block(N, block_n), BLOCK_P=block(P, block_p),
        PARTS=PARTS[dtype],
    )


def _launch(kernel: triton.JITFunction, programs: int, arguments: dict, **options) -> Launch:
    """Left to itself, ptxas would rather spill than run fewer programs at a time."""
    return Launch(kernel, programs, arguments, registers=255, **options)


def sums_launch(
    keys: torch.Tensor, values: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the partial sums that it writes, (splits, B, heads, N, P); dtype: the inputs' of the op."""
    arguments = _arguments(keys, values, dtype, 64 if PARTS[dtype] == 1 else 32, 128)
    images, heads, N, P = len(values), arguments["heads"], arguments["N"], arguments["P"]
    programs = images * heads * triton.cdiv(N, arguments["BLOCK_N"])
    # Partial sums are at most an eighth of what is read, in 16 bits.
    splits, share = shares(arguments["L"], CHUNK, programs, 8 * max(N, P))
    partial = torch.empty(splits, images, heads, N, P, dtype=torch.float32, device=values.device)
    arguments |= _read_by_strides(keys=keys, values=values) | dict(
        weight=weight, partial=partial, images=images, splits=splits, share=share, TOKENS=CHUNK,
    )
    threads = 256 if arguments["BLOCK_P"] > 64 else 128
    return _launch(sums_kernel, splits * programs, arguments, threads=threads, stages=2), partial


def _tiled(kernel: triton.JITFunction, queries: torch.Tensor, x: torch.Tensor, arguments: dict) -> Launch:
    """One program a tile, image and head."""
    arguments |= _arguments(queries, x, x.dtype, 32 if PARTS[x.dtype] == 1 else 16, 128)
    arguments |= _read_by_strides(queries=queries, x=x)
    tiles = triton.cdiv(x.shape[1], TILE)
    return _launch(kernel, len(x) * tiles * x.shape[2], arguments | dict(tiles=tiles, TOKENS=TILE), threads=256)


def output_launch(C, state, x, D, out) -> Launch:
    return _tiled(output_kernel, C, x, dict(state=state, skip=D, out=out))


def value_gradient_launch(B, dstate, x, D, dout, weight, dx, dweight) -> tuple[Launch, torch.Tensor | None]:
    """The launch, and the parts of D's gradient that it writes, (B, tiles, heads)."""
    tensors = _read_by_strides(dout=dout) | dict(
        state=dstate, skip=D, weight=weight, dx=dx, dweight=dweight, dskip=None
    )
    launch = _tiled(value_gradient_kernel, B, x, tensors)
    if D is None:
        return launch, None
    dskip = weight.new_empty(len(x), launch.arguments["tiles"], x.shape[2])
    return launch._replace(arguments=launch.arguments | dict(dskip=dskip)), dskip


def key_gradient_launch(values, state, weight, out, dtype: torch.dtype) -> Launch:
    arguments = _arguments(out, values, dtype, *((64, 32) if PARTS[dtype] == 1 else (32, 16)))
    tiles = triton.cdiv(values.shape[1], TILE)
    programs = len(values) * tiles * out.shape[2] * triton.cdiv(arguments["N"], arguments["BLOCK_N"])
    arguments |= _read_by_strides(values=values) | dict(
        state=state, weight=weight, out=out, tiles=tiles, TOKENS=TILE,
    )
    return _launch(key_gradient_kernel, programs, arguments, threads=256)


# ---- The path's two functions ---------------------------------------------------------------------------------------

def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sums(keys, values, weight, dtype: torch.dtype) -> torch.Tensor:
    launch, partial = sums_launch(keys, values, weight, dtype)
    launch.run()
    return partial[0] if len(partial) == 1 else partial.sum(0)


def ssd(x, dt, A, B, C, D) -> torch.Tensor:
    """The op without autograd: x (b, L, heads, P), out in float32, contiguous."""
    x, B, C = map(_readable, (x, B, C))
    state = _sums(B, x, (dt.float() * -A.float()).contiguous(), x.dtype)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    output_launch(C, state, x, D, out).run()
    return out


def ssd_backward(dout, x, dt, A, B, C, D) -> list[torch.Tensor | None]:
    """The gradients of x, dt, A, B, C and D: parameters and time steps in float32. Deterministic."""
    dout, x, B, C = map(_readable, (dout, x, B, C))
    dt, A = dt.float(), A.float()
    weight = (dt * -A).contiguous()
    state, dstate = _sums(B, x, weight, x.dtype), _sums(C, dout, None, x.dtype)
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    dweight = torch.empty_like(weight)
    key_gradient_launch(dout, state, None, dC, x.dtype).run()
    key_gradient_launch(x, dstate, weight, dB, x.dtype).run()
    launch, dskip = value_gradient_launch(B, dstate, x, D, dout, weight, dx, dweight)
    launch.run()
    dA = -(dweight * dt).sum((0, 1))
    return [dx, dweight * -A, dA, dB, dC, None if dskip is None else dskip.sum((0, 1))]
