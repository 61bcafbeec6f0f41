"""Fused Triton kernels of linear attention, forward and backward.

Forward: `sums_kernel` adds up the state over keys and values, `queries_kernel` applies it to the queries.
Backward: `query_gradient_kernel` (gradients of q, local and gate; and of each query's numbers, `stats`), `sums_kernel`
again (the state's gradient is the same sum over queries and their gradients), `key_gradient_kernel` (the rest).

`sums_kernel` splits the tokens into shares, so that few heads keep a GPU busy too; the partial sums, in float32, are
added up afterwards, in a fixed order. The other kernels own a tile of tokens and one head. All walk over the channels
of q and k in blocks, which keeps the registers few and head_dim free. Feature maps and the rotary embedding are
computed where features are needed, also a second time: nothing of q's size is stored but the results. Tensors are read
where they lie, by their strides; consecutive programs take the heads of one tile, whose channels are neighbours in
memory. Past the end of the map, kernels read its last token, and store nothing.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, shares
from .._product import product
from ..rotary.triton import rotation, table, turned
from .form import Form
from .state import empty_state

LOG2E = tl.constexpr(1.4426950408889634)

# Sizes that no binary depends on: one serves all resolutions and batches.
SIZES = ["N", "W", "heads", "images", "tiles", "splits", "share", "half"]
TILE = 64  # tokens of a program that owns a tile: the rows of Hopper's matrix instruction
SMALL_TILE = 32  # where numbers of several parts and wide values would not leave registers for more
CHUNK = 32  # tokens that a program of the sums meets at a time


# ---- Tokens and channels --------------------------------------------------------------------------------------------

@triton.jit
def _tokens(first, N, W, TOKENS: tl.constexpr):
    """Index, row and column of TOKENS tokens, and which of them exist; in place of the others, the last one."""
    n = first + tl.arange(0, TOKENS)
    exists = n < N
    n = tl.minimum(n, N - 1)
    return n, n // W, n % W, exists


@triton.jit
def _load(tensor, strides, image, row, col, head, channel, CHANNELS: tl.constexpr):
    """(tokens, channels) of a (B, H, W, heads, CHANNELS) tensor, zero past the last channel."""
    tensor += image * strides[0] + head * strides[3]
    tensor = (tensor + col.to(tl.int64) * strides[2]) + row.to(tl.int64) * strides[1]
    return tl.load(tensor[:, None] + channel[None, :], mask=(channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def _store(tensor, value, index, exists, channel, CHANNELS: tl.constexpr):
    """To a contiguous (B, H, W, heads, CHANNELS) tensor, where tokens exist; `index` counts tokens and heads."""
    pointers, mask = tensor + (index * CHANNELS)[:, None] + channel[None, :], (channel < CHANNELS)[None, :]
    tl.store(pointers, value.to(tensor.dtype.element_ty), mask=exists[:, None] & mask)


@triton.jit
def _vector(packed, channel, CHANNELS: tl.constexpr):
    """(channels,) of a part of a packed state, zero past the last channel."""
    return tl.load(packed + channel, mask=channel < CHANNELS, other=0.0)


@triton.jit
def _matrix(packed, d, e, D: tl.constexpr, V: tl.constexpr):
    """Rows d and columns e of a packed state's kv, zero past the last ones."""
    return tl.load(packed + d[:, None] * V + e[None, :], mask=(d < D)[:, None] & (e < V)[None, :], other=0.0)


# ---- Arithmetic -----------------------------------------------------------------------------------------------------

@triton.jit
def _features(x, FEATURES: tl.constexpr):
    """phi(x) in float32."""
    x = x.to(tl.float32)
    if FEATURES == "elu":
        x = tl.where(x > 0, x + 1, tl.exp2(x * LOG2E))
    elif FEATURES == "relu":
        x = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif FEATURES == "exp":
        x = tl.exp2(x * LOG2E)
    return x


@triton.jit
def _through_features(gradient, phi, FEATURES: tl.constexpr):
    """gradient * phi'(x), from phi = phi(x)."""
    if FEATURES == "elu":
        gradient = gradient * tl.minimum(phi, 1.0)
    elif FEATURES == "relu":
        gradient = tl.where(phi > 0, gradient, 0.0)
    elif FEATURES == "exp":
        gradient = gradient * phi
    return gradient


@triton.jit
def _turned(x, turns, half, row, col, head, d, D: tl.constexpr, RUN: tl.constexpr, BACK: tl.constexpr):
    """Channels d under the rotary embedding, or back, if there is one."""
    if turns is not None:
        cos, sin = rotation(turns, half, row, col, head, d, D, RUN)
        x = turned(x, cos, -sin if BACK else sin)
    return x


@triton.jit
def _factor(total, eps, NORMALIZER: tl.constexpr):
    """What the normalizer multiplies the numerator by; `total` is the denominator."""
    if NORMALIZER == "div":
        factor = 1.0 / (total + eps)
    elif NORMALIZER == "clamp":
        factor = 1.0 / tl.where(total < eps, eps, total)
    elif NORMALIZER == "additive":
        factor = 1.0 / (total + eps) + 1.0
    else:
        factor = tl.full(total.shape, 1.0, tl.float32)
    return factor


@triton.jit
def _attended(
    q, q_strides, state, turns, half, image, row, col, head, e, scale,
    FEATURES: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Numerator (tokens, channels e) and denominator (tokens,) of some queries."""
    num = tl.zeros([row.shape[0], e.shape[0]], tl.float32)
    total = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        phi = _features(_load(q, q_strides, image, row, col, head, d, D), FEATURES)
        total += tl.sum(phi * _vector(state + D * V, d, D)[None, :], 1)
        phi = _turned(phi, turns, half, row, col, head, d, D, RUN, False)
        num = product(phi, _matrix(state, d, e, D, V), num, PARTS)
    return num * scale, total * scale


# ---- The sums -------------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    x, y, gate, matrix_weight, vector_weight, value_weight, turns, partial, x_strides, y_strides, gate_strides,
    N, W, heads, images, splits, share, half, mean, value_mean,
    FEATURES: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
):
    """One share of a packed state, (splits, B, heads, D * V + D [+ V]), BLOCK_D of its D channels:

        mean * sum_n matrix_weight_n R(phi(x_n)) (y_n gate_n)^T,    mean * sum_n vector_weight_n phi(x_n),
        value_mean * sum_n value_weight_n y_n gate_n (if VALUE).

    Weights (B, H, W, heads) are 1 where None, but vector_weight is then matrix_weight.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    d = program % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    program //= BLOCKS
    head = (program % heads).to(tl.int64)
    program //= heads
    split = program % splits
    image = (program // splits).to(tl.int64)

    kv = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    key = tl.zeros([TOKENS, BLOCK_D], tl.float32)  # added up over tokens at the end
    value = tl.zeros([TOKENS, BLOCK_V], tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, N), TOKENS):
        n, row, col, exists = _tokens(first, N, W, TOKENS)
        index = (image * N + n) * heads + head
        one = tl.where(exists, 1.0, 0.0)
        weight = one if matrix_weight is None else one * tl.load(matrix_weight + index).to(tl.float32)
        phi = _features(_load(x, x_strides, image, row, col, head, d, D), FEATURES)
        values = _load(y, y_strides, image, row, col, head, e, V)
        if gate is not None:
            factors = _load(gate, gate_strides, image, row, col, head, e, V)
            values = values.to(tl.float32) * factors.to(tl.float32)
        if VALUE:
            of_value = one if value_weight is None else one * tl.load(value_weight + index)
            value += values.to(tl.float32) * of_value[:, None]
        of_vector = weight if vector_weight is None else one * tl.load(vector_weight + index)
        key += phi * of_vector[:, None]
        phi = _turned(phi, turns, half, row, col, head, d, D, RUN, False) * weight[:, None]
        kv = product(tl.trans(phi), values, kv, PARTS)

    partial += ((split * images + image) * heads + head) * (D * V + D + (V if VALUE else 0))
    tl.store(partial + d[:, None] * V + e[None, :], kv * mean, mask=(d < D)[:, None] & (e < V)[None, :])
    tl.store(partial + D * V + d, tl.sum(key, 0) * mean, mask=d < D)
    if VALUE:  # of all blocks alike
        tl.store(partial + D * V + D + e, tl.sum(value, 0) * value_mean, mask=e < V)


# ---- The kernels of tiles -------------------------------------------------------------------------------------------

@triton.jit
def _tile(N, W, heads, tiles, TOKENS: tl.constexpr):
    """Index into (B, H, W, heads), row, column and existence of the program's tokens; its image and head, in int64."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    image = (program // tiles).to(tl.int64)
    n, row, col, exists = _tokens(program % tiles * TOKENS, N, W, TOKENS)
    return (image * N + n) * heads + head, row, col, exists, image, head


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    q, local, gate, state, turns, out, q_strides, local_strides, gate_strides, N, W, heads, tiles, half, scale, eps,
    FEATURES: tl.constexpr, NORMALIZER: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
):
    """(y + local) * gate of a tile of queries."""
    index, row, col, exists, image, head = _tile(N, W, heads, tiles, TOKENS)
    state += (image * heads + head) * (D * V + D + (V if NORMALIZER == "additive" else 0))
    e = tl.arange(0, BLOCK_V)
    num, total = _attended(
        q, q_strides, state, turns, half, image, row, col, head, e, scale, FEATURES, D, V, BLOCK_D, PARTS, RUN
    )
    y = num * _factor(total, eps, NORMALIZER)[:, None]
    if NORMALIZER == "additive":
        y -= total[:, None] * _vector(state + D * V + D, e, V)[None, :]
    if local is not None:
        y += _load(local, local_strides, image, row, col, head, e, V).to(tl.float32)
    if gate is not None:
        y *= _load(gate, gate_strides, image, row, col, head, e, V).to(tl.float32)
    _store(out, y, index, exists, e, V)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q, local, gate, dout, state, turns, dq, dlocal, dgate, stats, q_strides, local_strides, gate_strides, dout_strides,
    N, W, heads, tiles, images, half, scale, eps,
    FEATURES: tl.constexpr, NORMALIZER: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
):
    """The gradients of q, local and gate of a tile; and as `stats`, (2 or 3, B, H, W, heads), what the state's gradient
    weighs its tokens by: with dy the gradient of y, its kv adds up scale * factor_n R(phi_n) dy_n^T, its key
    scale * dtotal_n phi_n, its value (if additive) -total_n dy_n.
    """
    index, row, col, exists, image, head = _tile(N, W, heads, tiles, TOKENS)
    state += (image * heads + head) * (D * V + D + (V if NORMALIZER == "additive" else 0))
    e = tl.arange(0, BLOCK_V)
    num, total = _attended(
        q, q_strides, state, turns, half, image, row, col, head, e, scale, FEATURES, D, V, BLOCK_D, PARTS, RUN
    )
    factor = _factor(total, eps, NORMALIZER)
    dy = _load(dout, dout_strides, image, row, col, head, e, V).to(tl.float32)
    if gate is not None:
        y = num * factor[:, None]
        if NORMALIZER == "additive":
            y -= total[:, None] * _vector(state + D * V + D, e, V)[None, :]
        if local is not None:
            y += _load(local, local_strides, image, row, col, head, e, V).to(tl.float32)
        _store(dgate, dy * y, index, exists, e, V)
        dy *= _load(gate, gate_strides, image, row, col, head, e, V).to(tl.float32)
        if local is not None:
            _store(dlocal, dy, index, exists, e, V)

    if NORMALIZER == "none":
        dtotal = tl.zeros(total.shape, tl.float32)
    else:
        inverse = factor - 1.0 if NORMALIZER == "additive" else factor
        dtotal = -tl.sum(dy * num, 1) * inverse * inverse
        if NORMALIZER == "clamp":
            dtotal = tl.where(total > eps, dtotal, 0.0)
        elif NORMALIZER == "additive":
            dtotal -= tl.sum(dy * _vector(state + D * V + D, e, V)[None, :], 1)
    stats += index
    size = images.to(tl.int64) * N * heads
    tl.store(stats, scale * factor, mask=exists)
    tl.store(stats + size, scale * dtotal, mask=exists)
    if NORMALIZER == "additive":
        tl.store(stats + 2 * size, -total, mask=exists)

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        matrix = tl.trans(_matrix(state, d, e, D, V))
        dphi = product(dy, matrix, tl.zeros([TOKENS, BLOCK_D], tl.float32), PARTS) * factor[:, None]
        dphi = _turned(dphi, turns, half, row, col, head, d, D, RUN, True)
        dphi = scale * (dphi + dtotal[:, None] * _vector(state + D * V, d, D)[None, :])
        if FEATURES != "identity":
            phi = _features(_load(q, q_strides, image, row, col, head, d, D), FEATURES)
            dphi = _through_features(dphi, phi, FEATURES)
        _store(dq, dphi, index, exists, d, D)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    k, v, key_weight, dstate, turns, dk, dv, dkey_weight, k_strides, v_strides, N, W, heads, tiles, half,
    FEATURES: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
):
    """The gradients of a tile of keys, values and weights, from the state's, which has the means' 1 / N in it."""
    index, row, col, exists, image, head = _tile(N, W, heads, tiles, TOKENS)
    dstate += (image * heads + head) * (D * V + D + (V if VALUE else 0))
    e = tl.arange(0, BLOCK_V)
    values = _load(v, v_strides, image, row, col, head, e, V)
    if key_weight is not None:
        weight = tl.load(key_weight + index).to(tl.float32)
        dweight = tl.zeros([TOKENS], tl.float32)
    dvalues = tl.zeros([TOKENS, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        matrix = _matrix(dstate, d, e, D, V)
        phi = _features(_load(k, k_strides, image, row, col, head, d, D), FEATURES)
        dphi = product(values, tl.trans(matrix), tl.zeros([TOKENS, BLOCK_D], tl.float32), PARTS)
        dphi = _turned(dphi, turns, half, row, col, head, d, D, RUN, True)
        dphi += _vector(dstate + D * V, d, D)[None, :]
        gradient = _through_features(dphi, phi, FEATURES)
        if key_weight is not None:
            dweight += tl.sum(dphi * phi, 1)
            gradient *= weight[:, None]
        _store(dk, gradient, index, exists, d, D)
        dvalues = product(_turned(phi, turns, half, row, col, head, d, D, RUN, False), matrix, dvalues, PARTS)
    if key_weight is not None:
        tl.store(dkey_weight + index, dweight.to(dkey_weight.dtype.element_ty), mask=exists)
        dvalues *= weight[:, None]
    if VALUE:
        dvalues += _vector(dstate + D * V + D, e, V)[None, :]
    _store(dv, dvalues, index, exists, e, V)


# ---- Launches -------------------------------------------------------------------------------------------------------

def _parts(q: torch.Tensor, v: torch.Tensor) -> int:
    """For `_product`: as precise as the values are; features wider than those are so for their range."""
    if v.dtype == torch.float32:
        return 3
    return 1 if q.dtype == v.dtype == torch.bfloat16 else 2


def _arguments(q: torch.Tensor, v: torch.Tensor, form: Form, block: int, tokens: int) -> dict:
    """What all kernels share; `block` is the most channels of q and k that fit in the registers at a time."""
    (_, H, W, heads, d), dv = q.shape, v.shape[-1]
    return dict(
        N=H * W, W=W, heads=heads, **table(H, W, d, form.rotary, q.device), FEATURES=form.feature_map, D=d, V=dv,
        BLOCK_D=min(block, max(16, triton.next_power_of_2(d))), BLOCK_V=max(16, triton.next_power_of_2(dv)),
        TOKENS=tokens, PARTS=_parts(q, v),
    )


def _registers(arguments: dict) -> int | None:
    """Left to itself, ptxas would rather spill than run fewer programs at a time."""
    return 255 if arguments["PARTS"] > 1 else None


def _read(**tensors: torch.Tensor | None) -> dict:
    """Arguments that lie anywhere, and their strides."""
    return tensors | {f"{k}_strides": (0,) * 4 if x is None else x.stride()[:4] for k, x in tensors.items()}


def _normalizer(q: torch.Tensor, form: Form) -> dict:
    eps = form.eps / (q.shape[1] * q.shape[2]) if form.normalizer == "clamp" else form.eps
    return dict(NORMALIZER=form.normalizer, scale=form.scale, eps=eps)


def _additive(form: Form) -> bool:
    return form.normalizer == "additive"


def sums_launch(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, weights: tuple[torch.Tensor | None, ...],
    mean: float, form: Form,
) -> tuple[Launch, torch.Tensor]:
    """The launch, and the partial sums it writes, (splits, B, heads, size); `weights` in `sums_kernel`'s order."""
    arguments = _arguments(x, y, form, 64 if _parts(x, y) == 1 else 32, CHUNK)
    N, D, V = (arguments[name] for name in ("N", "D", "V"))
    programs = x.shape[0] * x.shape[3] * triton.cdiv(D, arguments["BLOCK_D"])
    # Partial sums are at most an eighth of what is read, in 16 bits.
    splits, share = shares(N, CHUNK, programs, 8 * max(D, V))
    state = empty_state(x, y, form)
    partial = state.new_empty(splits, *state.shape)
    arguments |= _read(x=x, y=y, gate=gate) | dict(
        zip(("matrix_weight", "vector_weight", "value_weight"), weights, strict=True),
        partial=partial, images=x.shape[0], splits=splits, share=share, mean=mean, value_mean=1 / N,
        VALUE=_additive(form),
    )
    return Launch(
        sums_kernel, splits * programs, arguments, threads=256 if arguments["BLOCK_V"] > 64 else 128, stages=2,
        registers=_registers(arguments),
    ), partial


def _tiled(kernel: triton.JITFunction, x: torch.Tensor, y: torch.Tensor, form: Form, arguments: dict) -> Launch:
    """One program a tile, image and head, for x like q or k and y like v."""
    several, wide = _parts(x, y) > 1, y.shape[-1] > 64
    tokens = SMALL_TILE if several and wide else TILE
    arguments |= _arguments(x, y, form, 16 if several or wide else 32, tokens)
    tiles = triton.cdiv(arguments["N"], tokens)
    return Launch(
        kernel, x.shape[0] * tiles * x.shape[3], arguments | dict(tiles=tiles), threads=256,
        registers=_registers(arguments),
    )


def queries_launch(q, local, gate, state, out, form: Form) -> Launch:
    return _tiled(queries_kernel, q, out, form, _read(q=q, local=local, gate=gate) | _normalizer(q, form) | dict(
        state=state, out=out,
    ))


def query_gradient_launch(q, local, gate, dout, state, dq, dlocal, dgate, stats, form: Form) -> Launch:
    tensors = _read(q=q, local=local, gate=gate, dout=dout)
    return _tiled(query_gradient_kernel, q, dout, form, tensors | _normalizer(q, form) | dict(
        state=state, dq=dq, dlocal=dlocal, dgate=dgate, stats=stats, images=q.shape[0],
    ))


def key_gradient_launch(k, v, key_weight, dstate, dk, dv, dkey_weight, form: Form) -> Launch:
    return _tiled(key_gradient_kernel, k, v, form, _read(k=k, v=v) | dict(
        key_weight=key_weight, dstate=dstate, dk=dk, dv=dv, dkey_weight=dkey_weight, VALUE=_additive(form),
    ))


# ---- The path's two functions ---------------------------------------------------------------------------------------

def _readable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _new(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.new_empty(tensor.shape)


def _weight(key_weight: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """The weights, contiguous, and what to multiply sums under them by."""
    return (None, 1 / (q.shape[1] * q.shape[2])) if key_weight is None else (key_weight.contiguous(), 1.0)


def _sums(*arguments) -> torch.Tensor:
    launch, partial = sums_launch(*arguments)
    launch.run()
    return partial[0] if len(partial) == 1 else partial.sum(0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    form: Form,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without autograd: out like v but contiguous, and the packed state.

    Inputs are read by their strides, and copied only if channels are not contiguous.
    """
    q, k, v, local, gate = map(_readable, (q, k, v, local, gate))
    key_weight, mean = _weight(key_weight, q)
    state = _sums(k, v, None, (key_weight, None, None), mean, form)
    out = _new(v)
    queries_launch(q, local, gate, state, out, form).run()
    return out, state


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    state: torch.Tensor,
    form: Form,
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v, key_weight, local and gate, contiguous; None where the input is. Deterministic."""
    grads = dq, dk, dv, dkey_weight, dlocal, dgate = [_new(x) for x in (q, k, v, key_weight, local, gate)]
    dout, q, k, v, local, gate = map(_readable, (dout, q, k, v, local, gate))
    key_weight, mean = _weight(key_weight, q)
    stats = state.new_empty(3 if _additive(form) else 2, *q.shape[:-1])
    query_gradient_launch(q, local, gate, dout, state, dq, dlocal, dgate, stats, form).run()
    # The gradient of y, which is dout * gate: where it has been written, one read is saved.
    dy, gate = (dout, gate) if dlocal is None else (dlocal, None)
    dstate = _sums(q, dy, gate, (stats[0], stats[1], stats[2] if _additive(form) else None), mean, form)
    key_gradient_launch(k, v, key_weight, dstate, dk, dv, dkey_weight, form).run()
    return grads
