"""The Triton kernels of the selective scan along lines: routes of `ss2d`, or groups of channels of `selective_scan`.

A program owns CHANNELS channels of one image, and walks over the steps of a line, or of a chunk of it, in tiles. It
computes a tile's time steps, then for one of the N numbers of a state after another the recurrence over the tile. Lanes
of a warp are neighbouring channels, whose loads are one piece of memory in whatever order a line visits the tokens, and
no two of them have steps of one channel: the recurrence runs inside of threads, and once across the warps.

States are carried from tile to tile in memory, which the caches hold. So neither N nor the rank of the time steps costs
registers, or a binary of its own. A barrier after each tile lets all warps see what one has stored.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .._product import product
from .routes import NEUTRAL

LOG2E = tl.constexpr(1.4426950408889634)
NO_TIME = tl.constexpr(NEUTRAL)
RANKS = tl.constexpr(16)  # numbers of low-rank time steps that a product takes at once

# No binary depends on a size: one serves all maps, widths, states and ranks.
SIZES = [
    "images", "length", "steps", "D", "N", "R", "K", "first_line", "lines", "blocks", "chunks", "tiles",
    "tiles_per_chunk", "x_strides", "delta_strides", "proj_strides", "out_strides", "dout_strides", "dx_strides",
    "ddelta_strides", "parameter_strides",
]


# ---- Recurrences ----------------------------------------------------------------------------------------------------

@triton.jit
def after(a1, h1, a2, h2):
    """Some steps and those after them: the decay over both, and the state."""
    return a1 * a2, a2 * h1 + h2


@triton.jit
def after_apart(a1, h1, older1, a2, h2, older2):
    """`after`, and the part of the state that is older than its own step: small beside it where decays are fast."""
    older = a2 * h1
    return a1 * a2, older + h2, older + older2


@triton.jit
def before(a1, decay1, g1, a2, decay2, g2):
    """Some steps and those before them: the first decay, that over the rest, and the gradient of the first state.

    The gradient of a state is what its own step adds, and that of the next state times the next step's decay.
    """
    decay2 *= a1
    return a2, decay2 * decay1, decay2 * g1 + g2


@triton.jit
def row(x, number):
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == number)[:, None], x, 0.0), 0)


# ---- Tiles ----------------------------------------------------------------------------------------------------------

@triton.jit
def channels_of(block, CHANNELS: tl.constexpr):
    return block * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _program(first_line, lines, blocks, chunks):
    """A program's block of channels, chunk, line and image."""
    program = tl.program_id(0)
    block = program % blocks
    program //= blocks
    chunk = program % chunks
    program //= chunks
    return block, chunk, first_line + program % lines, (program // lines).to(tl.int64)


@triton.jit
def _steps(routes, k, first, steps, PERMUTES_ALL: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr):
    """Of STEPS steps of line k: their tokens, and which visit one; the tokens of their projections, and which have
    one; which let time pass.
    """
    t = first + tl.arange(0, STEPS)
    if routes is None:
        token = steps - 1 - t if REVERSE else t
        visits = t < steps
        passes = visits
    else:
        token = tl.load(routes + k * steps + t, mask=t < steps, other=NO_TIME)
        passes = token != NO_TIME
        visits = token >= 0
        token = tl.maximum(token, 0)
    source = token
    has_source = visits
    if not PERMUTES_ALL:
        source = t
        has_source = t < steps
    return token, visits, source, has_source, passes


@triton.jit
def _at(tensor, strides, image, k):
    """Line k of an image."""
    return tensor + image * strides[0] + k * strides[2]


@triton.jit
def _rows(tensor, strides, image, k, token, exists, c, size):
    """(steps, columns c) of a line, zero where there is no token or column."""
    pointers = _at(tensor, strides, image, k) + (token * strides[1])[:, None] + c[None, :]
    return tl.load(pointers, mask=exists[:, None] & (c < size)[None, :], other=0.0)


@triton.jit
def _column(tensor, strides, image, k, token, exists, n):
    """(steps, 1), likewise."""
    pointers = _at(tensor, strides, image, k) + (token * strides[1] + n)
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _vector(tensor, d, D):
    """(channels,), likewise."""
    return tl.load(tensor + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _weight(weight, d, D, r, R):
    """(ranks, channels) of a (D, R) matrix, likewise."""
    return tl.load(weight + d[None, :] * R + r[:, None], mask=(d < D)[None, :] & (r < R)[:, None], other=0.0)


@triton.jit
def _products(
    proj, proj_strides, weight, parameter_strides, image, k, source, has_source, d, D, R, PARTS: tl.constexpr
):
    """Low-rank time steps (steps, channels), before bias and softplus."""
    z = tl.zeros([source.shape[0], d.shape[0]], tl.float32)
    for first in range(0, R, RANKS):
        r = first + tl.arange(0, RANKS)
        low = _rows(proj, proj_strides, image, k, source, has_source, r, R)
        z = product(low, _weight(weight + k * parameter_strides[0], d, D, r, R), z, PARTS)
    return z


@triton.jit
def _time(z, bias, parameter_strides, k, passes, d, D, SOFTPLUS: tl.constexpr):
    """Time steps (steps, channels), and their slope in z and bias."""
    if bias is not None:
        z += _vector(bias + k * parameter_strides[1], d, D)[None, :]
    dt = z
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTPLUS:
        # max(z, 0) + log(1 + exp(-|z|)), whose second part keeps its digits as a polynomial of the exponential, and
        # leaves the unit of special functions alone, which limits these kernels. Within 2e-7.
        e = tl.exp2(-tl.abs(z) * LOG2E)
        p = 0.005232693627476692 * e - 0.029505236074328423
        p = p * e + 0.07822594791650772
        p = p * e - 0.13663245737552643
        p = p * e + 0.19106006622314453
        p = p * e - 0.2484298199415207
        p = p * e + 0.3331909775733948
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
        dt = tl.maximum(z, 0.0) + p * e
        slope = tl.where(z < 0, e, 1.0) / (1.0 + e)
    passes = passes[:, None]
    return tl.where(passes, dt, 0.0), tl.where(passes, slope, 0.0)


@triton.jit
def _add(pointers, value, mask):
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + value, mask=mask)


# ---- Forward --------------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    x, delta, proj, weight, bias, A, skip, routes, state, out,
    x_strides, delta_strides, proj_strides, out_strides, parameter_strides,
    steps, D, N, R, K, first_line, lines, blocks, chunks, tiles, tiles_per_chunk,
    SOFTPLUS: tl.constexpr, PERMUTES_ALL: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """y of a chunk of some lines, from the state (B, K, chunks, N, D) at its start, which becomes that at its end.

    If ADD, lines go to the same tokens: all but line 0 add to what is there.
    """
    block, chunk, k, image = _program(first_line, lines, blocks, chunks)
    d = channels_of(block, CHANNELS)
    states = state + ((image * K + k) * chunks + chunk) * N * D + d
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        token, visits, source, has_source, passes = _steps(
            routes, k, tile * STEPS, steps, PERMUTES_ALL, REVERSE, STEPS
        )
        values = _rows(x, x_strides, image, k, token, visits, d, D).to(tl.float32)
        if delta is None:
            z = _products(
                proj, proj_strides, weight, parameter_strides, image, k, source, has_source, d, D, R, PARTS
            )
        else:
            z = _rows(delta, delta_strides, image, k, source, has_source, d, D).to(tl.float32)
        dt, _ = _time(z, bias, parameter_strides, k, passes, d, D, SOFTPLUS)
        dtx = dt * values
        y = tl.zeros([STEPS, CHANNELS], tl.float32)
        if skip is not None:
            y += values * _vector(skip + k * parameter_strides[3], d, D)[None, :]
        for n in range(N):
            a = tl.exp2(dt * (_vector(A + k * parameter_strides[2] + n * D, d, D) * LOG2E)[None, :])
            b = dtx * _column(proj, proj_strides, image, k, source, has_source, R + n)
            a, h = tl.associative_scan((a, b), 0, after)
            h += a * tl.load(states + n * D, mask=d < D, other=0.0)[None, :]
            tl.store(states + n * D, row(h, STEPS - 1), mask=d < D)
            y += h * _column(proj, proj_strides, image, k, source, has_source, R + N + n)
        pointers = _at(out, out_strides, image, k) + (token * out_strides[1])[:, None] + d[None, :]
        mask = visits[:, None] & (d < D)[None, :]
        if ADD:
            y += tl.load(pointers, mask=mask & (k > 0), other=0.0)
        tl.store(pointers, y, mask=mask)
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(
    x, delta, proj, weight, bias, A, routes, ends, dout, leaves, tile_starts,
    x_strides, delta_strides, proj_strides, dout_strides, parameter_strides,
    steps, D, N, R, K, blocks, chunks, tiles, tiles_per_chunk,
    SOFTPLUS: tl.constexpr, PERMUTES_ALL: tl.constexpr, REVERSE: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """What a chunk of a line does to what comes in, and for the backward pass how its tiles start.

    Turns `ends` (B, K, chunks, N + 1, D) from zeros into the last states of a chunk that starts with zeros, and below
    them how long it lasts; `leaves`, if there, of the same shape, from zeros into the gradients of its first states
    times their decays, if none enter at its end. `tile_starts` (B, K, tiles, N + 1, D), if there, is like `ends`.
    """
    block, chunk, k, image = _program(0, K, blocks, chunks)
    d = channels_of(block, CHANNELS)
    line = image * K + k
    ends += (line * chunks + chunk) * (N + 1) * D + d
    if leaves is not None:
        leaves += (line * chunks + chunk) * (N + 1) * D + d
    total = tl.zeros([CHANNELS], tl.float32)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        token, visits, source, has_source, passes = _steps(
            routes, k, tile * STEPS, steps, PERMUTES_ALL, REVERSE, STEPS
        )
        values = _rows(x, x_strides, image, k, token, visits, d, D).to(tl.float32)
        if delta is None:
            z = _products(
                proj, proj_strides, weight, parameter_strides, image, k, source, has_source, d, D, R, PARTS
            )
        else:
            z = _rows(delta, delta_strides, image, k, source, has_source, d, D).to(tl.float32)
        dt, _ = _time(z, bias, parameter_strides, k, passes, d, D, SOFTPLUS)
        dtx = dt * values
        if leaves is not None:
            dy = _rows(dout, dout_strides, image, k, token, visits, d, D).to(tl.float32)
        if tile_starts is not None:
            starts = tile_starts + (line * tiles + tile) * (N + 1) * D + d
            tl.store(starts + N * D, total, mask=d < D)
        for n in range(N):
            rate = _vector(A + k * parameter_strides[2] + n * D, d, D) * LOG2E
            a = tl.exp2(dt * rate[None, :])
            b = dtx * _column(proj, proj_strides, image, k, source, has_source, R + n)
            a, h = tl.associative_scan((a, b), 0, after)
            start = tl.load(ends + n * D, mask=d < D, other=0.0)
            if tile_starts is not None:
                tl.store(starts + n * D, start, mask=d < D)
            tl.store(ends + n * D, row(h + a * start[None, :], STEPS - 1), mask=d < D)
            if leaves is not None:
                q = dy * _column(proj, proj_strides, image, k, source, has_source, R + N + n)
                _add(leaves + n * D, tl.sum(a * q, 0) * tl.exp2(total * rate), d < D)
        total += tl.sum(dt, 0)
        tl.debug_barrier()
    tl.store(ends + N * D, total, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    leaving, ends, A, first, entering, parameter_strides, D, N, K, blocks, chunks,
    BACK: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """What enters each chunk (B, K, chunks, N, D), from what leaves them (B, K, chunks, N + 1, D) if nothing enters.

    How long a chunk lasts stands in `ends`, see `summary_kernel`. What enters the `first` is given (B, K, N, D), or
    zeros. If BACK, from the last chunk to the first.
    """
    program = tl.program_id(0)
    d = channels_of(program % blocks, CHANNELS)
    program //= blocks
    n = program % N
    program //= N
    k = program % K
    line = (program // K).to(tl.int64) * K + k
    leaving += (line * chunks * (N + 1) + n) * D + d[None, :]
    ends += (line * chunks * (N + 1) + N) * D + d[None, :]
    entering += (line * chunks * N + n) * D + d[None, :]
    rate = _vector(A + k * parameter_strides[2] + n * D, d, D) * LOG2E
    state = tl.zeros([CHANNELS], tl.float32)
    if first is not None:
        state += _vector(first + (line * N + n) * D, d, D)
    for start in range(0, chunks, STEPS):
        t = start + tl.arange(0, STEPS)
        chunk = (chunks - 1 - t if BACK else t)[:, None]
        mask = (t < chunks)[:, None] & (d < D)[None, :]
        a = tl.exp2(tl.load(ends + chunk * (N + 1) * D, mask=mask, other=0.0) * rate[None, :])
        b = tl.load(leaving + chunk * (N + 1) * D, mask=mask, other=0.0)
        decay, h = tl.associative_scan((a, b), 0, after)
        h += decay * state[None, :]
        following = chunk - 1 if BACK else chunk + 1
        tl.store(entering + following * N * D, h, mask=mask & (t + 1 < chunks)[:, None])
        if start == 0:
            edge = chunks - 1 if BACK else 0
            tl.store(entering + edge * N * D, state[None, :], mask=(d < D)[None, :])
        state = row(h, STEPS - 1)


# ---- Backward -------------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    x, delta, proj, bias, A, skip, routes, tile_starts, starts, adjoint, dout,
    dx, ddelta, dnumbers, dparameters,
    x_strides, delta_strides, proj_strides, dout_strides, dx_strides, ddelta_strides, parameter_strides,
    images, length, steps, D, N, R, K, first_line, lines, blocks, chunks, tiles, tiles_per_chunk,
    SOFTPLUS: tl.constexpr, PERMUTES_ALL: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of a chunk of some lines, from the last tile to the first.

    `adjoint` (B, K, chunks, N, D) comes as what enters the chunk at its end: the gradients of the first states behind
    it times their decays. If there are `starts`, its states, `tile_starts` are those from zeros, else the true ones.
    `ddelta` may be `delta`. Sums over channels, dnumbers (blocks, B, length, K, 2 N) of B and C, are over the block of
    a program; sums over steps over its chunk: dparameters (B, chunks, K, N + 2, D) of A, bias and skip, one below the
    other, zeros before.

    With g the gradient of a state h, and a its decay: g_t = C_t dy_t + a_{t+1} g_{t+1}, and g_t a_t h_{t-1} is the
    gradient of the exponent dt_t A.
    """
    block, chunk, k, image = _program(first_line, lines, blocks, chunks)
    d = channels_of(block, CHANNELS)
    line = image * K + k
    adjoint += (line * chunks + chunk) * N * D + d
    if starts is not None:
        starts += (line * chunks + chunk) * N * D + d
    dnumbers += ((block * images + image) * length * K + k) * 2 * N
    dparameters += ((image * chunks + chunk) * K + k) * (N + 2) * D + d
    last = tl.minimum((chunk + 1) * tiles_per_chunk, tiles) - 1
    for back in range(last + 1 - chunk * tiles_per_chunk):
        tile = last - back
        token, visits, source, has_source, passes = _steps(
            routes, k, tile * STEPS, steps, PERMUTES_ALL, REVERSE, STEPS
        )
        values = _rows(x, x_strides, image, k, token, visits, d, D).to(tl.float32)
        dy = _rows(dout, dout_strides, image, k, token, visits, d, D).to(tl.float32)
        z = _rows(delta, delta_strides, image, k, source, has_source, d, D).to(tl.float32)
        dt, slope = _time(z, bias, parameter_strides, k, passes, d, D, SOFTPLUS)
        gB = tl.zeros([STEPS, CHANNELS], tl.float32)
        ddt = tl.zeros([STEPS, CHANNELS], tl.float32)
        own_starts = tile_starts + (line * tiles + tile) * (N + 1) * D + d
        place = source * (2 * K * N)
        for n in range(N):
            rate = _vector(A + k * parameter_strides[2] + n * D, d, D)
            b_n = _column(proj, proj_strides, image, k, source, has_source, R + n)
            c_n = _column(proj, proj_strides, image, k, source, has_source, R + N + n)
            a = tl.exp2(dt * (rate * LOG2E)[None, :])
            b = dt * values * b_n
            start = tl.load(own_starts + n * D, mask=d < D, other=0.0)
            if starts is not None:
                since = tl.load(own_starts + N * D, mask=d < D, other=0.0)
                start += tl.exp2(since * rate * LOG2E) * tl.load(starts + n * D, mask=d < D, other=0.0)
            decay, h, older = tl.associative_scan((a, b, tl.zeros_like(a)), 0, after_apart)
            h += decay * start[None, :]
            older += decay * start[None, :]
            _, decay, g = tl.associative_scan((a, tl.full(a.shape, 1.0, tl.float32), dy * c_n), 0, before, True)
            g += decay * tl.load(adjoint + n * D, mask=d < D, other=0.0)[None, :]
            tl.store(adjoint + n * D, row(a * g, 0), mask=d < D)

            tl.store(dnumbers + (place + n), tl.sum(g * dt * values, 1), mask=has_source)
            tl.store(dnumbers + (place + N + n), tl.sum(dy * h, 1), mask=has_source)
            gB += g * b_n
            exponent = g * older
            ddt += exponent * rate[None, :]
            _add(dparameters + n * D, tl.sum(exponent * dt, 0), d < D)
        ddt = (ddt + gB * values) * slope
        gradient = gB * dt
        if skip is not None:
            gradient += dy * _vector(skip + k * parameter_strides[3], d, D)[None, :]
            _add(dparameters + (N + 1) * D, tl.sum(dy * values, 0), d < D)
        mask = visits[:, None] & (d < D)[None, :]
        pointers = _at(dx, dx_strides, image, k) + (token * dx_strides[1])[:, None] + d[None, :]
        if ADD:
            gradient += tl.load(pointers, mask=mask & (k > 0), other=0.0)
        tl.store(pointers, gradient, mask=mask)
        _add(dparameters + N * D, tl.sum(ddt, 0), d < D)
        pointers = _at(ddelta, ddelta_strides, image, k) + (source * ddelta_strides[1])[:, None] + d[None, :]
        tl.store(pointers, ddt, mask=has_source[:, None] & (d < D)[None, :])
        tl.debug_barrier()
