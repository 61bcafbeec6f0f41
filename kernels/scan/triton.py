"""The scans on a GPU, forward and backward: what `triton_lines` is launched on, and a kernel for `linear_scan`.

A line is scanned in chunks, side by side, where there are not programs enough to fill a GPU otherwise: first what each
chunk does to the states that come in, then these states, from chunk to chunk, then the chunks themselves. The first of
these passes costs about as much as the last, so there are no more chunks than it takes; short lines, and those of many
images, have one. Lines that add up to one result are launched one after another.

Low-rank time steps are expanded inside of the forward pass. In the backward pass a matrix product expands those of one
line after another, and takes the gradients of low and weight from what the kernel leaves in their place.

There are no atomic additions: results are the same in every run.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import PROGRAMS, Launch
from .portable import shift
from .routes import plan
from .triton_lines import after, carry_kernel, channels_of, gradient_kernel, output_kernel, row, summary_kernel

STEPS = 16  # of a tile: the least that a matrix product takes
CHANNELS = 32  # of a program
THREADS = 128  # of a program: with fewer, each has more steps of a channel, and runs out of registers
LEAST_TILES = 4  # of a chunk


# ---- Lines ----------------------------------------------------------------------------------------------------------

class Lines(NamedTuple):
    """Scans side by side, over views (B, tokens, K, *) with contiguous numbers of a token."""

    x: torch.Tensor  # (B, L, K, D)
    delta: torch.Tensor | None  # (B, L, K, D), or those of low rank
    proj: torch.Tensor  # (B, L, K, R + 2 N): low, B and C; R may be 0 where there is a delta
    weight: torch.Tensor | None  # (K, D, R)
    bias: torch.Tensor | None  # (K, D)
    A: torch.Tensor  # (K, N, D)
    skip: torch.Tensor | None  # (K, D)
    routes: torch.Tensor | None = None  # (K, steps)
    permutes_all: bool = True
    softplus: bool = True
    reverse: bool = False

    @property
    def K(self) -> int:
        return self.x.shape[2]

    @property
    def steps(self) -> int:
        return self.x.shape[1] if self.routes is None else self.routes.shape[1]

    @property
    def rank(self) -> int:
        return self.proj.shape[3] - 2 * self.A.shape[1]

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.x.device)


class Grid(NamedTuple):
    """Into what the scans are divided."""

    blocks: int  # of channels
    tiles: int  # of a line
    chunks: int  # of a line
    tiles_per_chunk: int

    @classmethod
    def of(cls, lines: Lines, shared: bool) -> Grid:
        """`shared`: lines add up to one result, and cannot run side by side."""
        blocks, tiles = triton.cdiv(lines.x.shape[3], CHANNELS), triton.cdiv(lines.steps, STEPS)
        programs = len(lines.x) * blocks * (1 if shared else lines.K)
        chunks = max(1, min(PROGRAMS // max(1, programs), tiles // LEAST_TILES))
        per_chunk = triton.cdiv(tiles, chunks)
        return cls(blocks, tiles, triton.cdiv(tiles, per_chunk), per_chunk)


def _readable(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: torch.Tensor | None) -> dict[str, tuple[int, ...]]:
    """(image, token, line)."""
    return {f"{name}_strides": (0,) * 3 if x is None else x.stride()[:3] for name, x in tensors.items()}


def _arguments(lines: Lines, grid: Grid) -> dict:
    """What the kernels of lines share."""
    tensors = dict(x=lines.x, delta=lines.delta, proj=lines.proj)
    parameters = dict(weight=lines.weight, bias=lines.bias, A=lines.A, skip=lines.skip)
    return tensors | _strides(**tensors) | parameters | dict(
        routes=lines.routes, steps=lines.steps, D=lines.x.shape[3], N=lines.A.shape[1], R=lines.rank, K=lines.K,
        parameter_strides=tuple(0 if p is None else p.stride(0) for p in parameters.values()),
        **grid._asdict(), SOFTPLUS=lines.softplus, PERMUTES_ALL=lines.permutes_all, REVERSE=lines.reverse,
        PARTS=3 if lines.x.dtype == torch.float32 else 2, STEPS=STEPS, CHANNELS=CHANNELS,
    )


def _launch(kernel: triton.JITFunction, programs: int, arguments: dict) -> Launch:
    arguments = {name: arguments[name] for name in kernel.arg_names}
    return Launch(kernel, programs, arguments, threads=THREADS, registers=255)


# ---- Launches -------------------------------------------------------------------------------------------------------

def summary_launch(
    lines: Lines, grid: Grid, ends: torch.Tensor, dout: torch.Tensor | None = None,
    leaves: torch.Tensor | None = None, tile_starts: torch.Tensor | None = None,
) -> Launch:
    own = dict(ends=ends, dout=dout, leaves=leaves, tile_starts=tile_starts)
    programs = len(lines.x) * lines.K * grid.chunks * grid.blocks
    return _launch(summary_kernel, programs, _arguments(lines, grid) | own | _strides(dout=dout))


def carry_launch(
    lines: Lines, grid: Grid, leaving: torch.Tensor, ends: torch.Tensor, first: torch.Tensor | None,
    entering: torch.Tensor, back: bool,
) -> Launch:
    own = dict(leaving=leaving, ends=ends, first=first, entering=entering, BACK=back)
    return _launch(
        carry_kernel, len(lines.x) * lines.K * lines.A.shape[1] * grid.blocks, _arguments(lines, grid) | own
    )


def output_launches(lines: Lines, grid: Grid, out: torch.Tensor, state: torch.Tensor, shared: bool) -> Iterator[Launch]:
    """To be run as they come. `out` is a view (B, L, K, D), `state` (B, K, chunks, N, D) zeros, in the end states."""
    if grid.chunks > 1:
        ends = lines.zeros(*state.shape[:3], state.shape[3] + 1, state.shape[4])
        yield summary_launch(lines, grid, ends)
        yield carry_launch(lines, grid, ends, ends, None, state, False)
    arguments = _arguments(lines, grid) | _strides(out=out) | dict(state=state, out=out, ADD=shared)
    for first, count in [(k, 1) for k in range(lines.K)] if shared else [(0, lines.K)]:
        programs = len(lines.x) * count * grid.chunks * grid.blocks
        yield _launch(output_kernel, programs, arguments | dict(first_line=first, lines=count))


class Before(NamedTuple):
    """What the gradients of a chunk start from."""

    ends: torch.Tensor  # (B, K, chunks, N + 1, D), zeros before
    tile_starts: torch.Tensor  # (B, K, tiles, N + 1, D)
    starts: torch.Tensor | None  # (B, K, chunks, N, D) where there are several
    adjoint: torch.Tensor  # (B, K, chunks, N, D)

    @classmethod
    def of(cls, lines: Lines, grid: Grid, dstate: torch.Tensor | None) -> Before:
        """`dstate` is the gradient of the last states (B, K, N, D)."""
        (B, _, K, D), N = lines.x.shape, lines.A.shape[1]
        starts = None if grid.chunks == 1 else lines.empty(B, K, grid.chunks, N, D)
        adjoint = lines.zeros(B, K, grid.chunks, N, D)
        if dstate is not None:
            adjoint[:, :, -1] = dstate
        return cls(
            lines.zeros(B, K, grid.chunks, N + 1, D), lines.empty(B, K, grid.tiles, N + 1, D), starts, adjoint
        )


def before_launches(lines: Lines, grid: Grid, dout: torch.Tensor, before: Before) -> Iterator[Launch]:
    """To be run as they come. `dout` is (B, L, K, D)."""
    if before.starts is None:
        yield summary_launch(lines, grid, before.ends, tile_starts=before.tile_starts)
        return
    leaves, first = torch.zeros_like(before.ends), before.adjoint[:, :, -1].contiguous()
    yield summary_launch(lines, grid, before.ends, dout, leaves, before.tile_starts)
    yield carry_launch(lines, grid, before.ends, before.ends, None, before.starts, False)
    yield carry_launch(lines, grid, leaves, before.ends, first, before.adjoint, True)


class Gradients(NamedTuple):
    """What the launches of a backward pass write."""

    dx: torch.Tensor  # a view (B, L, K, D)
    dnumbers: torch.Tensor  # (blocks, B, L, K, 2 N) of B and C, zeros before; to be added up
    dparameters: torch.Tensor  # (B, chunks, K, N + 2, D): of A, bias and skip, likewise

    @classmethod
    def of(cls, lines: Lines, grid: Grid, dx: torch.Tensor) -> Gradients:
        (B, L, K, D), N = lines.x.shape, lines.A.shape[1]
        return cls(dx, lines.zeros(grid.blocks, B, L, K, 2 * N), lines.zeros(B, grid.chunks, K, N + 2, D))


def gradient_launch(
    lines: Lines, grid: Grid, dout: torch.Tensor, before: Before, found: Gradients, ddelta: torch.Tensor, shared: bool,
    first: int, count: int,
) -> Launch:
    """Of `count` lines with a delta, from the `first` on; if they are shared, to be launched one by one in order.

    `ddelta` is a view (B, L, K, D), and may be the delta itself.
    """
    arguments = _arguments(lines, grid) | before._asdict() | found._asdict() | dict(
        dout=dout, ddelta=ddelta, images=len(dout), length=dout.shape[1], ADD=shared, first_line=first, lines=count,
    )
    strides = _strides(dout=dout, dx=found.dx, ddelta=ddelta)
    return _launch(gradient_kernel, len(dout) * count * grid.chunks * grid.blocks, arguments | strides)


# ---- Lines, forward and backward ------------------------------------------------------------------------------------

def _forward(lines: Lines, out: torch.Tensor, shared: bool) -> torch.Tensor:
    """Fills `out`; the last states (B, K, N, D)."""
    grid = Grid.of(lines, shared)
    state = lines.zeros(len(out), lines.K, grid.chunks, *lines.A.shape[1:])
    for launch in output_launches(lines, grid, out, state, shared):
        launch.run()
    return state[:, :, -1]


def _backward(
    lines: Lines, dout: torch.Tensor, dstate: torch.Tensor | None, dx: torch.Tensor, shared: bool
) -> tuple[torch.Tensor, ...]:
    """Fills `dx`; the gradients of delta or low (B, L, K, *), B and C (B, L, K, 2 N), weight, A, bias and skip."""
    grid, N, dout = Grid.of(lines, shared), lines.A.shape[1], _readable(dout)
    before = Before.of(lines, grid, dstate)
    for launch in before_launches(lines, grid, dout, before):
        launch.run()
    found = Gradients.of(lines, grid, dx)
    if lines.delta is None:
        dtime, dweight = _low_rank_gradients(lines, grid, dout, before, found, shared)
    else:
        dtime, dweight = lines.empty(*lines.x.shape), None
        gradient_launch(lines, grid, dout, before, found, dtime, shared, 0, lines.K).run()
    dA, dbias, dskip = (rows.sum((0, 1)) for rows in found.dparameters.split([N, 1, 1], 3))
    return dtime, found.dnumbers.sum(0), dweight, dA, dbias[:, 0], dskip[:, 0]


def _low_rank_gradients(
    lines: Lines, grid: Grid, dout: torch.Tensor, before: Before, found: Gradients, shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of low and weight; the time steps of one line at a time are in memory, and then their gradients."""
    (B, L, K, D), R = lines.x.shape, lines.rank
    dlow, dweight = lines.empty(B, L, K, R), lines.empty(K, D, R)
    for k in range(K):
        low, weight = lines.proj[:, :, k, :R].float().flatten(0, 1), lines.weight[k].float()
        delta = (low @ weight.T).view(B, L, 1, D)
        ddelta = delta if shared else torch.zeros_like(delta)  # of the tokens that the line does not visit
        given = lines._replace(delta=delta.expand(-1, -1, K, -1), weight=None)
        gradient_launch(given, grid, dout, before, found, ddelta.expand(-1, -1, K, -1), shared, k, 1).run()
        dlow[:, :, k] = (ddelta.view(B * L, D) @ weight).view(B, L, R)
        dweight[k] = ddelta.view(B * L, D).T @ low
    return dlow, dweight


# ---- ss2d -----------------------------------------------------------------------------------------------------------

def of_routes(x, proj, dt_weight, dt_bias, A, D, routes, permute: str) -> Lines:
    """A line a route, all over the same tokens."""
    x, proj = _readable(x).flatten(1, -2), _readable(proj).flatten(1, -2)
    (K, _), R, N = routes.shape, dt_weight.shape[2], A.shape[2]

    def every(p: torch.Tensor | None) -> torch.Tensor | None:
        return p if p is None else p.contiguous().expand(K, *p.shape[1:])

    x, proj = (t.expand(-1, -1, K, -1) for t in (x[:, :, None], proj.unflatten(2, (-1, R + 2 * N))))
    weight, bias, A, skip = map(every, (dt_weight, dt_bias, A.transpose(1, 2), D))
    return Lines(x, None, proj, weight, bias, A, skip, routes.contiguous(), permutes_all=permute == "all")


def _apart(tokens: torch.Tensor, K: int, merge: str) -> torch.Tensor:
    """A view (B, L, K, D) of what `merge` makes of the lines."""
    return tokens if merge == "stack" else tokens[:, :, None].expand(-1, -1, K, -1)


def ss2d(x, proj, dt_weight, dt_bias, A, D, routes, merge: str, permute: str) -> torch.Tensor:
    """The op without autograd: (B, L, D), or (B, L, K, D) for "stack", in float32."""
    lines = of_routes(x, proj, dt_weight, dt_bias, A, D, routes, permute)
    B, L, K, channels = lines.x.shape
    plan(routes, L, merge)  # raises what is wrong with them
    out = lines.empty(B, L, *(K,) * (merge == "stack"), channels)
    _forward(lines, _apart(out, K, merge), shared=merge == "sum")
    return out


def ss2d_backward(dout, x, proj, dt_weight, dt_bias, A, D, routes, merge: str, permute: str) -> list:
    """The gradients of x (B, L, D), proj, dt_weight, dt_bias, A and D, in float32. Deterministic."""
    lines = of_routes(x, proj, dt_weight, dt_bias, A, D, routes, permute)
    B, L, K, channels = lines.x.shape
    dx = lines.empty(B, L, channels)
    dout = _apart(dout.flatten(1, -3 if merge == "stack" else -2), K, merge)
    dlow, dnumbers, dweight, dA, dbias, dskip = _backward(
        lines, dout, None, _apart(dx, K, "sum"), shared=merge != "scatter"
    )
    dproj = torch.cat([dlow, dnumbers], 3)
    if proj.shape[-1] < dproj.shape[2:].numel():
        dproj = dproj.sum(2)
    parameters = (dt_weight, dweight), (dt_bias, dbias), (A, dA.transpose(1, 2)), (D, dskip)
    return [dx, dproj, *(
        grad if p is None or len(p) == K else grad.sum(0, keepdim=True) for p, grad in parameters
    )]


# ---- selective_scan -------------------------------------------------------------------------------------------------

def of_groups(u, delta, A, B, C, D, delta_bias, delta_softplus: bool, reverse: bool) -> Lines:
    """A line a group, over channels of its own."""
    def grouped(x: torch.Tensor | None, axis: int) -> torch.Tensor | None:
        return x if x is None else x.unflatten(axis, (B.shape[2], -1))

    u, delta = (grouped(_readable(x), 2) for x in (u, delta))
    A, skip, bias = (grouped(x, 0) for x in (A, D, delta_bias))
    bias, skip = (x if x is None else x.contiguous() for x in (bias, skip))
    return Lines(
        u, delta, torch.cat([B, C], 3), None, bias, A.transpose(1, 2).contiguous(), skip,
        softplus=delta_softplus, reverse=reverse,
    )


def selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without autograd: out (B, L, D) and the last state (B, D, N), in float32."""
    lines = of_groups(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    out = lines.empty(*lines.x.shape)
    state = _forward(lines, out, shared=False)
    return out.flatten(2), state.transpose(2, 3).flatten(1, 2).contiguous()


def selective_scan_backward(
    dout, dstate, u, delta, A, B, C, D, delta_bias, delta_softplus: bool, reverse: bool
) -> list[torch.Tensor | None]:
    """The gradients of u, delta, A, B, C, D and delta_bias, in float32. Deterministic."""
    lines = of_groups(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    if dout is None:
        dout = lines.zeros(1).expand(u.shape)
    if dstate is not None:
        dstate = dstate.unflatten(1, lines.x.shape[2:]).transpose(2, 3).contiguous()
    du = lines.empty(*lines.x.shape)
    ddelta, dnumbers, _, dA, dbias, dskip = _backward(
        lines, dout.unflatten(2, lines.x.shape[2:]), dstate, du, shared=False
    )
    dB, dC = (numbers.clone() for numbers in dnumbers.chunk(2, 3))
    return [du, ddelta, dA.transpose(1, 2), dB, dC, dskip, None if delta_bias is None else dbias]


# ---- linear_scan ----------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["steps", "D", "blocks"])
def linear_scan_kernel(
    a, b, h0, h, steps, D, blocks,
    LATE: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """h (B, steps, D) of one image, from h0 (B, D) or zeros. If LATE, each step decays by the a of the one before."""
    program = tl.program_id(0)
    d = channels_of(program % blocks, CHANNELS)
    image = (program // blocks).to(tl.int64)
    incoming = tl.zeros([CHANNELS], tl.float32)
    if h0 is not None:
        incoming += tl.load(h0 + image * D + d, mask=d < D, other=0.0)
    for first in range(0, steps, STEPS):
        t = first + tl.arange(0, STEPS)
        token = steps - 1 - t if REVERSE else t
        mask = (t < steps)[:, None] & (d < D)[None, :]
        place = image * steps * D + (token * D)[:, None] + d[None, :]
        if LATE:
            before = place + D if REVERSE else place - D
            decay = tl.load(a + before, mask=mask & (t > 0)[:, None], other=0.0)
        else:
            decay = tl.load(a + place, mask=mask, other=0.0)
        decay, state = tl.associative_scan((decay, tl.load(b + place, mask=mask, other=0.0)), 0, after)
        state += decay * incoming[None, :]
        tl.store(h + place, state, mask=mask)
        incoming = row(state, STEPS - 1)


def linear_scan_launch(a, b, h0, h, late: bool, reverse: bool) -> Launch:
    """All contiguous, in float32. One chunk: the zoo has no use of it at sizes that would need several."""
    B, steps, D = b.shape
    blocks = triton.cdiv(D, CHANNELS)
    return _launch(linear_scan_kernel, B * blocks, dict(
        a=a, b=b, h0=h0, h=h, steps=steps, D=D, blocks=blocks, LATE=late, REVERSE=reverse, STEPS=STEPS,
        CHANNELS=CHANNELS,
    ))


def _linear_scan(a, b, h0, late: bool, reverse: bool) -> torch.Tensor:
    a, b, h0 = (x if x is None else x.contiguous() for x in (a, b, h0))
    h = torch.empty_like(b)
    linear_scan_launch(a, b, h0, h, late, reverse).run()
    return h


def linear_scan(a: torch.Tensor, b: torch.Tensor, h0: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """a, b (B, L, D), h0 (B, D), of float32."""
    return _linear_scan(a, b, h0, False, reverse)


def linear_scan_backward(
    dh: torch.Tensor, a: torch.Tensor, b: torch.Tensor, h0: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of a, b and h0.

    That of b is a scan too, g_t = dh_t + a_{t+1} g_{t+1}, and that of a_t is g_t h_{t-1}.
    """
    h, db = _linear_scan(a, b, h0, False, reverse), _linear_scan(a, dh, None, True, not reverse)
    earlier, later = shift(reverse)
    start = -1 if reverse else 0
    da = torch.zeros_like(db)
    torch.mul(db[:, later], h[:, earlier], out=da[:, later])
    if h0 is None:
        return da, db, None
    da[:, start] = db[:, start] * h0
    return da, db, db[:, start] * a[:, start]
