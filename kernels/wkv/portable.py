"""Bidirectional WKV in plain PyTorch: a numerator and a denominator, each summed up once from either end.

With x_i = k_i + i w, the sums up to a token are e^{-(t - 1) w} times those of e^{x_i} v_i and e^{x_i}, whatever the
token. Where decays are mild, as in trained models, running sums of these will do, relative to the largest key of a
channel (`_mild`). Otherwise they are kept relative to the running maximum r of x: a sum of terms e^{x_i - r_t} at most
1, which decays by e^{r_{t-1} - r_t} where the maximum grows. Nothing overflows, no rounding adds up.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..scan.portable import LOG2E, Recurrence, Scratch, parts, shift
from ..scan.routes import Layout

# ---- Decays of any size ---------------------------------------------------------------------------------------------

class Side(NamedTuple):
    """The sums over the tokens before (or behind) each token."""

    reverse: bool
    exponent: torch.Tensor  # (n, L, C): to base 2, of the states of the token before; -inf for the first token
    term: torch.Tensor  # (n, L, C) e^{x_i - r_i}
    decay: torch.Tensor  # (n, L, C) e^{r_{t-1} - r_t}; 0 for the first token
    states: torch.Tensor  # (2 n, L, C) numerators and denominators, the token itself included


def _recurrence(scratch: Scratch, n: int, L: int, C: int) -> Recurrence:
    return scratch.recurrence("sums", 2 * n, L, Layout.line(L, 2 * n * C))


def _side(w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reverse: bool, scratch: Scratch) -> Side:
    """w and k times LOG2E: of the exponentials of a CPU, that of base 2 is the fast one."""
    n, L, C = k.shape
    earlier, later = shift(reverse)
    position = torch.arange(L, device=k.device, dtype=k.dtype)[:, None]
    position = position.flip(0) if reverse else position
    x = k + position * w
    r = x.clone()
    steps = r.unbind(1)[:: -1 if reverse else 1]
    for before, here in itertools.pairwise(steps):
        torch.maximum(before, here, out=here)
    term = x.sub_(r).exp2_()
    decay = torch.zeros_like(r)
    torch.sub(r[:, earlier], r[:, later], out=decay[:, later]).exp2_()

    scan = _recurrence(scratch, n, L, C)
    scan.a[:n], scan.a[n:] = decay, decay
    torch.mul(term, v, out=scan.b[:n])
    scan.b[n:] = term
    scan.run((reverse, reverse))
    exponent = torch.full_like(r, float("-inf"))
    torch.sub(r[:, earlier], position[earlier] * w, out=exponent[:, later])
    return Side(reverse, exponent, term, decay, scan.b.clone())


class Sums(NamedTuple):
    sides: tuple[Side, Side]
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of either side and of the token itself, at most 1
    den: torch.Tensor  # (n, L, C)
    out: torch.Tensor  # (n, L, C)


def _sums(w, u, k, v, eps: float, scratch: Scratch) -> Sums:
    w, u, k = w * LOG2E, u * LOG2E, k * LOG2E
    sides = tuple(_side(w, k, v, reverse, scratch) for reverse in (False, True))
    exponents = sides[0].exponent, sides[1].exponent, k.add_(u)
    top = torch.maximum(torch.maximum(*exponents[:2]), exponents[2])
    weights = tuple(x.sub_(top).exp2_() for x in exponents)
    num, den = weights[2] * v, top.neg_().exp2_().mul_(eps).add_(weights[2])
    for side, weight in zip(sides, weights, strict=False):
        earlier, later = shift(side.reverse)
        for total, states in zip((num, den), side.states.chunk(2), strict=True):
            total[:, later].addcmul_(weight[:, later], states[:, earlier])
    return Sums(sides, weights, den, num.div_(den))


# ---- Mild decays ----------------------------------------------------------------------------------------------------

MILD = 40  # exponents to base 2: float32 holds all weights, and what it loses is below 2^-60 of a sum


def _is_mild(w: torch.Tensor, u: torch.Tensor, length: int) -> bool:
    return bool(torch.maximum(w.abs() * length, u.abs()).amax() * LOG2E < MILD)


def _accumulate(x: torch.Tensor, back: bool) -> None:
    """Running sums along the line that the runs of x (n, runs, T, C) make up, in place; from its end if `back`."""
    steps = x.unbind(2)[:: -1 if back else 1]
    for before, here in itertools.pairwise(steps):
        here.add_(before)
    left = steps[-1].clone()  # (n, runs, C)
    for before, here in itertools.pairwise(left.unbind(1)[:: -1 if back else 1]):
        here.add_(before)
    earlier, later = shift(back)
    x[:, later].add_(left[:, earlier, None])


def _mild(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """The op where `_is_mild`, w and u wide: all images share the positions' exponentials."""
    _, L, C = v.shape
    out, scratch = v.new_empty(v.shape), Scratch(w, C)
    position = torch.arange(L, device=w.device, dtype=w.dtype)[:, None] - L / 2  # around 0: the smallest exponents
    rise, fall = torch.exp(position * w), torch.exp(-position * w)
    step, own = torch.exp(w), torch.exp(u)
    sides = (False, rise, fall * step), (True, fall, rise * step)  # factors of a key, and of a sum of them
    T = max(1, round(L**0.5))
    runs = -(-L // T)
    for part in parts(len(v), 4 * L * C):  # that many buffers at a time
        values = v[part].to(w.dtype)
        n = len(values)
        key = scratch("key", n, L).copy_(k[part]).mul_(LOG2E)
        top = key.amax(1, keepdim=True)
        key.sub_(top).exp2_()
        product = torch.mul(key, values, out=scratch("product", n, L))
        num = torch.mul(product, own, out=scratch("num", n, L))
        den = torch.mul(key, own, out=scratch("den", n, L))
        if eps:
            den.add_(top.neg_().exp2_().mul_(eps))
        sums = scratch("sums", 2 * n, runs * T)
        for back, factor, weight in sides:
            torch.mul(product, factor, out=sums[:n, :L])
            torch.mul(key, factor, out=sums[n:, :L])
            sums[:, L:] = 0
            _accumulate(sums.unflatten(1, (runs, T)), back)
            earlier, later = shift(back)
            for total, found in ((num, sums[:n, :L]), (den, sums[n:, :L])):
                total[:, later].addcmul_(weight[later], found[:, earlier])
        torch.div(num, den, out=out[part])
    return out


# ---- The op ---------------------------------------------------------------------------------------------------------

def _images(k: torch.Tensor, v: torch.Tensor, wide: torch.dtype) -> Iterator[tuple]:
    for part in parts(len(k), k[0].numel()):
        yield part, k[part].to(wide), v[part].to(wide)


def bi_wkv(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """The op without autograd: k, v (B, L, C), out like v."""
    wide = torch.promote_types(v.dtype, torch.float32)
    w, u = w.to(wide), u.to(wide)
    if _is_mild(w, u, v.shape[1]):
        return _mild(w, u, k, v, eps)
    out, scratch = v.new_empty(v.shape), Scratch(w, v.shape[2])
    for part, keys, values in _images(k, v, wide):
        out[part] = _sums(w, u, keys, values, eps, scratch).out
    return out


def bi_wkv_backward(
    dout: torch.Tensor, w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    """The gradients of w, u, k and v, as wide as the sums they are.

    The maxima cancel out of the result and are constants here. A step of a recurrence multiplies by e^{-w}, so that
    w's gradient is the sum over the steps of what each passes on, times its gradient.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    w, u = w.to(wide), u.to(wide)
    dw, du = torch.zeros_like(w), torch.zeros_like(u)
    dk, dv = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (k, v))
    scratch = Scratch(w, v.shape[2])
    for part, keys, values in _images(k, v, wide):
        sums = _sums(w, u, keys, values, eps, scratch)
        n, L, C = values.shape
        dnum = dout[part].to(wide) / sums.den
        dden = -dnum * sums.out
        own = sums.weights[2]
        dv[part] = own * dnum
        dk[part] = own.mul_(torch.addcmul(dden, dnum, values))
        du += dk[part].sum((0, 1))
        for side, weight in zip(sums.sides, sums.weights, strict=False):
            # The gradient of a state is what the next token asks of it, and what the next state passes on.
            earlier, later = shift(side.reverse)
            g = torch.zeros_like(side.states)
            torch.mul(weight[:, later], dnum[:, later], out=g[:n, earlier])
            torch.mul(weight[:, later], dden[:, later], out=g[n:, earlier])
            scan = _recurrence(scratch, n, L, C)
            scan.a[:n], scan.a[n:] = side.decay, side.decay
            torch.mul(scan.a, g, out=scan.b)
            scan.run((not side.reverse, not side.reverse))
            dw -= scan.b[:, later].mul(side.states[:, earlier]).sum((0, 1))
            g[:, earlier] += scan.b[:, later]
            dv[part].addcmul_(side.term, g[:n])
            dk[part].addcmul_(side.term, torch.addcmul(g[n:], g[:n], values))
    return dw, du, dk, dv


def exportable(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in standard operators, for torch.export and ONNX: cumulative sums under one maximum a channel.

    Exact while k + t w spans less than 80 in a channel, as it does in trained models.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    w, u, k, values = (x.to(wide) for x in (w, u, k, v))
    position = torch.arange(k.shape[1], device=k.device, dtype=wide)[:, None]
    top = k.amax(1, keepdim=True)
    own = torch.exp(u + k - top)
    num, den = own * values, own + eps * torch.exp(-top)
    for sign in (1, -1):
        x = k + sign * position * w
        r = x.amax(1, keepdim=True)
        term = torch.exp(x - r)
        weight = torch.exp(r - (sign * position - 1) * w - top)
        for total, terms in ((num, term * values), (den, term)):
            below = terms.cumsum(1) if sign == 1 else terms.flip(1).cumsum(1).flip(1)
            total += weight * (below - terms)
    return (num / den).to(v.dtype)
