"""Linear attention on 2-D maps: feature maps in place of the softmax, so that keys and values are summed up once.

Papers: Katharopoulos et al. (arXiv 2006.16236: the form, ELU + 1), RALA (Fan et al., arXiv 2411.07635: key weights),
MALA (Fan et al., arXiv 2507.00698: the additive normalizer), MILA (Han et al., arXiv 2405.16605: rotary embedding of
the numerator), L2ViT (Zheng, arXiv 2501.16182: the clamped normalizer).
"""
from __future__ import annotations

import torch

from .._dispatch import direct, eager_inference, exporting, reference_chosen, resolve
from .._flops import register_flops
from .._inputs import floating, own_types
from ..rotary import Rotary
from . import portable, reference
from .form import FEATURE_MAPS, NORMALIZERS, Form
from .limits import refuses
from .state import empty_state

__all__ = ["linear_attention"]


# ---- The public function --------------------------------------------------------------------------------------------

def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "identity",
    key_weight: torch.Tensor | None = None,
    rotary: Rotary | None = None,
    normalizer: str = "div",
    scale: float = 1.0,
    eps: float = 1e-6,
    local: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Non-causal linear attention: every token attends to the whole map, at a cost linear in its size.

    With phi_q = scale * feature_map(q), phi_k = feature_map(k), R the rotary embedding, N = H * W tokens and per head

        S = sum_n w_n R(phi_k_n) v_n^T,    num = R(phi_q) S,    den = phi_q . sum_n w_n phi_k_n,

    the result is (y + local) * gate, where y is, by `normalizer`:

        "div"       num / (den + eps)                              (most papers)
        "clamp"     num / max(den, eps / N)                        (L2ViT: `eps` bounds the sum N * den, 100 there)
        "additive"  num * (1 + 1 / (den + eps)) - den * mean_n v   (MALA, equations 6 to 8; its scale: head_dim ** -0.5)
        "none"      num

    Sums are means (w_n = 1 / N) unless weights are given, and are carried in float32: float16 holds at any N.
    Differentiable once, in all tensors.

    Args:
        q, k: (B, H, W, heads, d), one floating-point dtype, v's or float32; raw, or features already ("identity").
        v: (B, H, W, heads, dv).
        feature_map: "identity", "elu" (ELU + 1), "relu" or "exp", on every channel.
        key_weight: w_n, (B, H, W, heads), v's dtype or float32; usually a softmax over the map (RALA).
        rotary: 2-D rotary embedding of the numerator's features only, or None.
        normalizer, scale, eps: as above.
        local: (B, H, W, heads, dv) in v's dtype, added to the result: the local enhancement of most papers (LePE).
        gate: (B, H, W, heads, dv) in v's dtype, multiplies the result.

    Returns:
        (B, H, W, heads, dv) in v's dtype. Under autocast that is the autocast dtype; features keep their own.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a shape, name or value that does not fit; the message names it.
    """
    raw = feature_map != "identity"
    q, k, v = floating(q, "q", autocast=raw), floating(k, "k", autocast=raw), floating(v, "v")
    local, gate = (x if x is None else floating(x, name) for x, name in ((local, "local"), (gate, "gate")))
    _check(q, k, v, key_weight, local, gate, rotary)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    form = Form(feature_map, normalizer, float(scale), float(eps), rotary)
    if reference_chosen():
        return reference.linear_attention(q, k, v, key_weight, local, gate, form)
    tensors = q, k, v, key_weight, local, gate
    if eager_inference(*tensors):
        path = _path(q, v, form)
        with own_types(v):
            return (portable.attend if path is portable else path.forward)(*tensors, form)[0]
    if exporting():
        return portable.exportable(*tensors, form)
    return _call(*tensors, *_flat(form))[0]


# ---- Argument checks ------------------------------------------------------------------------------------------------

def _check(q, k, v, key_weight, local, gate, rotary: Rotary | None) -> None:
    if q.ndim != 5:
        raise ValueError(f"q must be (B, H, W, heads, d), got shape {tuple(q.shape)}")
    if q.shape[1] * q.shape[2] == 0:
        raise ValueError(f"q must hold at least one token, got a map of {q.shape[1]}x{q.shape[2]}")
    if v.ndim != 5 or v.shape[:4] != q.shape[:4]:
        raise ValueError(f"v must be (B, H, W, heads, dv) on q's map {tuple(q.shape[:4])}, got {tuple(v.shape)}")
    for name, x, shape, dtypes in (
        ("q", q, q.shape, (v.dtype, torch.float32)),
        ("k", k, q.shape, (q.dtype,)),
        ("key_weight", key_weight, q.shape[:4], (v.dtype, torch.float32)),
        ("local", local, v.shape, (v.dtype,)),
        ("gate", gate, v.shape, (v.dtype,)),
    ):
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, with v in {v.dtype}, got {x.dtype}")
        if x.device != v.device:
            raise ValueError(f"{name} must be on v's device {v.device}, got {x.device}")
    if rotary is not None:
        rotary.check(q.shape[3] * q.shape[4])


# ---- Registration: custom ops, fakes, autograd, FLOPs ---------------------------------------------------------------

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? key_weight, Tensor? local, Tensor? gate"
_FORM = "str feature_map, str normalizer, float scale, float eps, int rotary_span, float rotary_ratio"
_INPUTS = _TENSORS.count(",") + 1


def _flat(form: Form) -> tuple:
    """The form in the schema's types: no rotary embedding is a span of 0."""
    return *form[:4], *(form.rotary or (0, 1.0))


def _form(feature_map, normalizer, scale, eps, span, ratio) -> Form:
    return Form(feature_map, normalizer, scale, eps, Rotary(span, ratio) if span else None)


def _path(q, v, form: Form):
    if resolve(refuses, q, v, form) == "triton":
        from . import triton  # compiles kernels: only where they run

        return triton
    return portable


def _forward(*args):
    tensors, form = args[:_INPUTS], _form(*args[_INPUTS:])
    with own_types(tensors[2]):
        return _path(tensors[0], tensors[2], form).forward(*tensors, form)


_op = torch.library.custom_op(
    "visionbb::linear_attention", _forward, mutates_args=(),
    schema=f"({_TENSORS}, {_FORM}) -> (Tensor out, Tensor state)",
)


@_op.register_fake
def _(q, k, v, key_weight, local, gate, *form):
    return v.new_empty(v.shape), empty_state(q, v, _form(*form))


def _run_backward(dout, *args):
    tensors, state, form = args[:_INPUTS], args[_INPUTS], _form(*args[_INPUTS + 1 :])
    with own_types(dout):
        grads = _path(tensors[0], tensors[2], form).backward(dout, *tensors, state, form)
    return tuple(dout.new_empty(0) if grad is None else grad for grad in grads)


_backward_op = torch.library.custom_op(
    "visionbb::linear_attention_backward", _run_backward, mutates_args=(),
    schema=f"(Tensor dout, {_TENSORS}, Tensor state, {_FORM}) -> ({', '.join(['Tensor'] * _INPUTS)})",
)


@_backward_op.register_fake
def _(dout, *args):
    return tuple(dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:_INPUTS])


def _setup_context(ctx, inputs, output):
    *tensors, local, gate = inputs[:_INPUTS]
    ctx.has_local, ctx.form = local is not None, inputs[_INPUTS:]
    ctx.save_for_backward(*tensors, None if gate is None else local, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them when read
    step = _run_backward if eager_inference(dout, *saved) else _backward_op
    grads = step(dout, *saved, *ctx.form)
    *grads, dlocal, dgate = (None if x is None else grad for x, grad in zip(saved, grads, strict=False))
    if ctx.has_local and dgate is None:  # a plain sum: its gradient passes through, and its value is not kept
        dlocal = dout
    return *grads, dlocal, dgate, *(None for _ in ctx.form)


_op.register_autograd(_backward, setup_context=_setup_context)
_call = direct(_op, _forward, _setup_context, _backward)


def _flops(q, v, products: int) -> int:
    """`products` of (d x dv) matrices a token and head, and one more of vectors for each two: the denominators."""
    tokens, d = q[0] * q[1] * q[2] * q[3], q[4]
    return tokens * d * (2 * products * v[4] + products)


# Forward: k v^T and q S. Backward: q S again, and one product each for the gradients of q, S, k and v.
register_flops(torch.ops.visionbb.linear_attention, lambda q, k, v, *_, out_shape=None, **kw: _flops(q, v, 2))
register_flops(
    torch.ops.visionbb.linear_attention_backward, lambda dout, q, k, v, *_, out_shape=None, **kw: _flops(q, v, 5)
)
