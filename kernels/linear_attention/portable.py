"""Linear attention in plain PyTorch: the keys and values first, then the queries, one image at a time.

A run of tokens at once, which stays in cache through the dozen operators that touch it; peak extra memory of a forward
does not grow with the batch, nor, the rotary table aside, with the map. Images of few tokens go together, the heads of
one beside those of the next, for there it is the operators' number that counts. All arithmetic is in float32 at least.
"""
from __future__ import annotations

import math

import torch

from ..rotary.portable import table, turned
from ..rotary.reference import rotary2d
from .form import Form, features
from .state import State, empty_state

LOG2E = math.log2(math.e)
CACHED = 2**18  # numbers of a map that are worked on at once


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


def _together(q: torch.Tensor, v: torch.Tensor) -> int:
    """How many images go at once: a divisor of the batch, as many as stay in cache."""
    B, H, W, heads, d = q.shape
    most = max(1, CACHED // (H * W * heads * max(d, v.shape[-1])))
    return next(count for count in range(min(B, most), 0, -1) if B % count == 0) if B else 1


def _joined(images: int, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """(B, H, W, heads, ...) to (B / images, H * W, images * heads, ...); a view of one image."""
    flat = _flat(*tensors)
    if images == 1:
        return flat
    return [x if x is None else x.unflatten(0, (-1, images)).transpose(1, 2).flatten(2, 3) for x in flat]


def _apart(x: torch.Tensor, images: int, shape: torch.Size) -> torch.Tensor:
    """What `_joined` made of a tensor, in its own shape again, contiguous."""
    return x.view(shape) if images == 1 else x.unflatten(2, (images, -1)).transpose(1, 2).contiguous().view(shape)


def _parts(tokens: int, channels: int) -> list[slice]:
    """Equal runs of tokens, each of which stays in cache: a larger map must not cost more than its share."""
    count = max(1, round(tokens * channels / CACHED))
    size = -(-tokens // count)
    return [slice(start, start + size) for start in range(0, tokens, size)]


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
    shape, images, packed = v.shape, _together(q, v), empty_state(q, v, form)
    wide, turns, N = packed.dtype, _turns(q, form), q.shape[1] * q.shape[2]
    q, k, v, key_weight, local, gate = _joined(images, q, k, v, key_weight, local, gate)
    state = State.of(packed.view(len(q), q.shape[2], -1), q.shape[-1], v.shape[-1])
    out = v.new_empty(v.shape)
    parts = _parts(N, q.shape[2] * max(q.shape[3], v.shape[3]))
    parts = [(part, None if turns is None else turns[part]) for part in parts]
    mean = 1 / N if key_weight is None else 1.0
    packed.zero_()
    for i in range(len(q)):
        for part, turn in parts:
            phi, values = _features(k[i, part], form.feature_map, wide), v[i, part].to(wide)
            if key_weight is not None:
                phi = phi * key_weight[i, part, :, None]
            state.key[i].add_(phi.sum(0), alpha=mean)
            state.kv[i].add_(torch.bmm(_turned(phi, turn).permute(1, 2, 0), _heads(values)), alpha=mean)
            if form.normalizer == "additive":
                state.value[i].add_(values.sum(0), alpha=1 / N)
        for part, turn in parts:
            y = _normalized(*_queries(q[i, part], state, i, turn, form), state.value[i], N, form).transpose(0, 1)
            if local is not None:
                y.add_(local[i, part])
            if gate is not None:
                y.mul_(gate[i, part])
            out[i, part] = y
    return _apart(out, images, shape), packed


def _queries(q, state: State, i: int, turns, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator (heads, N, dv) and denominator (heads, N, 1) of an image."""
    phi = _features(q, form.feature_map, state.kv.dtype)
    # Rows times matrix: of the two orders, a CPU is several times faster at this one.
    total = torch.bmm(state.key[i, :, None] * form.scale, phi.permute(1, 2, 0)).transpose(1, 2)
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
    packed: torch.Tensor,
    form: Form,
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v, key_weight, local and gate, contiguous; None where the input is.

    With `num` and `total` of a query, y = num * factor (- total * mean v): the queries' gradients and those of the
    state come first, the latter by the same reduction as the state itself; then those of keys and values.
    """
    inputs, images = (q, k, v, key_weight, local, gate), _together(q, v)
    wide, turns, N = packed.dtype, _turns(q, form), q.shape[1] * q.shape[2]
    back = None if turns is None else turns.conj().resolve_conj()
    q, k, v, key_weight, local, gate, dout = joined = _joined(images, *inputs, dout)
    state = State.of(packed.view(len(q), q.shape[2], -1), q.shape[-1], v.shape[-1])
    grads = [x if x is None else x.new_empty(x.shape) for x in joined[:-1]]
    dq, dk, dv, dkey_weight, dlocal, dgate = grads
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
    return [x if x is None else _apart(grad, images, x.shape) for x, grad in zip(inputs, grads, strict=True)]


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
