"""Triton kernels of bidirectional WKV, forward and backward.

With the weight W_ti = e^{k_i + bias_ti} of token i for token t, and lse_t the logarithm of t's denominator,

    y_t = sum_i W_ti e^{-lse_t} v_i
    dv_i = sum_t W_ti e^{-lse_t} dy_t,    dk_i = sum_t W_ti e^{-lse_t} dy_t (v_i - y_t),

so that the backward is made of sums of the same kind, with -lse_t in place of the keys: numbers of the tokens on one
side, each with a weight that falls off with the distance. Such sums are kept as multiples of a power of two, the
largest weight among them: exponents of any size neither overflow nor vanish. For w's gradient, each sum has a second
one beside it, where every term is multiplied by its distance.

A map is cut into chunks. `chunks_kernel` sums up each chunk in either direction, `carry_kernel` goes on from chunk to
chunk: then all chunks know what lies before and behind them, and `output_kernel` and `gradient_kernel` walk over the
tokens of theirs, forth and back. A thread owns a channel, and neighbours in memory are neighbouring channels.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._launch import Launch

LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-1e30)  # exponent of a sum without terms: finite, so that two of them have a difference

# Sizes that no binary depends on: one serves all resolutions and batches. Channels do count: they align the loads.
SIZES = ["L", "chunks", "images"]
CHUNK = 8  # tokens, whose numbers a thread holds in registers
BLOCK_C = 64


# ---- Sums of one side -----------------------------------------------------------------------------------------------

@triton.jit
def _joined(exponent, sums, more, terms):
    """Sums over 2^exponent and over 2^more, as sums over the larger of the two."""
    fall = tl.exp2(-tl.abs(exponent - more))
    old, new = tl.where(exponent < more, fall, 1.0), tl.where(exponent < more, 1.0, fall)
    joined = ()
    for i in tl.static_range(len(sums)):
        joined += (sums[i] * old + terms[i] * new,)
    return tl.maximum(exponent, more), joined


@triton.jit
def _step(exponent, sums, more, terms, distance, w):
    """Moves away from the tokens of the sums, and takes in those in between, `distance` of them."""
    if len(sums) == 4:
        sums = (sums[0], sums[1], sums[2] + distance * sums[0], sums[3] + distance * sums[1])
    return _joined(exponent - distance * w, sums, more, terms)


@triton.jit
def _row(tensor, strides, image, token, c, mask):
    """Channels c of a token of a (B, L, C) tensor."""
    tensor += image * strides[0] + token.to(tl.int64) * strides[1]
    return tl.load(tensor + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _key(k, v, strides, image, token, c, L, C):
    """What a token gives to others: the exponent, and the terms of numerator and denominator."""
    mask = (token < L) & (c < C)
    exponent = tl.where(mask, _row(k, strides[0], image, token, c, mask) * LOG2E, EMPTY)
    return exponent, (_row(v, strides[1], image, token, c, mask), tl.where(mask, 1.0, 0.0))


@triton.jit
def _query(lse, dout, y, strides, image, token, c, L, C):
    """What a token gives back: the exponent, the terms dy and dy * y, and the same at a distance, of 0."""
    mask = (token < L) & (c < C)
    exponent = tl.where(mask, -_row(lse, strides[0], image, token, c, mask), EMPTY)
    dy = _row(dout, strides[1], image, token, c, mask)
    zero = tl.zeros(c.shape, tl.float32)
    return exponent, (dy, dy * _row(y, strides[0], image, token, c, mask), zero, zero)


# ---- Sums, as they are stored: (direction, exponent or sum, B, chunks, C) -------------------------------------------

@triton.jit
def _state(states, direction, image, chunk, images, chunks, C, NUMBERS: tl.constexpr):
    """Pointer to the exponent of a chunk, and the distance to its sums, which follow."""
    size = images.to(tl.int64) * chunks * C
    return states + direction * NUMBERS * size + (image * chunks + chunk) * C, size


@triton.jit
def _load_state(states, direction, image, chunk, c, images, chunks, C, NUMBERS: tl.constexpr):
    states, size = _state(states, direction, image, chunk, images, chunks, C, NUMBERS)
    exponent = tl.load(states + c, mask=c < C, other=0.0)
    sums = ()
    for i in tl.static_range(1, NUMBERS):
        sums += (tl.load(states + i * size + c, mask=c < C, other=0.0),)
    return exponent, sums


@triton.jit
def _store_state(states, exponent, sums, direction, image, chunk, c, images, chunks, C):
    states, size = _state(states, direction, image, chunk, images, chunks, C, len(sums) + 1)
    tl.store(states + c, exponent, mask=c < C)
    for i in tl.static_range(len(sums)):
        tl.store(states + (i + 1) * size + c, sums[i], mask=c < C)


@triton.jit
def _nothing(BLOCK_C: tl.constexpr, NUMBERS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(1, NUMBERS):
        sums += (tl.zeros([BLOCK_C], tl.float32),)
    return tl.full([BLOCK_C], EMPTY, tl.float32), sums


@triton.jit
def _program(C, BLOCK_C: tl.constexpr, chunks):
    """Channels, chunk and what is left of the program's number: the image, and the direction."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    return c, program % chunks, (program // chunks).to(tl.int64)


@triton.jit(do_not_specialize=SIZES)
def chunks_kernel(
    keys, values, means, w, states, keys_strides, values_strides, L, C, chunks, images,
    NUMBERS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The sums of each chunk, as the next token behind it sees them, and the one before it.

    Of keys k and values v; or, if there are means y, of lse and the gradients of y.
    """
    c, chunk, program = _program(C, BLOCK_C, chunks)
    image, direction = program % images, program // images
    decay = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32) * LOG2E
    exponent, sums = _nothing(BLOCK_C, NUMBERS)
    for i in tl.static_range(CHUNK):
        token = chunk * CHUNK + tl.where(direction == 0, i, CHUNK - 1 - i)
        if means is None:
            more, terms = _key(keys, values, (keys_strides, values_strides), image, token, c, L, C)
        else:
            more, terms = _query(keys, values, means, (keys_strides, values_strides), image, token, c, L, C)
        exponent, sums = _step(exponent, sums, more, terms, 1, decay)
    _store_state(states, exponent, sums, direction, image, chunk, c, images, chunks, C)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    states, w, before, C, chunks, images, NUMBERS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """From the sums of each chunk, those of all chunks before it, or behind it in the other direction."""
    c, direction, image = _program(C, BLOCK_C, 2)
    decay = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32) * LOG2E
    exponent, sums = _nothing(BLOCK_C, NUMBERS)
    for i in tl.range(chunks, num_stages=4):  # loads run ahead, though no product waits for them
        chunk = tl.where(direction == 0, i, chunks - 1 - i)
        more, terms = _load_state(states, direction, image, chunk, c, images, chunks, C, NUMBERS)
        _store_state(before, exponent, sums, direction, image, chunk, c, images, chunks, C)
        exponent, sums = _step(exponent, sums, more, terms, CHUNK, decay)


# ---- The kernels of chunks ------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    k, v, w, u, states, out, lse, k_strides, v_strides, L, C, chunks, images, eps_exponent,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """y of a chunk, and lse to base 2 if it is asked for; `states` are the sums of what lies around the chunks."""
    c, chunk, image = _program(C, BLOCK_C, chunks)
    first, strides = chunk * CHUNK, (k_strides, v_strides)
    decay = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32) * LOG2E
    bonus = tl.load(u + c, mask=c < C, other=0.0).to(tl.float32) * LOG2E

    exponent, sums = _load_state(states, 0, image, chunk, c, images, chunks, C, 3)
    exponents, nums, dens = (), (), ()
    for i in tl.static_range(CHUNK):
        exponents += (exponent,)
        nums += (sums[0],)
        dens += (sums[1],)
        more, terms = _key(k, v, strides, image, first + i, c, L, C)
        exponent, sums = _step(exponent, sums, more, terms, 1, decay)

    exponent, sums = _load_state(states, 1, image, chunk, c, images, chunks, C, 3)
    out += (image * L + first) * C
    if lse is not None:
        lse += (image * L + first) * C
    for i in tl.static_range(CHUNK - 1, -1, -1):
        more, terms = _key(k, v, strides, image, first + i, c, L, C)
        top, total = _joined(exponent, sums, exponents[i], (nums[i], dens[i]))
        top, total = _joined(top, total, more + bonus, terms)
        top, total = _joined(top, total, eps_exponent, (0.0, 1.0))
        mask = (first + i < L) & (c < C)
        tl.store(out + i * C + c, (total[0] / total[1]).to(out.dtype.element_ty), mask=mask)
        if lse is not None:
            tl.store(lse + i * C + c, top + tl.log2(total[1]), mask=mask)
        exponent, sums = _step(exponent, sums, more, terms, 1, decay)


@triton.jit
def _received(key, value, exponent, sums):
    """A token's part of the gradients of v, k and w, from the sums of what the tokens on one side give back."""
    weight = tl.exp2(key + exponent)
    far = weight * (value * sums[2] - sums[3])
    return weight * sums[0], weight * (value * sums[0] - sums[1]), -far


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    k, v, dout, w, u, y, lse, states, dk, dv, dw, du, k_strides, v_strides, dout_strides, lse_strides,
    L, C, chunks, images, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The gradients of k and v of a chunk, and its parts of those of w and u, (B, chunks, C)."""
    c, chunk, image = _program(C, BLOCK_C, chunks)
    first, strides, back = chunk * CHUNK, (k_strides, v_strides), (lse_strides, dout_strides)
    decay = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32) * LOG2E
    bonus = tl.load(u + c, mask=c < C, other=0.0).to(tl.float32) * LOG2E
    dws, dus = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)

    exponent, sums = _load_state(states, 0, image, chunk, c, images, chunks, C, 5)
    dvs, dks = (), ()
    for i in tl.static_range(CHUNK):
        key, terms = _key(k, v, strides, image, first + i, c, L, C)
        of_v, of_k, of_w = _received(key, terms[0], exponent, sums)
        dvs += (of_v,)
        dks += (of_k,)
        dws += of_w
        more, terms = _query(lse, dout, y, back, image, first + i, c, L, C)
        exponent, sums = _step(exponent, sums, more, terms, 1, decay)

    exponent, sums = _load_state(states, 1, image, chunk, c, images, chunks, C, 5)
    dk += (image * L + first) * C
    dv += (image * L + first) * C
    for i in tl.static_range(CHUNK - 1, -1, -1):
        key, terms = _key(k, v, strides, image, first + i, c, L, C)
        value = terms[0]
        of_v, of_k, of_w = _received(key, value, exponent, sums)
        more, terms = _query(lse, dout, y, back, image, first + i, c, L, C)
        own = tl.exp2(key + bonus + more)
        own_v, own_k = own * terms[0], own * (value * terms[0] - terms[1])
        mask = (first + i < L) & (c < C)
        tl.store(dv + i * C + c, (dvs[i] + of_v + own_v).to(dv.dtype.element_ty), mask=mask)
        tl.store(dk + i * C + c, (dks[i] + of_k + own_k).to(dk.dtype.element_ty), mask=mask)
        dws += of_w
        dus += own_k
        exponent, sums = _step(exponent, sums, more, terms, 1, decay)
    part = (image * chunks + chunk) * C + c
    tl.store(dw + part, dws, mask=c < C)
    tl.store(du + part, dus, mask=c < C)


# ---- Launches -------------------------------------------------------------------------------------------------------

def _launch(kernel: triton.JITFunction, x: torch.Tensor, programs: int, tensors: dict, **arguments) -> Launch:
    """`programs` for each block of channels; of x (B, L, C)."""
    images, L, C = x.shape
    arguments |= tensors | dict(L=L, C=C, images=images, chunks=triton.cdiv(L, CHUNK), CHUNK=CHUNK, BLOCK_C=BLOCK_C)
    arguments = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, programs * triton.cdiv(C, BLOCK_C), arguments, threads=BLOCK_C, registers=255)


def _chunks(x: torch.Tensor) -> int:
    return x.shape[0] * triton.cdiv(x.shape[1], CHUNK)


def _read(**tensors: torch.Tensor) -> dict:
    return tensors | {f"{name}_strides": x.stride()[:2] for name, x in tensors.items()}


def sums_launches(
    w: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, means: torch.Tensor | None
) -> tuple[Launch, Launch, torch.Tensor]:
    """The launches, and the sums of what lies around the chunks, which the second one writes."""
    images, L, C = values.shape
    numbers = 3 if means is None else 5
    states, around = torch.empty(
        2, 2, numbers, images, triton.cdiv(L, CHUNK), C, dtype=torch.float32, device=values.device
    )
    own = _launch(
        chunks_kernel, values, 2 * _chunks(values), _read(keys=keys, values=values),
        means=means, w=w, states=states, NUMBERS=numbers,
    )
    carry = _launch(carry_kernel, values, 2 * images, {}, states=states, w=w, before=around, NUMBERS=numbers)
    return own, carry, around


def output_launch(w, u, k, v, eps: float, states, out, lse) -> Launch:
    return _launch(
        output_kernel, v, _chunks(v), _read(k=k, v=v), w=w, u=u, states=states, out=out, lse=lse,
        eps_exponent=math.log2(eps) if eps else EMPTY.value,
    )


def gradient_launch(dout, w, u, k, v, y, lse, states, dk, dv) -> tuple[Launch, torch.Tensor]:
    """The launch, and the parts of the gradients of w and u that it writes, (2, B, chunks, C)."""
    parts = torch.empty(2, len(v), triton.cdiv(v.shape[1], CHUNK), v.shape[2], dtype=torch.float32, device=v.device)
    return _launch(
        gradient_kernel, v, _chunks(v), _read(k=k, v=v, dout=dout, lse=lse),
        w=w, u=u, y=y, states=states, dk=dk, dv=dv, dw=parts[0], du=parts[1],
    ), parts


# ---- The path's two functions ---------------------------------------------------------------------------------------

def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _around(*tensors: torch.Tensor | None) -> torch.Tensor:
    own, carry, around = sums_launches(*tensors)
    own.run()
    carry.run()
    return around


def bi_wkv(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """The op without autograd: k, v (B, L, C), out like v, contiguous."""
    w, u, k, v = map(_readable, (w, u, k, v))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    output_launch(w, u, k, v, eps, _around(w, k, v, None), out, None).run()
    return out


def bi_wkv_backward(
    dout: torch.Tensor, w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    """The gradients of w and u, in float32, and of k and v. Deterministic: parts are added up in a fixed order."""
    dout, w, u, k, v = map(_readable, (dout, w, u, k, v))
    y, lse = torch.empty(2, *v.shape, dtype=torch.float32, device=v.device)
    output_launch(w, u, k, v, eps, _around(w, k, v, None), y, lse).run()
    dk, dv = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    launch, parts = gradient_launch(dout, w, u, k, v, y, lse, _around(w, lse, dout, y), dk, dv)
    launch.run()
    return parts[0].sum((0, 1)), parts[1].sum((0, 1)), dk, dv
