"""The diagonal state-space recurrence h_t = a_t h_{t-1} + b_t, alone, as Mamba's selective scan, and over 2-D maps.

Papers: Mamba (Gu and Dao, arXiv 2312.00752: the selective scan), VMamba (Liu et al., arXiv 2401.10166: SS2D, the
cross scan), Vision Mamba (Zhu et al., arXiv 2401.09417: both directions), LocalMamba (Huang et al., arXiv 2403.09338:
windows), EfficientVMamba (Pei et al., arXiv 2403.09977: atrous), PlainMamba (Yang et al., arXiv 2403.17695: snake).
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from .._dispatch import eager_inference, exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating, own_types
from . import portable, reference
from .limits import refuses, refuses_lines
from .routes import MERGES, table

__all__ = ["linear_scan", "scan_routes", "selective_scan", "ss2d"]


# ---- The public functions -------------------------------------------------------------------------------------------

def linear_scan(
    a: torch.Tensor, b: torch.Tensor, *, reverse: bool = False, h0: torch.Tensor | None = None
) -> torch.Tensor:
    """h_t = a_t h_{t-1} + b_t along axis 1, elementwise. Differentiable once, in a, b and h0.

    Args:
        a, b: (B, L, ...), one shape, dtype and device.
        reverse: h_t = a_t h_{t+1} + b_t.
        h0: (B, ...), the state before the first step; zeros by default.

    Returns:
        (B, L, ...) in b's dtype; the state is carried in float32 at least.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a shape or device that does not fit; the message names it.
    """
    a, b = floating(a, "a"), floating(b, "b")
    h0 = h0 if h0 is None else floating(h0, "h0")
    if b.ndim < 2 or 0 in b.shape[1:]:
        raise ValueError(f"b must be (B, L, ...) with at least one step, got shape {tuple(b.shape)}")
    _fits("a", a, b.shape, b, (b.dtype,))
    _fits("h0", h0, (b.shape[0], *b.shape[2:]), b, (b.dtype, torch.float32))
    if reference_chosen():
        return reference.linear_scan(a, b, h0, reverse)
    if exporting():
        wide = torch.promote_types(b.dtype, torch.float32)
        return portable.exportable_scan(a.to(wide), b.to(wide), h0, reverse).to(b.dtype)
    return torch.ops.visionbb.linear_scan(a, b, h0, reverse).to(b.dtype)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba's selective scan (S6) with mamba-ssm's arguments, on channels-last tokens.

    With dt = softplus(delta + delta_bias), for every channel and N states,

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = C_t . h_t + D u_t,    out = y silu(z).

    Differentiable once, in all tensors and through the last state.

    Args:
        u: (B, L, D), floating point.
        delta: (B, L, D), u's dtype.
        A: (D, N), real, u's dtype or float32, as all parameters; autocast leaves it alone.
        B, C: (B, L, N), or (B, L, G, N) for G groups of D / G channels that share them; u's dtype.
        D: (D,), the skip connection, or None.
        z: (B, L, D), u's dtype: the gate, or None.
        delta_bias: (D,) or None.
        delta_softplus: whether dt is a softplus at all.
        return_last_state: also return h of the last step.
        reverse: scan from the last token to the first.

    Returns:
        out (B, L, D) in u's dtype, or (out, state) with state (B, D, N) in float32 (float64 for float64 inputs).
        Recurrence, sums and gate are computed in that wider type.

    Raises:
        TypeError: dtypes differ or are not (real) floating point.
        ValueError: a shape or device that does not fit; the message names it.
    """
    u, delta, B, C = (floating(x, name) for x, name in ((u, "u"), (delta, "delta"), (B, "B"), (C, "C")))
    z = z if z is None else floating(z, "z")
    A = floating(A, "A", autocast=False)
    if u.ndim != 3 or 0 in u.shape[1:]:
        raise ValueError(f"u must be (B, L, D) with at least one step and channel, got shape {tuple(u.shape)}")
    if A.ndim != 2 or A.shape[0] != u.shape[2] or A.shape[1] == 0:
        raise ValueError(f"A must be (D, N) = ({u.shape[2]}, N) with N at least 1, got {tuple(A.shape)}")
    if B.ndim == 3:
        B = B[:, :, None]
    if C.ndim == 3:
        C = C[:, :, None]
    if B.ndim != 4 or B.shape[2] == 0 or u.shape[2] % B.shape[2]:
        raise ValueError(f"B must be (B, L, N) or (B, L, G, N), G a divisor of D = {u.shape[2]}, got {tuple(B.shape)}")
    shape = (*u.shape[:2], B.shape[2], A.shape[1])
    for name, x in (("B", B), ("C", C)):
        _fits(name, x, shape, u, (u.dtype,))
    for name, x in (("delta", delta), ("z", z)):
        _fits(name, x, u.shape, u, (u.dtype,))
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        _fits(name, x, A.shape if name == "A" else A.shape[:1], u, (u.dtype, torch.float32))
    args = (u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    if reference_chosen():
        out, state = reference.selective_scan(*args)
    elif exporting():
        out, state = portable.exportable_selective_scan(*args)
    else:
        out, state = torch.ops.visionbb.selective_scan(*args)
    if z is not None:
        out = out * F.silu(z.to(out.dtype))
    out = out.to(u.dtype)
    return (out, state) if return_last_state else out


def ss2d(
    x: torch.Tensor,
    proj: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    routes: torch.Tensor,
    *,
    merge: Literal["sum", "scatter", "stack"] = "sum",
    permute: Literal["all", "u"] = "all",
) -> torch.Tensor:
    """Selective scans of a map along K routes, merged (VMamba's SS2D, and what others made of it).

    Projections of tokens commute with their order, so that everything comes in raster order, and is read and written
    through the routes: the scanned copies of the papers' code never exist. Along route k, at token p,

        dt = softplus(dt_weight_k low_kp + dt_bias_k),    [low_kp | B_kp | C_kp] = proj_p,

    and the scan is `selective_scan`'s, with A_k and D_k. Differentiable once, in all floating-point tensors.

    Args:
        x: (B, H, W, D) or (B, L, D), floating point.
        proj: (B, H, W, K * (R + 2 N)) or (B, L, ...), or R + 2 N for one projection that all routes share; x's dtype.
        dt_weight: (K, D, R); as all parameters in x's dtype or float32, which autocast leaves alone, and with one
            set in place of K if the routes share it.
        dt_bias: (K, D) or None.
        A: (K, D, N), negative for a stable scan.
        D: (K, D) or None.
        routes: (K, steps) int32, on x's device, from `scan_routes` or own: entry t of a route is the token that its
            step t visits, -1 a token of zeros (whose projection is zero as well; it decays the state by its
            dt_bias), -2 a step that leaves the state alone.
        merge: "sum" adds up the routes, each of which visits every token once; "stack" keeps them apart; "scatter" is
            for routes that share out the tokens, so that one route visits each.
        permute: "u" lets the routes reorder x and the result alone, while dt, B and C stay in raster order, as
            PlainMamba's released models have it.

    Returns:
        Like x in shape, (B, H, W, K, D) or (B, L, K, D) for "stack"; in float32 (float64 for float64 inputs), for the
        norm that follows.

    Raises:
        TypeError: dtypes differ or are not what they must be.
        ValueError: a shape, device or name that does not fit, or routes that do not visit the tokens as `merge` says.
    """
    x, proj = floating(x, "x"), floating(proj, "proj")
    dt_weight, A = floating(dt_weight, "dt_weight", autocast=False), floating(A, "A", autocast=False)
    if x.ndim < 3 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, H, W, D) or (B, L, D) with at least one token, got shape {tuple(x.shape)}")
    if not isinstance(routes, torch.Tensor) or routes.dtype != torch.int32:
        raise TypeError(f"routes must be an int32 tensor, got {getattr(routes, 'dtype', type(routes).__name__)}")
    if routes.ndim != 2 or 0 in routes.shape:
        raise ValueError(f"routes must be (K, steps), got shape {tuple(routes.shape)}")
    if routes.device != x.device:
        raise ValueError(f"routes must be on x's device {x.device}, got {routes.device}")
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    if permute not in ("all", "u"):
        raise ValueError(f"permute must be 'all' or 'u', got {permute!r}")
    K, channels = routes.shape[0], x.shape[-1]
    parameters = (("dt_weight", dt_weight, 3), ("A", A, 3), ("dt_bias", dt_bias, 2), ("D", D, 2))
    for name, p, ndim in parameters:
        if p is None:
            continue
        if p.ndim != ndim or p.shape[0] not in (1, K) or p.shape[1] != channels or 0 in p.shape:
            last = {"dt_weight": ", R", "A": ", N"}.get(name, "")
            raise ValueError(f"{name} must be (K or 1, D{last}), K = {K}, D = {channels}, got {tuple(p.shape)}")
        _fits(name, p, p.shape, x, (x.dtype, torch.float32))
    width = dt_weight.shape[2] + 2 * A.shape[2]
    _fits("proj", proj, (*x.shape[:-1], width if proj.shape[-1] == width else K * width), x, (x.dtype,))
    tokens = x.shape[1:-1].numel()
    if permute == "u" and routes.shape[1] != tokens:
        raise ValueError(f"permute='u' needs routes of {tokens} steps, one a token, got {routes.shape[1]}")
    args = (x, proj, dt_weight, dt_bias, A, D, routes, merge, permute)
    if reference_chosen():
        return reference.ss2d(*args)
    if exporting():
        return portable.exportable_ss2d(*args)
    return torch.ops.visionbb.ss2d(*args)


def scan_routes(
    routes: str | Sequence[str], H: int, W: int, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """The table of one or several traversals of a map, for `ss2d`.

    Args:
        routes: one or several of these names, each a route or a set of them: "cross" (row, column, row_reversed,
            column_reversed; VMamba), "bidirectional" (row, row_reversed), "snake" (snake_row and snake_column, each
            followed by its reverse; PlainMamba), "atrous<step>" (a route for each of step * step sub-grids, row-major
            and column-major in turns, for merge="scatter"; EfficientVMamba), "row" and "column" (row-major and
            column-major), "snake_row" and "snake_column" (there and back), "window<side>" (windows in row-major
            order, and so the tokens inside; LocalMamba) and "window<side>_column". Single routes also take
            "_reversed".
        H, W: sides of the map. Where windows or steps do not divide them, larger ones included, the map is padded on
            the right and below; the ends of shorter routes are padded too (-1, see `ss2d`).
        device: of the table. Tables are kept and returned again: do not write to them.

    Returns:
        (K, steps) int32.

    Raises:
        ValueError: an unknown name, or a side or a step below 1.
    """
    names = (routes,) if isinstance(routes, str) else tuple(routes)
    return (_kept_table if eager_inference() else table)(names, H, W, device)


@functools.lru_cache(maxsize=256)
def _kept_table(names: tuple[str, ...], H: int, W: int, device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd takes no other tensors
        return table(names, H, W, device)


# ---- Argument checks ------------------------------------------------------------------------------------------------

def _fits(name: str, x: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor, dtypes) -> None:
    if x is None:
        return
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device} of the tokens, got {x.device}")


# ---- Registration: custom ops, fakes, autograd, FLOPs ---------------------------------------------------------------

@torch.library.custom_op(
    "visionbb::scan_routes", mutates_args=(), schema="(str[] routes, SymInt H, SymInt W, *, Device device) -> Tensor"
)
def _scan_routes(routes, H, W, device):
    """`scan_routes` for scripted modules."""
    return table(routes, H, W, device)


_scan_routes.register_fake(lambda routes, H, W, device: table(routes, H, W, device))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _path(reasons: Callable[..., str | None], x: torch.Tensor, *args):
    if resolve(reasons, x, *args) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


def _register(name: str, tensors: str, options: str, results: int, forward, fake, backward) -> None:
    """Registers `visionbb::<name>(tensors, options)` with `results` outputs, and its backward.

    `backward(*douts, *tensors, *options)` returns the gradients of the floating-point tensors, which come first; an
    output that nobody used has None for a dout.
    """
    n, grads = tensors.count(",") + 1, tensors.count("Tensor") - tensors.count("routes")
    op = torch.library.custom_op(
        f"visionbb::{name}", mutates_args=(), schema=f"({tensors}, {options}) -> ({', '.join(['Tensor'] * results)})"
    )(forward)
    op.register_fake(fake)
    douts = ", ".join(f"Tensor? dout{i}" for i in range(results))

    @torch.library.custom_op(
        f"visionbb::{name}_backward", mutates_args=(),
        schema=f"({douts}, {tensors}, {options}) -> ({', '.join(['Tensor'] * grads)})",
    )
    def backward_op(*args):
        inputs = args[results : results + grads]
        with own_types(inputs[0]):
            found = backward(*args)
        return tuple(
            inputs[0].new_empty(0) if x is None else grad.reshape(x.shape).to(x.dtype).contiguous()
            for grad, x in zip(found, inputs, strict=True)
        )

    @backward_op.register_fake
    def _(*args):
        inputs = args[results : results + grads]
        return tuple(inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:n])
        ctx.options = inputs[n:]
        ctx.set_materialize_grads(False)

    def run_backward(ctx, *douts):
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them when read
        if all(dout is None for dout in douts):
            return (None,) * (n + len(ctx.options))
        found = backward_op(*douts, *saved, *ctx.options)
        found = [None if x is None else grad for x, grad in zip(saved, found, strict=False)]
        return *found, *[None] * (n - grads + len(ctx.options))

    op.register_autograd(run_backward, setup_context=setup_context)


def _flat(x: torch.Tensor | None, wide: torch.dtype, keep: int) -> torch.Tensor | None:
    return x if x is None else x.to(wide).reshape(*x.shape[:keep], -1)


def _linear_scan(a, b, h0, reverse):
    wide, path = _wide(b), _path(refuses, b)
    with own_types(b):
        return path.linear_scan(_flat(a, wide, 2), _flat(b, wide, 2), _flat(h0, wide, 1), reverse).view(b.shape)


def _linear_scan_backward(dh, a, b, h0, reverse):
    wide, path = _wide(b), _path(refuses, b)
    a, b, h0, dh = _flat(a, wide, 2), _flat(b, wide, 2), _flat(h0, wide, 1), _flat(dh, wide, 2)
    return path.linear_scan_backward(dh, a, b, h0, reverse)


_register(
    "linear_scan", "Tensor a, Tensor b, Tensor? h0", "bool reverse", 1,
    _linear_scan,
    lambda a, b, h0, reverse: b.new_empty(b.shape, dtype=_wide(b)),
    _linear_scan_backward,
)


def _sequence_path(u, delta, A, B, *_):
    return _path(refuses_lines, u, B.shape[2], u.shape[1], A.shape[1], 0)


def _selective_scan(*args):
    with own_types(args[0]):
        return _sequence_path(*args).selective_scan(*args)


def _selective_scan_backward(dout, dstate, *args):
    return _sequence_path(*args).selective_scan_backward(dout, dstate, *args)


def _selective_scan_fake(u, delta, A, *_):
    return u.new_empty(u.shape, dtype=_wide(u)), u.new_empty(u.shape[0], *A.shape, dtype=_wide(u))


_register(
    "selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias",
    "bool delta_softplus, bool reverse", 2,
    _selective_scan, _selective_scan_fake, _selective_scan_backward,
)


def _ss2d_shape(x, routes, merge: str) -> tuple[int, ...]:
    return (*x.shape[:-1], len(routes), x.shape[-1]) if merge == "stack" else x.shape


def _map_path(x, proj, dt_weight, dt_bias, A, D, routes, *_):
    return _path(refuses_lines, x, *routes.shape, A.shape[2], dt_weight.shape[2])


def _ss2d(x, proj, dt_weight, dt_bias, A, D, routes, merge, permute):
    args = x, proj, dt_weight, dt_bias, A, D, routes, merge, permute
    with own_types(x):
        out = _map_path(*args).ss2d(*args)
    return out.view(_ss2d_shape(x, routes, merge))


def _ss2d_backward(dout, *args):
    return _map_path(*args).ss2d_backward(dout, *args)


def _ss2d_fake(x, proj, dt_weight, dt_bias, A, D, routes, merge, permute):
    return x.new_empty(_ss2d_shape(x, routes, merge), dtype=_wide(x))


_register(
    "ss2d",
    "Tensor x, Tensor proj, Tensor dt_weight, Tensor? dt_bias, Tensor A, Tensor? D, Tensor routes",
    "str merge, str permute", 1,
    _ss2d, _ss2d_fake, _ss2d_backward,
)


# The convention of the papers, in multiply-adds: 9 a state, for the exponential, the recurrence and the products around
# it; one a channel for D; and what the time steps' projection has, once for routes that share its weights. A backward
# pass counts twice its forward pass.

def _selective_scan_flops(u, delta, A, B, C, D, *_, out_shape=None):
    batch, length, channels = u
    return 2 * batch * length * channels * (9 * A[1] + (D is not None))


def _ss2d_flops(x, proj, dt_weight, dt_bias, A, D, routes, *_, out_shape=None):
    scans = routes[0] * (9 * A[2] + (D is not None))
    return 2 * x[0] * routes[1] * x[-1] * (scans + dt_weight[0] * dt_weight[2])


register_flops(
    torch.ops.visionbb.linear_scan, lambda a, b, *_, out_shape=None, **kw: 2 * math.prod(b)
)
register_flops(
    torch.ops.visionbb.linear_scan_backward, lambda dh, a, b, *_, out_shape=None, **kw: 4 * math.prod(b)
)
register_flops(torch.ops.visionbb.selective_scan, _selective_scan_flops)
register_flops(
    torch.ops.visionbb.selective_scan_backward,
    lambda dout, dstate, *args, out_shape=None, **kw: 2 * _selective_scan_flops(*args),
)
register_flops(torch.ops.visionbb.ss2d, _ss2d_flops)
register_flops(
    torch.ops.visionbb.ss2d_backward, lambda dout, *args, out_shape=None, **kw: 2 * _ss2d_flops(*args)
)
