"""Linear attention in plain PyTorch: the keys and values first, then the queries.

A run of tokens of one image at once, or a few small images, which stay in cache through the dozen operators that touch
them; peak extra memory of a forward does not grow with the batch, nor, the rotary table aside, with the map. All
arithmetic is in float32 at least.
"""
from __future__ import annotations

import math

import torch

from .._dispatch import caches
from ..rotary.portable import table, turned
from ..rotary.reference import rotary2d
from .form import Form, features
from .state import State, empty_state

LOG2E = math.log2(math.e)
CACHED = 2**18  # numbers of a map that are worked on at once, a thread


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
    """x (images, N, heads, d), contiguous, under the rotary embedding."""
    return x if turns is None else turned(x, turns)


def _turns(q: torch.Tensor, form: Form) -> torch.Tensor | None:
    return None if form.rotary is None else table(*q.shape[1:3], form.rotary, q)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(images, N, heads, d) to (images, heads, N, d)."""
    return x.transpose(1, 2)


def _columns(x: torch.Tensor) -> torch.Tensor:
    """(images, N, heads, d) to (images, heads, d, N)."""
    return x.permute(0, 2, 3, 1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of (images, heads, rows, columns).

    Image by image or head by head, whichever are fewer: heads and images together would have to be copied.
    """
    if a.shape[1] < a.shape[0]:
        return _product(a.transpose(0, 1), b.transpose(0, 1)).transpose(0, 1)
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for i in range(a.shape[0]):
        torch.bmm(a[i], b[i], out=out[i])
    return out


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


def _groups(q: torch.Tensor, v: torch.Tensor) -> list[slice]:
    """The images of a batch, as many at once as stay in cache; q and v are (B, N, heads, ...)."""
    B, N, heads, d = q.shape
    count = -(-B // max(1, caches() * CACHED // (N * heads * max(d, v.shape[-1]))))
    return _equal(B, count) if B else []


def _equal(length: int, count: int) -> list[slice]:
    """`count` slices of a length, or fewer, that differ by the last one at most."""
    size = -(-length // count)
    return [slice(start, start + size) for start in range(0, length, size)]


def _parts(tokens: int, channels: int) -> list[slice]:
    """Equal runs of tokens, each of which stays in cache: a larger map must not cost more than its share."""
    return _equal(tokens, max(1, round(tokens * channels / (caches() * CACHED))))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    local: torch.Tensor | None,
    gate: torch.Tensor | None,
    form: Form,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without autograd: out like v but contiguous, and the packed state."""
    shape, turns, packed = v.shape, _turns(q, form), empty_state(q, v, form).zero_()
    q, k, v, key_weight, local, gate = _flat(q, k, v, key_weight, local, gate)
    (_, N, heads, d), dv = q.shape, v.shape[-1]
    state, out = State.of(packed, d, dv), v.new_empty(v.shape)
    parts = [(part, None if turns is None else turns[part]) for part in _parts(N, heads * max(d, dv))]
    mean = 1 / N if key_weight is None else 1.0
    for group in _groups(q, v):
        sums = State(*(x[group] for x in state))
        for part, turn in parts:
            phi, values = _features(k[group, part], form.feature_map, packed.dtype), v[group, part].to(packed.dtype)
            if key_weight is not None:
                phi = phi * key_weight[group, part, :, None]
            sums.key.add_(phi.sum(1), alpha=mean)
            sums.kv.add_(_product(_columns(_turned(phi, turn)), _heads(values)), alpha=mean)
            if form.normalizer == "additive":
                sums.value.add_(values.sum(1), alpha=1 / N)
        for part, turn in parts:
            y = _heads(_normalized(*_queries(q[group, part], sums, turn, form), sums.value, N, form))
            extra = [None if x is None else x[group, part] for x in (local, gate)]
            _finish(y, *extra, out[group, part])
    return out.view(shape), packed


def _queries(q, state: State, turns, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (images, heads, N, dv) and denominator (images, heads, N, 1)."""
    phi = _features(q, form.feature_map, state.kv.dtype)
    # Rows times matrix: of the two orders, a CPU is several times faster at this one.
    total = _product(state.key[:, :, None] * form.scale, _columns(phi)).transpose(2, 3)
    return _product(_heads(_turned(phi, turns)), state.kv * form.scale), total


def _normalized(num, total, value, N: int, form: Form) -> torch.Tensor:
    factor = _factor(total, N, form)
    if factor is not None:
        num.mul_(factor)
    return num.addcmul_(total, value[:, :, None], value=-1) if form.normalizer == "additive" else num


def _finish(y: torch.Tensor, local: torch.Tensor | None, gate: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = (y + local) * gate, in y's precision; out is contiguous and y is not."""
    wide = out if out.dtype == y.dtype else torch.empty_like(out, dtype=y.dtype)
    if local is None:
        wide.copy_(y)
    else:
        torch.add(y, local, out=wide)
    if gate is not None:
        wide.mul_(gate)
    if wide is not out:
        out.copy_(wide)


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
    for group in _groups(tensors[0], tensors[2]):
        part = [x if x is None else x[group] for x in tensors]
        q, k, v, key_weight, local, gate, dout, dq, dk, dv, dkey_weight, dlocal, dgate = part
        sums = State(*(x[group] for x in state))
        num, total = _queries(q, sums, turns, form)
        factor = _factor(total, N, form)
        du = dout.to(wide)
        if gate is not None:
            y = _heads(_normalized(num.clone(), total, sums.value, N, form))
            dgate.copy_(du * (y if local is None else y + local))
            du = du * gate
        if local is not None:
            dlocal.copy_(du)
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
            dtotal -= _product(dy, sums.value[..., None])
        phi = _features(q, form.feature_map, wide)
        dkv = _product(_columns(_turned(phi, turns)), dnum).mul_(form.scale)
        dkey = _product(_columns(phi), dtotal).mul_(form.scale)[..., 0]
        dphi = _heads(_product(dnum, sums.kv.transpose(2, 3))).contiguous()
        dphi = _turned(dphi, back) + _heads(dtotal) * sums.key[:, None]
        dq.copy_(dphi.mul_(form.scale).mul_(_slope(phi, form.feature_map)))

        # The keys' and values'.
        phi, values = _features(k, form.feature_map, wide), v.to(wide)
        weight = 1 / N if key_weight is None else key_weight[..., None].to(wide)
        dphi = _heads(_product(_heads(values), dkv.transpose(2, 3))).contiguous()
        dphi = _turned(dphi, back) + dkey[:, None]
        if key_weight is not None:
            dkey_weight.copy_((dphi * phi).sum(-1))
        dvalues = _heads(_product(_heads(_turned(phi, turns)), dkv)) * weight
        if additive:
            dvalues = dvalues - _heads(_product(total.transpose(2, 3), dy)).div_(N)
        dv.copy_(dvalues)
        dk.copy_(dphi.mul_(weight).mul_(_slope(phi, form.feature_map)))
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
