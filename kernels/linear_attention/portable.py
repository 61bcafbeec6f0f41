"""Linear attention in plain PyTorch: the keys and values first, then the queries, one image at a time.

An image's tokens stay in cache through the dozen operators that touch them; peak extra memory does not grow with the
batch. All arithmetic is in float32 at least.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..rotary.portable import table, turned
from ..rotary.reference import rotary2d
from .form import Form, features

LOG2E = math.log2(math.e)


class State(NamedTuple):
    """What the queries need to know of all keys and values, in float32 at least."""

    kv: torch.Tensor  # (B, heads, d, dv): sum of w rope(phi(k)) v^T
    key: torch.Tensor  # (B, heads, d): sum of w phi(k)
    value: torch.Tensor  # (B, heads, dv): mean of v; (B, heads, 0) unless the normalizer is additive


def empty_state(q: torch.Tensor, v: torch.Tensor, form: Form) -> State:
    B, heads, d, dv = q.shape[0], *q.shape[3:], v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    shapes = (d, dv), (d,), (dv if form.normalizer == "additive" else 0,)
    return State(*(q.new_empty(B, heads, *shape, dtype=wide) for shape in shapes))


def _features(x: torch.Tensor, name: str, wide: torch.dtype) -> torch.Tensor:
    """phi(x), contiguous."""
    x = x.to(wide)
    if name == "elu":  # of the exponentials of a CPU, that of base 2 is the fast one
        return x.clamp(max=0).mul_(LOG2E).exp2_().add_(x.relu())
    return features(x, name).contiguous()


def _slope(phi: torch.Tensor, name: str) -> torch.Tensor | float:
    """phi'(x), from phi(x)."""
    if name == "elu":
        return phi.clamp(max=1)
    if name == "relu":
        return (phi > 0).to(phi.dtype)
    return phi if name == "exp" else 1.0


def _turned(x: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
    """x (N, heads, d), contiguous, under the rotary embedding."""
    return x if turns is None else turned(x, turns)


def _turns(q: torch.Tensor, form: Form) -> torch.Tensor | None:
    return None if form.rotary is None else table(*q.shape[1:3], form.rotary, q)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(N, heads, d) to (heads, N, d)."""
    return x.transpose(0, 1)


def _factor(total: torch.Tensor, N: int, form: Form) -> torch.Tensor | None:
    """What the normalizer multiplies the numerator by; `total` (heads, N, 1) is the denominator."""
    if form.normalizer == "div":
        return (total + form.eps).reciprocal_()
    if form.normalizer == "clamp":
        return total.clamp(min=form.eps / N).reciprocal_()
    if form.normalizer == "additive":
        return (total + form.eps).reciprocal_().add_(1)
    return None


def _flat(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [x if x is None else x.flatten(1, 2) for x in tensors]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    form: Form,
) -> tuple[torch.Tensor, State]:
    """The op without autograd: out like v but contiguous, and the state."""
    out, state = v.new_empty(v.shape), empty_state(q, v, form)
    wide, turns, N = state.kv.dtype, _turns(q, form), q.shape[1] * q.shape[2]
    q, k, v, key_weight, local, gate, flat_out = _flat(q, k, v, key_weight, local, gate, out)
    for i in range(len(q)):
        phi, values = _features(k[i], form.feature_map, wide), v[i].to(wide)
        if key_weight is not None:
            phi = phi * key_weight[i, ..., None]
        mean = 1 / N if key_weight is None else 1.0
        state.key[i] = phi.sum(0).mul_(mean)
        state.kv[i] = torch.bmm(_turned(phi, turns).permute(1, 2, 0), _heads(values)).mul_(mean)
        if form.normalizer == "additive":
            state.value[i] = values.mean(0)
        y = _normalized(*_queries(q[i], state, i, turns, form), state.value[i], N, form).transpose(0, 1)
        if local is not None:
            y = y + local[i]
        if gate is not None:
            y = y * gate[i]
        flat_out[i] = y
    return out, state


def _queries(q, state: State, i: int, turns, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (heads, N, dv) and denominator (heads, N, 1) of an image."""
    phi = _features(q, form.feature_map, state.kv.dtype)
    total = torch.bmm(_heads(phi), state.key[i, ..., None] * form.scale)
    return torch.bmm(_heads(_turned(phi, turns)), state.kv[i] * form.scale), total


def _normalized(num, total, value, N: int, form: Form) -> torch.Tensor:
    factor = _factor(total, N, form)
    if factor is not None:
        num.mul_(factor)
    return num.addcmul_(total, value[:, None], value=-1) if form.normalizer == "additive" else num


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    state: State,
    form: Form,
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v, key_weight, local and gate, contiguous; None where the input is.

    With `num` and `total` of a query, y = num * factor (- total * mean v): the queries' gradients and those of the
    state come first, the latter by the same reduction as the state itself; then those of keys and values.
    """
    inputs = (q, k, v, key_weight, local, gate)
    grads = [x if x is None else x.new_empty(x.shape) for x in inputs]
    wide, turns, N = state.kv.dtype, _turns(q, form), q.shape[1] * q.shape[2]
    back = None if turns is None else turns.conj().resolve_conj()
    q, k, v, key_weight, local, gate, dout = _flat(*inputs, dout)
    dq, dk, dv, dkey_weight, dlocal, dgate = _flat(*grads)
    additive = form.normalizer == "additive"
    for i in range(len(q)):
        num, total = _queries(q[i], state, i, turns, form)
        factor = _factor(total, N, form)
        du = dout[i].to(wide)
        if gate is not None:
            y = _normalized(num.clone(), total, state.value[i], N, form).transpose(0, 1)
            dgate[i] = du * (y if local is None else y + local[i])
            du = du * gate[i]
        if local is not None:
            dlocal[i] = du
        dy = _heads(du)

        # The state's gradients, and the queries'.
        dnum, dtotal = dy, torch.zeros_like(total)
        if factor is not None:
            inverse = factor - 1 if additive else factor
            dtotal = (dy * num).sum(-1, keepdim=True).mul_(inverse).mul_(-inverse)
            if form.normalizer == "clamp":
                dtotal.masked_fill_(total <= form.eps / N, 0)
            dnum = dy * factor
        if additive:
            dtotal -= torch.bmm(dy, state.value[i, ..., None])
        phi = _features(q[i], form.feature_map, wide)
        dkv = torch.bmm(_turned(phi, turns).permute(1, 2, 0), dnum).mul_(form.scale)
        dkey = torch.bmm(phi.permute(1, 2, 0), dtotal).mul_(form.scale)[..., 0]
        dphi = torch.bmm(dnum, state.kv[i].transpose(1, 2)).transpose(0, 1).contiguous()
        dphi = _turned(dphi, back) + dtotal.transpose(0, 1) * state.key[i]
        dq[i] = dphi.mul_(form.scale).mul_(_slope(phi, form.feature_map))

        # The keys' and values'.
        phi, values = _features(k[i], form.feature_map, wide), v[i].to(wide)
        weight = 1 / N if key_weight is None else key_weight[i, ..., None].to(wide)
        dphi = torch.bmm(_heads(values), dkv.transpose(1, 2)).transpose(0, 1).contiguous()
        dphi = _turned(dphi, back) + dkey
        if key_weight is not None:
            dkey_weight[i] = (dphi * phi).sum(-1)
        dvalues = torch.bmm(_heads(_turned(phi, turns)), dkv).transpose(0, 1) * weight
        dv[i] = dvalues - torch.bmm(total.transpose(1, 2), dy).transpose(0, 1).div_(N) if additive else dvalues
        dk[i] = dphi.mul_(weight).mul_(_slope(phi, form.feature_map))
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
    k = k * (1 / (H * W) if key_weight is None else key_weight[..., None])
    total = tokens(q) @ tokens(k).sum(2, keepdim=True).transpose(2, 3)
    if form.rotary is not None:
        q, k = rotary2d(q, form.rotary), rotary2d(k, form.rotary)
    out = tokens(q) @ (tokens(k).transpose(2, 3) @ tokens(v))
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
