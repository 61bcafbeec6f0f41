"""Linear attention in plain PyTorch: the keys and values first, then the queries.

A run of tokens of one image at once, or a few small images, which stay in cache through the dozen operators that touch
them; peak extra memory of a forward does not grow with the batch, nor, the rotary table aside, with the map. All
arithmetic is in float32 at least.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch

from .._dispatch import caches
from ..rotary.portable import table, turned
from ..rotary.reference import rotary2d
from .form import Form, features
from .state import State

LOG2E = math.log2(math.e)
CACHED = 2**18  # numbers of a map that are worked on at once, a thread


def _wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), which for the type that x has takes some 45 us between operators that fill the caches."""
    return x if x.dtype == dtype else x.to(dtype)


def _features(x: torch.Tensor, name: str, wide: torch.dtype) -> torch.Tensor:
    """phi(x) of (images, N, heads, d), as (images, heads, N, d), contiguous: so products need no copies of it."""
    x = _wide(x, wide).transpose(1, 2)
    if name == "elu":  # of the exponentials of a CPU, that of base 2 is the fast one
        phi = torch.clamp(x, max=0, out=x.new_empty(x.shape))
        return phi.mul_(LOG2E).exp2_().add_(x.relu())
    if name == "relu":
        return torch.clamp(x, min=0, out=x.new_empty(x.shape))
    return torch.exp(x, out=x.new_empty(x.shape)) if name == "exp" else x.contiguous()


def _slope(phi: torch.Tensor, name: str) -> torch.Tensor | float:
    """phi'(x), from phi(x)."""
    if name == "elu":
        return phi.clamp(max=1)
    if name == "relu":
        return (phi > 0).to(phi.dtype)
    return phi if name == "exp" else 1.0


def _turns(q: torch.Tensor, form: Form) -> torch.Tensor | None:
    """What turns the pairs of every head: complex (heads, N, 1, d / 2), or one for all heads."""
    if form.rotary is None:
        return None
    _, H, W, heads, d = q.shape
    turns, span = table(H, W, form.rotary, q), form.rotary.span
    if d % 2 == 0:
        alike = d % span == 0
        turns = turns.expand(-1, (d if alike else heads * d) // span, -1).reshape(H * W, 1 if alike else heads, d // 2)
    return turns.transpose(0, 1).contiguous().unsqueeze(2)


def _turned(x: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
    """x (images, heads, N, d), contiguous, under the rotary embedding."""
    if turns is None:
        return x
    if x.shape[3] % 2:  # some pairs lie in two heads
        return turned(x.transpose(1, 2).contiguous(), turns[0]).transpose(1, 2).contiguous()
    return turned(x.unsqueeze(3), turns).squeeze(3)


def _factor(total: torch.Tensor, N: int, form: Form) -> torch.Tensor | None:
    """What the normalizer multiplies the numerator by; `total` (images, heads, N, 1) is the denominator."""
    if form.normalizer == "div":
        return (total + form.eps).reciprocal_()
    if form.normalizer == "clamp":
        return total.clamp(min=form.eps / N).reciprocal_()
    if form.normalizer == "additive":
        return (total + form.eps).reciprocal_().add_(1)
    return None


def _flat(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [x if x is None else x.flatten(1, 2) for x in tensors]


def _images(q: torch.Tensor, v: torch.Tensor) -> int:
    """How many images of a batch stay in cache, in equal runs; q and v are (B, N, heads, ...)."""
    B, N, heads, d = q.shape
    return _equal(B, -(-B // max(1, caches() * CACHED // (N * heads * max(d, v.shape[-1])))))


def _tokens(q: torch.Tensor, v: torch.Tensor) -> int:
    """How many tokens of a map do, in equal runs: a larger map must not cost more than its share."""
    _, N, heads, d = q.shape
    return _equal(N, round(N * heads * max(d, v.shape[-1]) / (caches() * CACHED)))


def _equal(length: int, count: int) -> int:
    """The size of `count` runs of a length, or fewer, that differ by the last one at most."""
    return -(-length // max(1, count))


def _runs(size: int, dim: int, *tensors: torch.Tensor | None) -> Iterable[tuple[torch.Tensor | None, ...]]:
    """The tensors, the first of which is one, in runs of `size` along a dimension."""
    if tensors[0].shape[dim] <= size:
        return (tensors,)
    return zip(*(itertools.repeat(None) if x is None else x.split(size, dim) for x in tensors), strict=False)


def forward(*args) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without autograd: what `attend` gives, with the packed state of the batch."""
    out, states = attend(*args)
    return out, torch.cat([state.packed() for state in states])


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    form: Form,
) -> tuple[torch.Tensor, list[State]]:
    """out like v but contiguous, and the state of each run of images."""
    turns, result, states = _turns(q, form), v.new_empty(v.shape), []
    q, k, v, key_weight, local, gate, out = _flat(q, k, v, key_weight, local, gate, result)
    N, tokens = q.shape[1], _tokens(q, v)
    for qs, ks, vs, weights, locals_, gates, outs in _runs(_images(q, v), 0, q, k, v, key_weight, local, gate, out):
        state = _reduced(_runs(tokens, 1, ks, vs, weights, turns), N, form)
        for run in _runs(tokens, 1, qs, locals_, gates, outs, turns):
            _apply(*run, state, N, form)
        states.append(state)
    return result, states


def _reduced(runs: Iterable[tuple], N: int, form: Form) -> State:
    """The state of images, from all runs of their tokens."""
    total = None
    for k, v, key_weight, turns in runs:
        wide = torch.promote_types(k.dtype, torch.float32)
        phi, values = _features(k, form.feature_map, wide), _wide(v, wide).transpose(1, 2)
        value = values.sum(2) if form.normalizer == "additive" else None
        if key_weight is None:
            key = phi.sum(2)
        else:  # the values take the weights: of two heads that share a turning pair, either has its own
            weight = _wide(key_weight, wide).transpose(1, 2)
            key, values = (weight[:, :, None] @ phi).squeeze(2), values * weight[..., None]
        state = State(_turned(phi, turns).transpose(2, 3) @ values, key, value)
        if total is None:
            total = state
        else:
            for x, more in zip(total, state, strict=True):
                if x is not None:
                    x.add_(more)
    if key_weight is None:
        total.kv.mul_(1 / N)
        total.key.mul_(1 / N)
    if total.value is not None:
        total.value.mul_(1 / N)
    return total


def _apply(q, local, gate, out, turns, state: State, N: int, form: Form) -> None:
    """out = (y + local) * gate of a run of tokens."""
    num, total = _queries(q, state, turns, form)
    y = out.transpose(1, 2) if out.dtype == num.dtype else num
    _normalized(num, total, state.value, N, form, y)
    if local is not None:
        y.add_(local.transpose(1, 2))
    if gate is not None:
        y.mul_(gate.transpose(1, 2))
    if y is num:
        out.copy_(num.transpose(1, 2))


def _queries(q, state: State, turns, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (images, heads, N, dv) and denominator (images, heads, N, 1)."""
    phi = _features(q, form.feature_map, state.kv.dtype)
    kv, key = state.kv, state.key
    if form.scale != 1:
        kv, key = kv * form.scale, key * form.scale
    # Row times matrix: of the two orders, a CPU is several times faster at this one.
    total = (key[:, :, None] @ phi.transpose(2, 3)).transpose(2, 3)
    return _turned(phi, turns) @ kv, total


def _normalized(num, total, value, N: int, form: Form, out: torch.Tensor) -> torch.Tensor:
    """y, written to `out`, which may be `num`."""
    factor = _factor(total, N, form)
    if factor is None:
        out.copy_(num)
    else:
        torch.mul(num, factor, out=out)
    return out.addcmul_(total, value[:, :, None], value=-1) if form.normalizer == "additive" else out


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    packed: torch.Tensor,
    form: Form,
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v, key_weight, local and gate, contiguous; None where the input is.

    With `num` and `total` of a query, y = num * factor (- total * mean v): the queries' gradients and those of the
    state come first, the latter by the same reduction as the state itself; then those of keys and values.
    """
    inputs = q, k, v, key_weight, local, gate
    grads = [x if x is None else x.new_empty(x.shape) for x in inputs]
    wide, turns, N = packed.dtype, _turns(q, form), q.shape[1] * q.shape[2]
    back = None if turns is None else turns.conj().resolve_conj()
    state, tensors = State.of(packed, q.shape[-1], v.shape[-1]), _flat(*inputs, dout, *grads)
    additive = form.normalizer == "additive"
    for run in _runs(_images(tensors[0], tensors[2]), 0, *tensors, *state):
        q, k, v, key_weight, local, gate, dout, dq, dk, dv, dkey_weight, dlocal, dgate = run[: len(tensors)]
        sums = State(*run[len(tensors) :])
        num, total = _queries(q, sums, turns, form)
        factor = _factor(total, N, form)
        du = _wide(dout, wide)
        if gate is not None:
            y = _normalized(num, total, sums.value, N, form, torch.empty_like(num)).transpose(1, 2)
            dgate.copy_(du * (y if local is None else y + local))
            du = du * gate
        if local is not None:
            dlocal.copy_(du)
        dy = du.transpose(1, 2).contiguous()

        # The state's gradients, and the queries'.
        dnum, dtotal = dy, torch.zeros_like(total)
        if factor is not None:
            inverse = factor - 1 if additive else factor
            dtotal = (dy * num).sum(-1, keepdim=True).mul_(inverse).mul_(-inverse)
            if form.normalizer == "clamp":
                dtotal.masked_fill_(total <= form.eps / N, 0)
            dnum = dy * factor
        if additive:
            dtotal -= dy @ sums.value[..., None]
        phi = _features(q, form.feature_map, wide)
        dkv = (_turned(phi, turns).transpose(2, 3) @ dnum).mul_(form.scale)
        dkey = (dtotal.transpose(2, 3) @ phi).mul_(form.scale)
        dphi = _turned(dnum @ sums.kv.transpose(2, 3), back).addcmul_(dtotal, sums.key[:, :, None])
        dq.copy_(dphi.mul_(form.scale).mul_(_slope(phi, form.feature_map)).transpose(1, 2))

        # The keys' and values'.
        phi, values = _features(k, form.feature_map, wide), _wide(v, wide).transpose(1, 2)
        if key_weight is None:
            dkv, dkey = dkv.div_(N), dkey.div_(N)
        dvalues, dphi = _turned(phi, turns) @ dkv, values @ dkv.transpose(2, 3)
        if key_weight is None:
            dphi = _turned(dphi, back).add_(dkey)
        else:
            weight = _wide(key_weight, wide).transpose(1, 2)[..., None]
            dweight = (values * dvalues).sum(-1).add_((dkey @ phi.transpose(2, 3)).squeeze(2))
            dkey_weight.copy_(dweight.transpose(1, 2))
            dvalues, dphi = dvalues.mul_(weight), _turned(dphi.mul_(weight), back).addcmul_(weight, dkey)
        if additive:
            dvalues.sub_(total.transpose(2, 3) @ dy, alpha=1 / N)
        dv.copy_(dvalues.transpose(1, 2))
        dk.copy_(dphi.mul_(_slope(phi, form.feature_map)).transpose(1, 2))
    return grads


def exportable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    form: Form,
) -> torch.Tensor:
    """The same as one graph of standard operators, for torch.export and ONNX; batch and map may be dynamic."""
    H, W = q.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.to(wide).flatten(1, 2).transpose(1, 2)  # (B, heads, N, d)

    q, k = features(q.to(wide), form.feature_map) * form.scale, features(k.to(wide), form.feature_map)
    weight = 1 / (H * W) if key_weight is None else key_weight[..., None]
    total = tokens(q) @ tokens(k * weight).sum(2, keepdim=True).transpose(2, 3)
    if form.rotary is not None:
        q, k = rotary2d(q, form.rotary), rotary2d(k, form.rotary)
    out = tokens(q) @ (tokens(k).transpose(2, 3) @ tokens(v.to(wide) * weight))
    if form.normalizer == "div":
        out = out / (total + form.eps)
    elif form.normalizer == "clamp":
        out = out / total.clamp(min=form.eps / (H * W))
    elif form.normalizer == "additive":
        out = out * (1 + 1 / (total + form.eps)) - total * tokens(v).mean(2, keepdim=True)
    out = out.transpose(1, 2).unflatten(1, (H, W))
    if local is not None:
        out = out + local
    if gate is not None:
        out = out * gate
    return out.to(v.dtype)
