"""The scans in plain PyTorch, forward and backward, on channels-last tokens.

All of them are the recurrence h_t = a_t h_{t-1} + b_t over (rows, channels) slabs: with N states, N recurrences share
the time steps, one by one or, forward and of small maps, several side by side. A slab is a few images of one route,
small enough for the caches, and every slab reuses the buffers of the one before. Rows and columns of a map, from any
corner, are scanned where they lie; other routes are gathered and put back.

A long recurrence goes in two levels: many runs side by side, then the states that each run starts from.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .routes import NEUTRAL, Direction, Layout, Route, plan

LOG2E = math.log2(math.e)
SLAB = 320_000  # values of a buffer at most, or one image: more are no faster by the call, fewer no nearer in a cache


# ---- The recurrence -------------------------------------------------------------------------------------------------

class Recurrence:
    """Buffers (n, rows, D) for a and b, and h_t = a_t h_{t-1} + b_t over them in place.

    `steps_a` and `steps_b` are their views (T, n, runs, D), which hold the neutral rows behind `rows` too.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, n: int, rows: int, D: int, layout: Layout):
        self.layout, self.rows = layout, rows
        self.all_a, self.all_b = (x[: n * layout.rows * D].view(n, layout.rows, D) for x in (a, b))
        self.a, self.b = self.all_a[:, :rows], self.all_b[:, :rows]
        strides = layout.step * D, layout.rows * D, layout.run * D, 1
        self.steps_a, self.steps_b = (
            x.as_strided((layout.T, n, layout.runs, D), strides, x.storage_offset()) for x in (self.all_a, self.all_b)
        )
        self._each_a, self._each_b = self.steps_a.unbind(), self.steps_b.unbind()

    def run(self, back: Direction) -> None:
        """Turns b into h. Overwrites a."""
        back_t, back_i = back
        if self.rows < self.layout.rows:
            self.all_a[:, self.rows :] = 1
            self.all_b[:, self.rows :] = 0
        a, b = (x[::-1] if back_t else x for x in (self._each_a, self._each_b))
        several = self.layout.runs > 1
        for t in range(1, len(b)):
            b[t].addcmul_(a[t], b[t - 1])
            if several:
                a[t].mul_(a[t - 1])
        if several:
            # The runs began with zeros, and a is now the decay since then: add what the runs before leave behind.
            left = b[-1].transpose(0, 1).clone(memory_format=torch.contiguous_format)
            states, decays = left.unbind(), a[-1].unbind(1)
            if back_i:
                states, decays = states[::-1], decays[::-1]
            for i in range(1, len(states)):
                states[i].addcmul_(decays[i], states[i - 1])
            earlier, later = shift(back_i)
            self.steps_b[:, :, later].addcmul_(self.steps_a[:, :, later], left[earlier].transpose(0, 1))

    def neighbours(self, x: torch.Tensor, y: torch.Tensor, back: Direction) -> Iterator[tuple]:
        """Of (T, n, runs, D): views of x at steps t and of y at t - 1, which together are all steps but the first."""
        (earlier_t, later_t), (earlier_i, later_i) = map(shift, back)
        if self.layout.T > 1:
            yield x[later_t], y[earlier_t]
        if self.layout.runs > 1:
            first, last = (-1, 0) if back[0] else (0, -1)
            yield x[first][:, later_i], y[last][:, earlier_i]

    def first(self, x: torch.Tensor, back: Direction) -> torch.Tensor:
        """The first step of x (T, n, runs, D)."""
        return x[-int(back[0])][:, -int(back[1])]


def shift(back: bool) -> tuple[slice, slice]:
    """All but the last, and all but the first, of what is counted from its end if `back`."""
    slices = slice(None, -1), slice(1, None)
    return slices[::-1] if back else slices


def opposite(back: Direction) -> Direction:
    return not back[0], not back[1]


class Scratch:
    """Buffers by name, made once a call: fresh memory costs a page fault every 4 KB."""

    def __init__(self, like: torch.Tensor, D: int):
        self.like, self.D, self.flat, self.recurrences = like, D, {}, {}

    def _flat(self, name: str, size: int) -> torch.Tensor:
        if name not in self.flat or len(self.flat[name]) < size:
            self.flat[name] = self.like.new_empty(size)
        return self.flat[name]

    def __call__(self, name: str, n: int, rows: int) -> torch.Tensor:
        """A buffer (n, rows, D)."""
        return self._flat(name, n * rows * self.D)[: n * rows * self.D].view(n, rows, self.D)

    def recurrence(self, name: str, n: int, rows: int, layout: Layout, states: int = 1) -> Recurrence:
        """Over buffers (n, rows, states * D)."""
        key = name, n, rows, layout, states
        if key not in self.recurrences:
            D = states * self.D
            a, b = (self._flat(f"{name} {part}", n * layout.rows * D) for part in "ab")
            self.recurrences[key] = Recurrence(a, b, n, rows, D, layout)
        return self.recurrences[key]


# ---- One slab of the selective scan ---------------------------------------------------------------------------------

class Slab(NamedTuple):
    """Some images of one route, its steps in rows of a buffer."""

    x: torch.Tensor  # (n, rows, D)
    dt: torch.Tensor  # (n, rows, D)
    A: torch.Tensor  # (N, D)
    B: torch.Tensor  # (n, rows, N)
    C: torch.Tensor  # (n, rows, N)
    D: torch.Tensor | None  # (D,)
    layout: Layout
    back: Direction

    @property
    def last(self) -> int:
        """The row of the last step of a line."""
        return 0 if self.back[1] else -1


def _softplus(z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """softplus(z / LOG2E) into `out`, which may be z: of a CPU's exponentials, that of base 2 is the fast one."""
    if bool(z.amax() < 120):  # else the power overflows
        return torch.exp2(z, out=out).log1p_()
    return out.copy_(F.softplus(z / LOG2E))


def _decay(slab: Slab, n: int, into: torch.Tensor) -> None:
    torch.mul(slab.dt, slab.A[n] * LOG2E, out=into)
    into.exp2_()


def add_output(slab: Slab, y: torch.Tensor, scratch: Scratch, state: torch.Tensor | None = None) -> None:
    """y (n, rows, D) += C . h + D x; `state` (n, D, N), if given, becomes the last one.

    As many states as a buffer holds go side by side: of a small map, a call costs more than what it computes.
    """
    if slab.D is not None:
        y.addcmul_(slab.x, slab.D)
    n, rows, D = slab.x.shape
    dt, dtx = slab.dt[:, :, None], torch.mul(slab.dt, slab.x, out=scratch("dtx", n, rows))[:, :, None]
    A, B, C = slab.A * LOG2E, slab.B[..., None], slab.C[..., None]
    for group in parts(len(A), slab.x.numel()):
        states = len(A[group])
        scan = scratch.recurrence("scan", n, rows, slab.layout, states)
        a, b = (x.view(n, rows, states, D) for x in (scan.a, scan.b))
        torch.mul(dt, A[group], out=a)
        a.exp2_()
        torch.mul(dtx, B[:, :, group], out=b)
        scan.run(slab.back)
        for i in range(states):
            y.addcmul_(b[:, :, i], C[:, :, group.start + i])
        if state is not None:
            state[..., group] = b[:, slab.last].transpose(1, 2)


def gradients(
    slab: Slab,
    dy: torch.Tensor,
    dstate: torch.Tensor | None,
    scratch: Scratch,
    dA: torch.Tensor,
    dB: torch.Tensor,
    dC: torch.Tensor,
    dD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and dt (in buffers); those of the rest are written (B, C) or added (A, D) to their tensors.

    With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}. The scan runs over s_t = a_t g_t, which has the
    form of the forward pass; h is computed once more.
    """
    n, rows, _ = slab.x.shape
    scan, adjoint = (scratch.recurrence(name, n, rows, slab.layout) for name in ("scan", "adjoint"))
    dtx = torch.mul(slab.dt, slab.x, out=scratch("dtx", n, rows))
    gB, ddt = scratch("gB", n, rows).zero_(), scratch("ddt", n, rows).zero_()
    ahead = opposite(slab.back)
    for i in range(len(slab.A)):
        B, C = slab.B[..., i : i + 1], slab.C[..., i : i + 1]
        _decay(slab, i, scan.a)
        adjoint.a.copy_(scan.a)
        torch.mul(dtx, B, out=scan.b)
        scan.run(slab.back)
        dC[..., i] = torch.mul(dy, scan.b, out=scan.a).sum(-1)

        g = torch.mul(dy, C, out=scan.a)
        if dstate is not None:
            g[:, slab.last] += dstate[..., i]
        torch.mul(adjoint.a, g, out=adjoint.b)
        adjoint.run(ahead)
        for s, g_before in scan.neighbours(adjoint.steps_b, scan.steps_a, slab.back):
            g_before.add_(s)
        gB.addcmul_(g, B)
        dB[..., i] = g.mul_(dtx).sum(-1)

        # s_t h_{t-1} is the gradient of the exponent dt A.
        for s, h_before in scan.neighbours(adjoint.steps_b, scan.steps_b, slab.back):
            s.mul_(h_before)
        scan.first(adjoint.steps_b, slab.back).zero_()
        ddt.addcmul_(adjoint.b, slab.A[i])
        dA[i] += adjoint.b.mul_(slab.dt).sum((0, 1))
    ddt.addcmul_(gB, slab.x)
    dx = gB.mul_(slab.dt)
    if slab.D is not None:
        dx.addcmul_(dy, slab.D)
        dD += torch.mul(dy, slab.x, out=dtx).sum((0, 1))
    return dx, ddt


def parts(count: int, size: int) -> Iterator[slice]:
    """Slices of images, or of states, that have `size` values of a buffer each."""
    n = max(1, SLAB // size)
    return (slice(i, i + n) for i in range(0, count, n))


# ---- ss2d -----------------------------------------------------------------------------------------------------------

class _Map:
    """The tensors of `ss2d` in one wide type, and its slabs."""

    def __init__(self, x, proj, dt_weight, dt_bias, A, D, routes, merge: str, permute: str):
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.x, self.proj = x.flatten(1, -2), proj.flatten(1, -2)
        self.routes = plan(routes, self.x.shape[1], merge)
        self.K, self.D, self.R, self.N = len(routes), x.shape[-1], dt_weight.shape[2], A.shape[2]
        self.whole, self.moves_all = merge != "scatter", permute == "all"
        self.weight = dt_weight.to(self.wide) * LOG2E
        bias = dt_weight.new_zeros(1, self.D) if dt_bias is None else dt_bias
        self.bias = bias.to(self.wide) * LOG2E
        self.A = A.to(self.wide).transpose(1, 2).contiguous()
        self.skip = None if D is None else D.to(self.wide)
        self.scratch = Scratch(x.new_empty(0, dtype=self.wide), self.D)

    def parts(self) -> Iterator[slice]:
        return parts(len(self.x), len(self.routes[0].index) * self.D)

    def columns(self, k: int) -> slice:
        """Of route k in the projection."""
        width = self.R + 2 * self.N
        k = k if self.proj.shape[2] > width else 0
        return slice(k * width, (k + 1) * width)

    def slab(
        self, k: int, x: torch.Tensor, proj: torch.Tensor, into: str = "z"
    ) -> tuple[Slab, torch.Tensor, torch.Tensor]:
        """Route k of x (n, L, D), proj (n, L, *); also its low-rank time steps, and those before the softplus.

        The time steps go `into` a buffer; those before the softplus are overwritten if that is theirs, "z".
        """
        route, columns = self.routes[k], proj[..., self.columns(k)]
        x, columns = self.follow(x, route), self.follow(columns, route) if self.moves_all else columns
        low, B, C = columns.split([self.R, self.N, self.N], 2)
        n, rows, _ = x.shape
        z = self.scratch("z", n, rows)
        weight, bias = self.weight[k % len(self.weight)], self.bias[k % len(self.bias)]
        torch.addmm(bias, low.reshape(n * rows, self.R), weight.T, out=z.view(n * rows, self.D))
        if len(route.neutral):
            z[:, route.neutral] = -1e4  # a time step of zero
        dt = _softplus(z, self.scratch(into, n, rows))
        layout, back = (route.lattice, route.back) if self.in_place(route) else (None, (False, False))
        if layout is None or layout.runs == 1:
            layout = Layout.line(rows, n * self.D)
        skip = None if self.skip is None else self.skip[k % len(self.skip)]
        return Slab(x, dt, self.A[k % len(self.A)], B, C, skip, layout, back), low, z

    def follow(self, tokens: torch.Tensor, route: Route) -> torch.Tensor:
        """(n, L, *) to (n, steps, *), zeros at pads."""
        if self.in_place(route):
            return tokens
        rows = tokens.index_select(1, route.index)
        return rows.index_fill_(1, route.pads, 0) if len(route.pads) else rows

    def in_place(self, route: Route) -> bool:
        return route.lattice is not None and self.moves_all

    def put(self, rows: torch.Tensor, route: Route, onto: torch.Tensor) -> None:
        """Adds (n, steps, *) to the tokens (n, L, *) that they visit."""
        if self.in_place(route):
            onto.add_(rows)
        elif self.whole:
            onto.add_(rows.index_select(1, route.steps))
        else:  # no other route comes here
            onto.index_copy_(1, route.tokens, rows.index_select(1, route.steps))


def ss2d(x, proj, dt_weight, dt_bias, A, D, routes, merge: str, permute: str) -> torch.Tensor:
    """The op without autograd: (B, L, D), or (B, L, K, D) for "stack", in float32 at least."""
    m = _Map(x, proj, dt_weight, dt_bias, A, D, routes, merge, permute)
    B, L, _ = m.x.shape
    out = m.x.new_empty(B, L, *(m.K,) * (merge == "stack"), m.D, dtype=m.wide)
    for part in m.parts():
        x, proj = m.x[part].to(m.wide), m.proj[part].to(m.wide)
        # The skip connections of all routes at once, where every token is on all routes.
        if m.skip is None or merge == "scatter":
            out[part] = 0
        elif merge == "sum":
            torch.mul(x, m.skip.expand(m.K, -1).sum(0), out=out[part])
        else:
            torch.mul(x[:, :, None], m.skip.expand(m.K, -1), out=out[part])
        for k, route in enumerate(m.routes):
            slab, _, _ = m.slab(k, x, proj)
            if merge != "scatter":
                slab = slab._replace(D=None)
            y = out[part, :, k] if merge == "stack" else out[part]
            if m.in_place(route):
                add_output(slab, y, m.scratch)
            else:
                rows = m.scratch("y", *slab.x.shape[:2]).zero_()
                add_output(slab, rows, m.scratch)
                m.put(rows, route, y)
    return out


def ss2d_backward(dout, x, proj, dt_weight, dt_bias, A, D, routes, merge: str, permute: str) -> list[torch.Tensor]:
    """The gradients of x (B, L, D), proj, dt_weight, dt_bias, A and D, as wide as the sums they are."""
    m = _Map(x, proj, dt_weight, dt_bias, A, D, routes, merge, permute)
    dx, dproj = (torch.zeros_like(tokens, dtype=m.wide) for tokens in (m.x, m.proj))
    dweight, dbias, dA = (torch.zeros_like(p) for p in (m.weight, m.bias, m.A))
    dD = None if m.skip is None else torch.zeros_like(m.skip)
    dout = dout.flatten(1, -3 if merge == "stack" else -2)
    for part in m.parts():
        x, proj, dy = m.x[part].to(m.wide), m.proj[part].to(m.wide), dout[part].to(m.wide)
        for k, route in enumerate(m.routes):
            slab, low, z = m.slab(k, x, proj, into="dt")
            n, rows, _ = slab.x.shape
            drows = low.new_empty(n, rows, m.R + 2 * m.N)
            dlow, dB, dC = drows.split([m.R, m.N, m.N], 2)
            own_dy = dy[:, :, k] if merge == "stack" else dy
            if not m.in_place(route):
                own_dy = own_dy.index_select(1, route.index).index_fill_(1, route.pads, 0)
            own_dD = None if dD is None else dD[k % len(dD)]
            own_dx, ddt = gradients(slab, own_dy, None, m.scratch, dA[k % len(dA)], dB, dC, own_dD)
            dz = ddt.mul_(z.mul_(1 / LOG2E).sigmoid_()).view(n * rows, m.D)
            dlow.copy_(ddt @ (m.weight[k % len(m.weight)] / LOG2E))
            dweight[k % len(dweight)].addmm_(dz.T, low.reshape(n * rows, m.R))
            dbias[k % len(dbias)] += dz.sum(0)
            m.put(own_dx, route, dx[part])
            columns = dproj[part, :, m.columns(k)]
            if m.moves_all:
                m.put(drows, route, columns)
            else:
                columns.add_(drows)
    return [dx, dproj, dweight, dbias, dA.transpose(1, 2), dD]


# ---- selective_scan -------------------------------------------------------------------------------------------------

class _Sequence:
    """The tensors of `selective_scan` in one wide type, and its slabs: the channels that share B and C."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, delta_softplus: bool, reverse: bool):
        self.wide = torch.promote_types(u.dtype, torch.float32)
        self.u, self.delta, self.B, self.C = u, delta, B, C
        self.softplus, self.back, self.width = delta_softplus, (reverse, reverse), u.shape[2] // B.shape[2]
        self.A = A.to(self.wide).T.contiguous()
        self.skip = None if D is None else D.to(self.wide)
        self.bias = A.new_zeros(len(A), dtype=self.wide) if delta_bias is None else delta_bias.to(self.wide)
        self.scratch = Scratch(u.new_empty(0, dtype=self.wide), self.width)

    def slabs(self) -> Iterator[tuple[slice, int, slice, Slab, torch.Tensor]]:
        """(images, group, its channels, slab, the time steps before the softplus)."""
        unit = LOG2E if self.softplus else 1.0
        for part in parts(len(self.u), self.u.shape[1] * self.width):
            for group in range(self.B.shape[2]):
                own = slice(group * self.width, (group + 1) * self.width)
                x, delta = (t[part, :, own].to(self.wide) for t in (self.u, self.delta))
                B, C = (t[part, :, group].to(self.wide) for t in (self.B, self.C))
                z = self.scratch("z", *x.shape[:2])
                torch.add(self.bias[own] * unit, delta, alpha=unit, out=z)
                dt = _softplus(z, self.scratch("dt", *x.shape[:2])) if self.softplus else z
                skip = None if self.skip is None else self.skip[own]
                layout = Layout.line(x.shape[1], x.shape[0] * self.width)
                yield part, group, own, Slab(x, dt, self.A[:, own], B, C, skip, layout, self.back), z


def selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without autograd: out (B, L, D) and the last state (B, D, N), in float32 at least."""
    sequence = _Sequence(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    out = u.new_zeros(u.shape, dtype=sequence.wide)
    state = u.new_empty(len(u), *A.shape, dtype=sequence.wide)
    for part, _, own, slab, _ in sequence.slabs():
        add_output(slab, out[part, :, own], sequence.scratch, state[part, own])
    return out, state


def selective_scan_backward(
    dout, dstate, u, delta, A, B, C, D, delta_bias, delta_softplus: bool, reverse: bool
) -> list[torch.Tensor | None]:
    """The gradients of u, delta, A, B, C, D and delta_bias, as wide as the sums they are."""
    sequence = _Sequence(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    du, ddelta, dB, dC = (torch.empty(t.shape, dtype=sequence.wide, device=u.device) for t in (u, delta, B, C))
    dA, dbias = torch.zeros_like(sequence.A), torch.zeros_like(sequence.bias)
    dD = None if D is None else torch.zeros_like(sequence.skip)
    for part, group, own, slab, z in sequence.slabs():
        own_dD = None if dD is None else dD[own]
        own_dstate = None if dstate is None else dstate[part, own]
        dy = slab.x.new_zeros(1).expand_as(slab.x) if dout is None else dout[part, :, own].to(sequence.wide)
        own_du, ddt = gradients(
            slab, dy, own_dstate, sequence.scratch, dA[:, own], dB[part, :, group], dC[part, :, group], own_dD
        )
        if delta_softplus:
            ddt.mul_(z.mul_(1 / LOG2E).sigmoid_())
        du[part, :, own], ddelta[part, :, own] = own_du, ddt
        dbias[own] += ddt.sum((0, 1))
    return [du, ddelta, dA.T, dB, dC, dD, None if delta_bias is None else dbias]


# ---- linear_scan ----------------------------------------------------------------------------------------------------

def _recurrences(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, Scratch, Recurrence]]:
    """a, b (B, L, D) by images, in buffers."""
    scratch = Scratch(b, b.shape[2])
    for part in parts(len(b), b[0].numel()):
        n, L, D = b[part].shape
        scan = scratch.recurrence("scan", n, L, Layout.line(L, n * D))
        scan.a.copy_(a[part])
        scan.b.copy_(b[part])
        yield part, scratch, scan


def linear_scan(a: torch.Tensor, b: torch.Tensor, h0: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """a, b (B, L, D), h0 (B, D), of one wide type."""
    h = torch.empty_like(b)
    start = -1 if reverse else 0
    for part, _, scan in _recurrences(a, b):
        if h0 is not None:
            scan.b[:, start].addcmul_(scan.a[:, start], h0[part])
        scan.run((reverse, reverse))
        h[part] = scan.b
    return h


def linear_scan_backward(
    dh: torch.Tensor, a: torch.Tensor, b: torch.Tensor, h0: torch.Tensor | None, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of a, b and h0."""
    h = linear_scan(a, b, h0, reverse)
    da, db = torch.zeros_like(a), torch.empty_like(dh)
    dh0 = None if h0 is None else torch.empty_like(h0)
    earlier, later = shift(reverse)
    start = -1 if reverse else 0
    for part, _, scan in _recurrences(a, dh):
        scan.b.mul_(a[part])
        scan.run((not reverse, not reverse))  # s_t = a_t g_t, with g_t the gradient of h_t
        g = db[part].copy_(dh[part])
        g[:, earlier] += scan.b[:, later]
        torch.mul(g[:, later], h[part, earlier], out=da[part, later])
        if h0 is not None:
            da[part, start] = g[:, start] * h0[part]
            dh0[part] = scan.b[:, start]
    return da, db, dh0


# ---- In standard operators, for torch.export and ONNX ---------------------------------------------------------------

def exportable_scan(a: torch.Tensor, b: torch.Tensor, h0: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """`linear_scan` along axis 1 in a graph of log2(L) steps; L is static, the other sizes may be dynamic."""
    if reverse:
        a, b = a.flip(1), b.flip(1)
    if h0 is not None:
        b = torch.cat([(b[:, :1] + a[:, :1] * h0[:, None]), b[:, 1:]], 1)
    span, L = 1, b.shape[1]
    while span < L:  # step t has taken in `span` steps, and takes in those before them
        b = torch.cat([b[:, :span], b[:, span:] + a[:, span:] * b[:, :-span]], 1)
        a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], 1)
        span *= 2
    return b.flip(1) if reverse else b


def exportable_selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """`selective_scan`, likewise."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, dt = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    width = u.shape[2] // B.shape[2]
    B, C = (x.to(wide).repeat_interleave(width, 2) for x in (B, C))
    h = exportable_scan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B, None, reverse)
    y = (C * h).sum(-1)
    return y if D is None else y + D * u, h[:, 0 if reverse else -1]


def exportable_ss2d(x, proj, dt_weight, dt_bias, A, D, routes, merge: str, permute: str) -> torch.Tensor:
    """`ss2d`, likewise: all routes at once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    map_ = x.shape[1:-1]
    (K, steps), R, N = routes.shape, dt_weight.shape[2], A.shape[2]
    token, visits = routes.clamp(min=0).long().flatten(), (routes >= 0).flatten()[:, None]

    def follow(tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, K or 1, *) to (B, steps, K, *)."""
        tokens = tokens.expand(-1, -1, K, -1).flatten(1, 2)
        index = token * K + torch.arange(K, device=token.device).repeat_interleave(steps)
        return (tokens[:, index] * visits).unflatten(1, (K, steps)).transpose(1, 2)

    u = follow(x.to(wide).flatten(1, -2)[:, :, None])
    proj = proj.to(wide).flatten(1, -2).unflatten(2, (-1, R + 2 * N))
    low, B, C = (follow(proj) if permute == "all" else proj).split([R, N, N], 3)
    dt = torch.einsum("blkr,kdr->blkd", low.expand(-1, -1, K, -1), dt_weight.to(wide).expand(K, -1, -1))
    if dt_bias is not None:
        dt = dt + dt_bias
    dt = F.softplus(dt) * (routes != NEUTRAL).t()[..., None]
    h = exportable_scan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, :, None], None, False)
    y = (h * C[:, :, :, None]).sum(-1)
    if D is not None:
        y = y + D * u
    # Sorted by the tokens that they visit, the steps are in raster order; pads come first.
    y = y.transpose(1, 2)  # (B, K, steps, D)
    if merge == "scatter":
        back = routes.flatten().argsort()[-x[0, ..., 0].numel():]
        return y.flatten(1, 2)[:, back].unflatten(1, map_)
    back = routes.argsort(1)[:, -x[0, ..., 0].numel():] + steps * torch.arange(K, device=routes.device)[:, None]
    y = y.flatten(1, 2)[:, back.flatten()].unflatten(1, (K, -1))
    return (y.sum(1) if merge == "sum" else y.transpose(1, 2)).unflatten(1, map_)
