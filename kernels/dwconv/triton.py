"""Fused Triton kernels of the depthwise convolution, forward and backward, in one pass over the map each.

There are no matrix products here: the work is loads, and a multiply-add per tap. A program owns ROWS rows of a tile of
TILE_W columns and BLOCK_C channels, and walks over the columns of the kernel one by one. For each it loads the
ROWS + kh - 1 input rows under its own once, shifted by that column, and adds each to all the rows it contributes to:
their sums stay in registers, beside one column of the kernel. With a dilation, its rows are of one dilation group. The
gradient of the input is the forward with the kernel flipped.

Tensors are read where they lie, by their strides, with contiguous channels.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch

# Sizes that no binary depends on: one serves all resolutions, batches, and kernels of one height. Were their width
# known, compilers would unroll it, and run out of registers. Channels do count: they align the loads.
SIZES = ["H", "W", "kw", "dilation", "tiles_h", "tiles_w", "tiles", "tiles_per_program"]
WEIGHT_PROGRAMS = 4096  # that share the gradient of the weight: enough for any GPU, few enough to add up afterwards


@triton.jit
def _tile(index, dilation, tiles_h, tiles_w, ROWS: tl.constexpr, TILE_W: tl.constexpr):
    """Image, first row and columns of tile `index`; its rows are apart by the dilation."""
    col = index % tiles_w * TILE_W + tl.arange(0, TILE_W)
    index //= tiles_w
    image = (index // tiles_h).to(tl.int64)
    index = index % tiles_h
    return image, index % dilation + index // dilation * (ROWS * dilation), col


@triton.jit
def _pointers(x, strides, image, row, col, c):
    """To one row of a tile, (TILE_W, BLOCK_C); outside of the map they must be masked."""
    x += image * strides[0] + row.to(tl.int64) * strides[1]
    return x + (col.to(tl.int64)[:, None] * strides[2] + c[None, :])


@triton.jit
def _inside(row, col, c, H, W, C):
    """The mask of one row of a tile; one unsigned comparison tests both ends of an axis."""
    return ((col.to(tl.uint32) < W) & (row.to(tl.uint32) < H))[:, None] & (c < C)[None, :]


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x, weight, bias, out, x_strides, out_strides, H, W, C, kw, dilation, tiles_h, tiles_w,
    KH: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image, first, col = _tile(program // blocks, dilation, tiles_h, tiles_w, ROWS, TILE_W)

    if bias is None:
        start = tl.zeros([TILE_W, BLOCK_C], tl.float32)
    else:
        start = _load(bias + c, c < C)[None, :].broadcast_to(TILE_W, BLOCK_C)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (start,)
    for j in range(kw):
        taps = ()
        tap = weight + j * C + c
        for _ in tl.static_range(KH):
            taps += (_load(tap, c < C)[None, :],)
            tap += kw * C
        row, shifted = first - KH // 2 * dilation, col + (j - kw // 2) * dilation
        pointers = _pointers(x, x_strides, image, row, shifted, c)
        for y in tl.static_range(ROWS + KH - 1):
            values = _load(pointers, _inside(row, shifted, c, H, W, C))
            added = ()
            for r in tl.static_range(ROWS):
                if y >= r and y < r + KH:
                    added += (sums[r] + values * taps[y - r],)
                else:
                    added += (sums[r],)
            sums = added
            row += dilation
            pointers += dilation.to(tl.int64) * x_strides[1]  # by steps: addresses kept over the loop cost registers

    for r in tl.static_range(ROWS):
        row = first + r * dilation
        value, mask = sums[r], _inside(row, col, c, H, W, C)
        if RESIDUAL:
            value += _load(_pointers(x, x_strides, image, row, col, c), mask)
        tl.store(_pointers(out, out_strides, image, row, col, c), value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    dout, x, dweight, dbias, dout_strides, x_strides, H, W, C, kw, dilation, tiles_h, tiles_w, tiles, tiles_per_program,
    KH: tl.constexpr, ROWS: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One column of the kernel's gradient from several tiles; programs of the middle column add up dout as well."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks
    j = program % kw
    share = program // kw

    total = tl.zeros([TILE_W, BLOCK_C], tl.float32)
    sums = ()
    for _ in tl.static_range(KH):
        sums += (total,)
    for index in range(share * tiles_per_program, tl.minimum((share + 1) * tiles_per_program, tiles)):
        image, first, col = _tile(index, dilation, tiles_h, tiles_w, ROWS, TILE_W)
        douts = ()
        for r in tl.static_range(ROWS):
            row = first + r * dilation
            values = _load(_pointers(dout, dout_strides, image, row, col, c), _inside(row, col, c, H, W, C))
            douts += (values,)
            total += values
        row, shifted = first - KH // 2 * dilation, col + (j - kw // 2) * dilation
        pointers = _pointers(x, x_strides, image, row, shifted, c)
        for y in tl.static_range(ROWS + KH - 1):
            values = _load(pointers, _inside(row, shifted, c, H, W, C))
            added = ()
            for i in tl.static_range(KH):
                if y >= i and y < i + ROWS:
                    added += (sums[i] + values * douts[y - i],)
                else:
                    added += (sums[i],)
            sums = added
            row += dilation
            pointers += dilation.to(tl.int64) * x_strides[1]

    dweight += (share.to(tl.int64) * KH * kw + j) * C
    for i in tl.static_range(KH):
        tl.store(dweight + i * kw * C + c, tl.sum(sums[i], 0), mask=c < C)
    tl.store(dbias + share.to(tl.int64) * C + c, tl.sum(total, 0), mask=(c < C) & (j == kw // 2))


# ---- Launches -------------------------------------------------------------------------------------------------------

def _tiling(x: torch.Tensor, rows: int, dilation: int) -> dict[str, int]:
    """The sizes that reach least beyond the map; the larger ones among equals. `rows` are those of the kernel."""
    def least(length: int, *sizes: int) -> int:
        return min(sizes, key=lambda size: triton.cdiv(length, size) * size)

    _, H, W, C = x.shape
    # Of 64 channels, a thread loads 16 bytes a row: more would take the registers that a column of the kernel needs.
    widths = (16, 8) if x.element_size() == 2 and rows <= 9 else (8,)
    return dict(ROWS=least(triton.cdiv(H, dilation), 8, 4), TILE_W=least(W, *widths), BLOCK_C=least(C, 64, 32))


def _launch(kernel: triton.JITFunction, x: torch.Tensor, kernel_size: tuple[int, int], dilation: int, **own) -> Launch:
    """One program a tile and block of channels; adds to `own` what both kernels share."""
    B, H, W, C = x.shape
    tiling = _tiling(x, kernel_size[0], dilation)
    tiles_h, tiles_w = dilation * triton.cdiv(H, dilation * tiling["ROWS"]), triton.cdiv(W, tiling["TILE_W"])
    arguments = own | tiling | dict(
        x=x, x_strides=x.stride()[:3], H=H, W=W, C=C, dilation=dilation, tiles_h=tiles_h, tiles_w=tiles_w,
        KH=kernel_size[0], kw=kernel_size[1],
    )
    # More threads than channels: each then loads its own taps, which would go through shared memory otherwise.
    return Launch(kernel, B * tiles_h * tiles_w * triton.cdiv(C, tiling["BLOCK_C"]), arguments, 128, registers=255)


def forward_launch(x, weight, bias, out, dilation: int, residual: bool) -> Launch:
    """`weight` is (kh, kw, C), contiguous."""
    return _launch(
        forward_kernel, x, weight.shape[:2], dilation,
        weight=weight, bias=bias, out=out, out_strides=out.stride()[:3], RESIDUAL=residual,
    )


def weight_gradient_launch(
    dout, x, kernel_size: tuple[int, int], dilation: int
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch, and the partial gradients it writes: (shares, kh, kw, C) and (shares, C)."""
    kw, C = kernel_size[1], x.shape[-1]
    launch = _launch(weight_gradient_kernel, x, kernel_size, dilation, dout=dout, dout_strides=dout.stride()[:3])
    blocks = triton.cdiv(C, launch.arguments["BLOCK_C"])
    tiles = launch.programs // blocks
    per_program = max(1, triton.cdiv(tiles * kw * blocks, WEIGHT_PROGRAMS))
    shares = triton.cdiv(tiles, per_program)
    dweight, dbias = (
        torch.empty(shares, *size, C, dtype=torch.float32, device=x.device) for size in (kernel_size, ())
    )
    arguments = launch.arguments | dict(dweight=dweight, dbias=dbias, tiles=tiles, tiles_per_program=per_program)
    return launch._replace(programs=shares * kw * blocks, arguments=arguments), dweight, dbias


# ---- The path's two functions ---------------------------------------------------------------------------------------

def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, residual: bool
) -> torch.Tensor:
    """The op on (B, H, W, C), contiguous."""
    x, taps = _readable(x), weight[:, 0].permute(1, 2, 0).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward_launch(x, taps, bias, out, dilation, residual).run()
    return out


def weight_gradient(
    dout: torch.Tensor, x: torch.Tensor, kernel_size: tuple[int, int], dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the weight (C, 1, kh, kw) and of the bias (C,), for dout and x (B, H, W, C).

    Deterministic: each program writes its share, and the shares are added afterwards.
    """
    launch, dweight, dbias = weight_gradient_launch(_readable(dout), _readable(x), kernel_size, dilation)
    launch.run()
    dweight = dweight.sum(0).permute(2, 0, 1)[:, None].to(x.dtype).contiguous()
    return dweight, dbias.sum(0).to(x.dtype)
