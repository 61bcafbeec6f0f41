"""Fused Triton kernels of 2-D neighborhood attention, forward and backward.

The three kernels have one shape. A program owns a tile of tokens of one head and one dilation group; it finds the
rectangle of tokens that their windows touch, walks over it in chunks of rows x cols, and computes a chunk's scores as a
dense product under a mask, with the online softmax of FlashAttention (Dao, arXiv 2307.08691). Coordinates are positions
inside the dilation group: only loads and stores know that position p of group g lies at g + dilation * p. Tensors are
read and written where they lie, by their strides; consecutive programs take the heads of one tile, whose channels are
neighbours in memory. `tiling` chooses tile and chunk; any choice is right.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .._launch import Launch
from .tiling import Tiling, choose
from .window import Window

LOG2E = tl.constexpr(1.4426950408889634)  # scores are kept in units of log 2, where exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-1e30)  # where a running maximum starts: finite, so that chunks without a key give no NaN

# Sizes that no binary depends on: one serves all resolutions. (Dilations do count: 1 saves divisions.)
SIZES = ["H", "W", "heads", "tiles_h", "tiles_w", "images", "tiles_per_program"]
STRIDED = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")  # (B, H, W, heads, head_dim), where they lie
PARTIAL_PROGRAMS = 4096  # that share the gradient of the bias: enough for any GPU, few enough to add up afterwards


# ---- Geometry, in integers ------------------------------------------------------------------------------------------
# AXIS = (kernel, stride, causal, disc) of one axis.

@triton.jit
def _window(q, size, AXIS: tl.constexpr):
    """First key and number of keys of position q in a group of `size`: `window.axis_range`, which explains it."""
    KERNEL: tl.constexpr = AXIS[0]
    STRIDE: tl.constexpr = AXIS[1]
    if AXIS[3]:  # disc
        start = tl.maximum(q - KERNEL // 2, 0)
        count = tl.minimum(q + KERNEL // 2 + 1, size) - start
    elif AXIS[2]:  # causal
        leader = tl.minimum(q // STRIDE * STRIDE + STRIDE - 1, size - 1)
        start = tl.maximum(leader - KERNEL + 1, 0)
        count = q - start + 1
    else:
        leader = tl.minimum(q // STRIDE * STRIDE + STRIDE // 2, size - 1)
        start = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), tl.maximum(size - KERNEL, 0))
        count = tl.minimum(size, KERNEL)
    return start, count


@triton.jit
def _keys(first, size, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Keys low to high - 1 are those that the TILE queries from `first` see; none for a tile past its group's end."""
    low, _ = _window(first, size, AXIS)
    start, count = _window(tl.minimum(first + TILE, size) - 1, size, AXIS)
    return low, tl.where(first < size, start + count, low)


@triton.jit
def _queries(first, size, AXIS: tl.constexpr, TILE: tl.constexpr):
    """Queries low to high - 1 are those that see one of the TILE keys from `first`: `_window` solved for q."""
    KERNEL: tl.constexpr = AXIS[0]
    STRIDE: tl.constexpr = AXIS[1]
    last = tl.minimum(first + TILE, size) - 1
    if AXIS[3]:  # disc
        low = tl.maximum(first - KERNEL // 2, 0)
        high = last + KERNEL // 2 + 1
    elif AXIS[2]:  # causal
        low = first
        high = tl.where(last + KERNEL < size, (last + KERNEL) // STRIDE * STRIDE, size)
    else:
        low = tl.maximum(first + KERNEL // 2 - KERNEL - STRIDE // 2 + STRIDE, 0) // STRIDE * STRIDE
        low = tl.where(first < KERNEL, 0, low)  # the windows at the borders are shifted inwards
        high = (last + KERNEL // 2 - STRIDE // 2) // STRIDE * STRIDE + STRIDE
        high = tl.where(last + KERNEL < size, high, size)
    return low, tl.where(first < size, tl.minimum(high, size), low)


@triton.jit
def _tile(index, length, dilation, TILE: tl.constexpr):
    """Dilation group, number of its positions, and first position of tile `index` of an axis."""
    group = index % dilation
    return group, (length - group + dilation - 1) // dilation, index // dilation * TILE


# ---- Tokens and biases ----------------------------------------------------------------------------------------------

@triton.jit
def _tokens(tensor, strides, image, row, col, head, BLOCK_D: tl.constexpr):
    """Pointers (tokens, BLOCK_D); `image` and `head` are int64, and so are the offsets."""
    tensor += image * strides[0] + head * strides[3]
    tensor = (tensor + col.to(tl.int64) * strides[2]) + row.to(tl.int64) * strides[1]
    return tensor[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _mask(valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if D == BLOCK_D:
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def _load(tensor, strides, image, row, col, head, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D), zero where not valid."""
    return tl.load(_tokens(tensor, strides, image, row, col, head, BLOCK_D), mask=_mask(valid, D, BLOCK_D), other=0.0)


@triton.jit
def _store(tensor, value, strides, image, row, col, head, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tokens = _tokens(tensor, strides, image, row, col, head, BLOCK_D)
    tl.store(tokens, value.to(tensor.dtype.element_ty), mask=_mask(valid, D, BLOCK_D))


@triton.jit
def _scalars(tensor, image, row, col, head, H, W, heads):
    """Pointers (tokens,) into a contiguous (B, H, W, heads) tensor."""
    return ((tensor + image * H * W * heads + head) + col * heads) + row.to(tl.int64) * (W * heads)


@triton.jit
def _table(biases, head, AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, TABLE: tl.constexpr):
    """The head's (2 kh, 2 kw) biases, flat, in TABLE entries; None without a bias."""
    if biases is None:
        table = None
    else:
        SIZE: tl.constexpr = 4 * AXIS_H[0] * AXIS_W[0]
        entry = tl.arange(0, TABLE)
        table = tl.load(biases + head * SIZE + entry, mask=entry < SIZE, other=NEVER)
    return table


@triton.jit
def _bias(
    table, qy, qx, ky, kx, size_y, size_x, AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, RADIUS: tl.constexpr
):
    """The bias of every pair, -inf where the window does not hold the key or there is no query.

    Queries lie along one axis and keys along the other, either way. The table's last row and column hold -inf, so that
    windows cost no comparison per pair: those of x are found once per column of chunks, those of y once per row.
    """
    start_y, count_y = _window(qy, size_y, AXIS_H)
    start_x, count_x = _window(qx, size_x, AXIS_W)
    # One unsigned comparison tests both ends of a window.
    inside_y = ((ky - start_y).to(tl.uint32) < count_y.to(tl.uint32)) & (qy < size_y)
    inside_x = ((kx - start_x).to(tl.uint32) < count_x.to(tl.uint32)) & (qx < size_x)
    if table is None:
        bias = tl.where(inside_y & inside_x, 0.0, NEVER)
    else:
        row = tl.where(inside_y, ky - qy + AXIS_H[0] - 1, 2 * AXIS_H[0] - 1)
        col = tl.where(inside_x, kx - qx + AXIS_W[0] - 1, 2 * AXIS_W[0] - 1)
        entry = row * (2 * AXIS_W[0]) + col
        bias = tl.reshape(tl.gather(table, tl.reshape(entry, [entry.numel]), 0), entry.shape)
    if RADIUS > 0:
        bias = tl.where((ky - qy) * (ky - qy) + (kx - qx) * (kx - qx) < RADIUS * RADIUS, bias, NEVER)
    return bias


# ---- Forward --------------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, biases, out, lse, q_strides, k_strides, v_strides, out_strides,
    H, W, heads, dilation_h, dilation_w, tiles_h, tiles_w, scale,
    AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, RADIUS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TABLE: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    gx, size_x, x0 = _tile(program % tiles_w, W, dilation_w, TILE_W)
    program //= tiles_w
    gy, size_y, y0 = _tile(program % tiles_h, H, dilation_h, TILE_H)
    image = (program // tiles_h).to(tl.int64)

    table = _table(biases, head, AXIS_H, AXIS_W, TABLE)
    m, n = tl.arange(0, TILE_H * TILE_W), tl.arange(0, ROWS * COLS)
    qy, qx = y0 + m // TILE_W, x0 + m % TILE_W
    row, col, valid = gy + dilation_h * qy, gx + dilation_w * qx, (qy < size_y) & (qx < size_x)
    q_tile = _load(q, q_strides, image, row, col, head, valid, D, BLOCK_D)

    maximum = tl.full([TILE_H * TILE_W], LOWEST, tl.float32)
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    weighted = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    y_low, y_high = _keys(y0, size_y, AXIS_H, TILE_H)
    x_low, x_high = _keys(x0, size_x, AXIS_W, TILE_W)
    for x in range(x_low, x_high, COLS):
        kx = x + n % COLS
        for y in range(y_low, y_high, ROWS):
            ky = y + n // COLS
            krow, kcol, exists = gy + dilation_h * ky, gx + dilation_w * kx, (ky < size_y) & (kx < size_x)
            k_chunk = _load(k, k_strides, image, krow, kcol, head, exists, D, BLOCK_D)
            v_chunk = _load(v, v_strides, image, krow, kcol, head, exists, D, BLOCK_D)
            bias = _bias(table, qy[:, None], qx[:, None], ky[None, :], kx[None, :], size_y, size_x,
                         AXIS_H, AXIS_W, RADIUS)
            scores = tl.dot(q_tile, tl.trans(k_chunk), input_precision="ieee") * scale + bias
            higher = tl.maximum(maximum, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(maximum - higher)
            total = total * shrink + tl.sum(weights, 1)
            weighted = tl.dot(weights.to(v_chunk.dtype), v_chunk, weighted * shrink[:, None], input_precision="ieee")
            maximum = higher

    _store(out, weighted * (1.0 / total)[:, None], out_strides, image, row, col, head, valid, D, BLOCK_D)
    tl.store(_scalars(lse, image, row, col, head, H, W, heads), (maximum + tl.log2(total)) * LN2, mask=valid)


# ---- Backward -------------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q, k, v, biases, out, lse, dout, dlse, stats, dq, drpb,
    q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides,
    H, W, heads, dilation_h, dilation_w, tiles_h, tiles_w, images, tiles_per_program, scale,
    AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, RADIUS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TABLE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """dq, the program's share of the bias' gradient, and for the other kernel, per query: lse / log 2 and
    delta = rowsum(dout * out) - dlse, with which ds = p * (dp - delta).

    A program takes several tiles of one column of tiles. The gradient of the bias sums ds over all pairs at one
    (key - query), in two steps: along y by a product with ones at slot = ky - qy, chunk by chunk; along x once at the
    end, since all its chunks are as wide as the tiles' windows, and start at the same distance from their tile.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    gx, size_x, x0 = _tile(program % tiles_w, W, dilation_w, TILE_W)
    x_low, x_high = _keys(x0, size_x, AXIS_W, TILE_W)
    share = program // tiles_w

    table = _table(biases, head, AXIS_H, AXIS_W, TABLE)
    m, n = tl.arange(0, TILE_H * TILE_W), tl.arange(0, ROWS * COLS)
    qx = x0 + m % TILE_W
    slot, pair = tl.arange(0, SLOTS), tl.arange(0, TILE_H * ROWS)
    bias_gradient = tl.zeros([SLOTS, TILE_W * COLS], tl.float32)
    end = tl.minimum((share + 1) * tiles_per_program, images * tiles_h)
    for index in range(share * tiles_per_program, end):
        gy, size_y, y0 = _tile(index % tiles_h, H, dilation_h, TILE_H)
        image = (index // tiles_h).to(tl.int64)
        qy = y0 + m // TILE_W
        row, col, valid = gy + dilation_h * qy, gx + dilation_w * qx, (qy < size_y) & (qx < size_x)
        q_tile = _load(q, q_strides, image, row, col, head, valid, D, BLOCK_D)
        dout_tile = _load(dout, dout_strides, image, row, col, head, valid, D, BLOCK_D)
        out_tile = _load(out, out_strides, image, row, col, head, valid, D, BLOCK_D)
        lse_tile = tl.load(_scalars(lse, image, row, col, head, H, W, heads), mask=valid, other=0.0) * LOG2E
        delta_tile = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
        if dlse is not None:
            delta_tile -= tl.load(_scalars(dlse, image, row, col, head, H, W, heads), mask=valid, other=0.0)
        stats_tile = _scalars(stats, image, row, col, 2 * head, H, W, 2 * heads)
        tl.store(stats_tile, lse_tile, mask=valid)
        tl.store(stats_tile + 1, delta_tile, mask=valid)

        gradient = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        y_low, y_high = _keys(y0, size_y, AXIS_H, TILE_H)
        for x in range(x_low, x_high, COLS):
            kx = x + n % COLS
            for y in range(y_low, y_high, ROWS):
                ky = y + n // COLS
                krow, kcol, exists = gy + dilation_h * ky, gx + dilation_w * kx, (ky < size_y) & (kx < size_x)
                k_chunk = _load(k, k_strides, image, krow, kcol, head, exists, D, BLOCK_D)
                v_chunk = _load(v, v_strides, image, krow, kcol, head, exists, D, BLOCK_D)
                bias = _bias(table, qy[:, None], qx[:, None], ky[None, :], kx[None, :], size_y, size_x,
                             AXIS_H, AXIS_W, RADIUS)
                scores = tl.dot(q_tile, tl.trans(k_chunk), input_precision="ieee") * scale + bias
                weights = tl.exp2(scores - lse_tile[:, None])
                dweights = tl.dot(dout_tile, tl.trans(v_chunk), input_precision="ieee")
                dscores = (weights * (dweights - delta_tile[:, None])).to(k_chunk.dtype)
                gradient = tl.dot(dscores, k_chunk, gradient, input_precision="ieee")
                if drpb is not None:
                    pairs = tl.permute(tl.reshape(dscores, [TILE_H, TILE_W, ROWS, COLS]), [0, 2, 1, 3])
                    pairs = tl.reshape(pairs, [TILE_H * ROWS, TILE_W * COLS])
                    distance = (y + pair % ROWS) - (y0 + pair // ROWS) + AXIS_H[0] - 1
                    ones = tl.where(slot[:, None] == distance[None, :], 1.0, 0.0).to(k_chunk.dtype)
                    bias_gradient = tl.dot(ones, pairs, bias_gradient, input_precision="ieee")
        _store(dq, gradient * (scale * LN2), dq_strides, image, row, col, head, valid, D, BLOCK_D)

    if drpb is not None:
        PITCH: tl.constexpr = 2 * AXIS_W[0] - 1
        pair = tl.arange(0, TILE_W * COLS)
        distance = (x_low + pair % COLS) - (x0 + pair // COLS) + AXIS_W[0] - 1
        partial = drpb + (tl.program_id(0).to(tl.int64) * (2 * AXIS_H[0] - 1) + slot) * PITCH
        for dx in range(PITCH):
            at_dx = tl.sum(tl.where(distance[None, :] == dx, bias_gradient, 0.0), 1)
            tl.store(partial + dx, at_dx, mask=slot < 2 * AXIS_H[0] - 1)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q, k, v, biases, stats, dout, dk, dv,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    H, W, heads, dilation_h, dilation_w, tiles_h, tiles_w, scale,
    AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, RADIUS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TABLE: tl.constexpr,
):
    """dk and dv of a tile of keys, from the queries that see it: each is written once, by one program."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    gx, size_x, x0 = _tile(program % tiles_w, W, dilation_w, TILE_W)
    program //= tiles_w
    gy, size_y, y0 = _tile(program % tiles_h, H, dilation_h, TILE_H)
    image = (program // tiles_h).to(tl.int64)

    table = _table(biases, head, AXIS_H, AXIS_W, TABLE)
    m, n = tl.arange(0, TILE_H * TILE_W), tl.arange(0, ROWS * COLS)
    ky, kx = y0 + m // TILE_W, x0 + m % TILE_W
    row, col, valid = gy + dilation_h * ky, gx + dilation_w * kx, (ky < size_y) & (kx < size_x)
    k_tile = _load(k, k_strides, image, row, col, head, valid, D, BLOCK_D)
    v_tile = _load(v, v_strides, image, row, col, head, valid, D, BLOCK_D)

    k_gradient = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    v_gradient = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    y_low, y_high = _queries(y0, size_y, AXIS_H, TILE_H)
    x_low, x_high = _queries(x0, size_x, AXIS_W, TILE_W)
    for x in range(x_low, x_high, COLS):
        qx = x + n % COLS
        for y in range(y_low, y_high, ROWS):
            qy = y + n // COLS
            qrow, qcol, exists = gy + dilation_h * qy, gx + dilation_w * qx, (qy < size_y) & (qx < size_x)
            q_chunk = _load(q, q_strides, image, qrow, qcol, head, exists, D, BLOCK_D)
            dout_chunk = _load(dout, dout_strides, image, qrow, qcol, head, exists, D, BLOCK_D)
            # Past the map, the stats of some other query do: the bias is -inf there. A mask would cost more.
            qrow, qcol = tl.minimum(qrow, H - 1), tl.minimum(qcol, W - 1)
            stats_chunk = _scalars(stats, image, qrow, qcol, 2 * head, H, W, 2 * heads)
            lse_chunk, delta_chunk = tl.load(stats_chunk), tl.load(stats_chunk + 1)
            bias = _bias(table, qy[None, :], qx[None, :], ky[:, None], kx[:, None], size_y, size_x,
                         AXIS_H, AXIS_W, RADIUS)
            scores = tl.dot(k_tile, tl.trans(q_chunk), input_precision="ieee") * scale + bias
            weights = tl.exp2(scores - lse_chunk[None, :])
            v_gradient = tl.dot(weights.to(dout_chunk.dtype), dout_chunk, v_gradient, input_precision="ieee")
            dweights = tl.dot(v_tile, tl.trans(dout_chunk), input_precision="ieee")
            dscores = (weights * (dweights - delta_chunk[None, :])).to(q_chunk.dtype)
            k_gradient = tl.dot(dscores, q_chunk, k_gradient, input_precision="ieee")

    _store(dk, k_gradient * (scale * LN2), dk_strides, image, row, col, head, valid, D, BLOCK_D)
    _store(dv, v_gradient, dv_strides, image, row, col, head, valid, D, BLOCK_D)


# ---- Launches -------------------------------------------------------------------------------------------------------

def _launch(kernel: triton.JITFunction, tiling: Tiling, window: Window, scale: float, **arguments) -> Launch:
    """One program a tile, head and image; adds to `arguments` what all kernels share, and the strides of STRIDED."""
    q = arguments["q"]
    B, H, W, heads, head_dim = q.shape
    (tile_h, tile_w), (rows, cols), (dilation_h, dilation_w) = *tiling, window.dilation
    axis_h, axis_w = ((window.kernel[a], window.stride[a], window.causal[a], window.disc) for a in (0, 1))
    tiles_h = dilation_h * triton.cdiv(H, dilation_h * tile_h)
    tiles_w = dilation_w * triton.cdiv(W, dilation_w * tile_w)
    arguments |= {f"{name}_strides": arguments[name].stride()[:4] for name in STRIDED if name in arguments}
    arguments |= dict(
        H=H, W=W, heads=heads, dilation_h=dilation_h, dilation_w=dilation_w, tiles_h=tiles_h, tiles_w=tiles_w,
        scale=scale * LOG2E.value, AXIS_H=axis_h, AXIS_W=axis_w, RADIUS=window.radius if window.disc else 0,
        D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        TILE_H=tile_h, TILE_W=tile_w, ROWS=rows, COLS=cols, TABLE=triton.next_power_of_2(4 * math.prod(window.kernel)),
    )
    exact = q.dtype == torch.float32  # its products are sums in registers
    return Launch(
        kernel, B * tiles_h * tiles_w * heads, arguments,
        threads=256 if exact and head_dim > 32 else 128, registers=255 if exact else None,
    )


def _choose(q: torch.Tensor, window: Window, **how: bool) -> Tiling:
    return choose(*q.shape[1:3], window, tensor_cores=q.dtype != torch.float32, **how)


def forward_launch(q, k, v, biases, out, lse, window: Window, scale: float) -> Launch:
    return _launch(forward_kernel, _choose(q, window), window, scale, q=q, k=k, v=v, biases=biases, out=out, lse=lse)


def query_gradient_launch(
    dout, dlse, q, k, v, biases, out, lse, stats, dq, window: Window, scale: float
) -> tuple[Launch, torch.Tensor | None]:
    """The launch, and the partial gradients of the bias it writes: (shares, heads, 2 kh - 1, 2 kw - 1)."""
    launch = _launch(
        query_gradient_kernel, _choose(q, window, toeplitz=biases is not None), window, scale,
        q=q, k=k, v=v, biases=biases, out=out, lse=lse, dout=dout, dlse=dlse, stats=stats, dq=dq,
        SLOTS=max(16, triton.next_power_of_2(2 * window.kernel[0] - 1)),
    )
    images, tiles_h, tiles_w, heads = q.shape[0], launch.arguments["tiles_h"], launch.arguments["tiles_w"], q.shape[3]
    # At most, a program takes all tiles of its column.
    merge = 1 if biases is None else max(1, min(triton.cdiv(launch.programs, PARTIAL_PROGRAMS), images * tiles_h))
    shares, drpb = triton.cdiv(images * tiles_h, merge) * tiles_w, None
    if biases is not None:
        drpb = biases.new_empty(shares, heads, 2 * window.kernel[0] - 1, 2 * window.kernel[1] - 1)
    arguments = launch.arguments | dict(drpb=drpb, images=images, tiles_per_program=merge)
    return launch._replace(programs=shares * heads, arguments=arguments), drpb


def key_gradient_launch(dout, q, k, v, biases, stats, dk, dv, window: Window, scale: float) -> Launch:
    return _launch(
        key_gradient_kernel, _choose(q, window, inverse=True), window, scale,
        q=q, k=k, v=v, biases=biases, stats=stats, dout=dout, dk=dk, dv=dv,
    )


# ---- The path's two functions ---------------------------------------------------------------------------------------

def padded(rpb: torch.Tensor | None) -> torch.Tensor | None:
    """(heads, 2 kh, 2 kw) float32 in units of log 2, with -inf in the last row and column; None without a bias."""
    return None if rpb is None else F.pad(rpb.to(torch.float32) * LOG2E.value, (0, 1, 0, 1), value=float("-inf"))


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, window: Window, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out like q but contiguous, and the natural log-sum-exp (B, H, W, heads) in float32.

    q, k and v (B, H, W, heads, head_dim) are read by their strides, and copied only if channels are not contiguous.
    """
    q, k, v = map(_readable, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    forward_launch(q, k, v, padded(rpb), out, lse, window, scale).run()
    return out, lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    rpb: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, window: Window, scale: float,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> torch.Tensor | None:
    """Writes dq, dk and dv by their strides (channels contiguous); returns the bias' gradient in float32, or None.

    Deterministic: every gradient is written by one program, and the partial gradients of the bias are added afterwards.
    """
    dout, q, k, v = map(_readable, (dout, q, k, v))
    biases, stats = padded(rpb), lse.new_empty(*lse.shape, 2)
    dlse = None if dlse is None else dlse.contiguous()
    launch, drpb = query_gradient_launch(dout, dlse, q, k, v, biases, out, lse, stats, dq, window, scale)
    launch.run()
    key_gradient_launch(dout, q, k, v, biases, stats, dk, dv, window, scale).run()
    return None if drpb is None else drpb.sum(0)
