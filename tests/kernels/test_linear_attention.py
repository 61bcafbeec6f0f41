"""`linear_attention`: the papers' formulas, the portable path against the definition, registration, errors."""
from __future__ import annotations

import io
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import Rotary, linear_attention, rotary2d, use
from visionbb.kernels.linear_attention import portable
from visionbb.kernels.linear_attention.form import FEATURE_MAPS, NORMALIZERS

# ---- The definition, checked against what the papers state ----------------------------------------------------------


def qkv_of(*shape, dtype=torch.float64, seed=0):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).unbind()


def test_constant_queries_and_keys_average_the_values():
    v = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)
    ones = torch.ones(2, 3, 4, 2, 7, dtype=torch.float64)
    mean = v.mean((1, 2), keepdim=True).expand_as(v)
    with use("reference"):
        torch.testing.assert_close(linear_attention(ones, ones, v, eps=0), mean)
        torch.testing.assert_close(linear_attention(ones, ones, v, normalizer="none"), 7 * mean)


def test_rows_sum_to_one():
    """Values of one give one: for "div", and for MALA's beta * phi_q . phi_k - gamma (its equation 5)."""
    q, k, _ = qkv_of(1, 3, 4, 2, 8)
    ones = torch.ones(1, 3, 4, 2, 1, dtype=torch.float64)
    for normalizer in ("div", "additive"):
        with use("reference"):
            torch.testing.assert_close(
                linear_attention(q, k, ones, feature_map="elu", normalizer=normalizer, eps=0), ones
            )


def test_additive_is_the_papers_beta_and_gamma():
    """MALA: beta = 1 + 1 / (phi_q . sum_m phi_k_m), gamma = phi_q . sum_m phi_k_m / N."""
    q, k, v = qkv_of(1, 2, 3, 1, 4)
    phi_q, phi_k = (F.elu(x).flatten(0, 3) + 1 for x in (q, k))
    scores = phi_q @ phi_k.T
    total = scores.sum(1, keepdim=True)
    expected = ((1 + 1 / total) * scores - total / 6) @ v.flatten(0, 3)
    with use("reference"):  # scale N: sums in place of means
        out = linear_attention(q, k, v, feature_map="elu", normalizer="additive", scale=6, eps=0)
    torch.testing.assert_close(out.flatten(0, 3), expected)


def test_clamp_bounds_the_sum():
    """L2ViT: phi_q . sum phi_k^T v / max(phi_q . sum phi_k, 100)."""
    q, k, v = qkv_of(1, 4, 4, 2, 4)
    q[:, :2] *= 100
    phi_q, phi_k, values = (x.flatten(1, 2) for x in (q.relu(), k.relu(), v))
    scores = torch.einsum("bnhd,bmhd->bhnm", phi_q, phi_k)
    total = scores.sum(-1, keepdim=True)
    assert 0.2 < (total < 100).double().mean() < 0.8
    expected = torch.einsum("bhnm,bmhd->bnhd", scores / total.clamp(min=100), values)
    with use("reference"):
        out = linear_attention(q, k, v, feature_map="relu", normalizer="clamp", eps=100)
    torch.testing.assert_close(out.flatten(1, 2), expected)


def test_rotary_turns_the_numerator_alone():
    q, k, v = (x.abs() for x in qkv_of(1, 3, 5, 2, 8))
    rotary = Rotary.closed(8)
    with use("reference"):
        numerator = linear_attention(rotary2d(q, rotary), rotary2d(k, rotary), v, normalizer="none")
        total = linear_attention(q, k, torch.ones_like(v), normalizer="none")
        torch.testing.assert_close(linear_attention(q, k, v, rotary=rotary, eps=0), numerator / total)


def test_key_weights_choose_keys():
    q, k, v = qkv_of(1, 3, 3, 1, 4)
    weight = torch.zeros(1, 3, 3, 1, dtype=torch.float64)
    weight[0, 1, 2] = 1
    with use("reference"):
        out = linear_attention(q, k, v, feature_map="exp", key_weight=weight, eps=0)
    torch.testing.assert_close(out, v[:, 1:2, 2:3].expand_as(out))


# ---- The portable path against the definition -----------------------------------------------------------------------

@st.composite
def cases(draw):
    """Any form on any map."""
    heads, d = draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 5, 12]))
    spans = [span for span in range(4, heads * d + 1, 4) if heads * d % span == 0]
    return dict(
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)), heads, d),
        dv=draw(st.sampled_from([1, 3, 8])),
        rotary=draw(st.sampled_from([None, *map(Rotary.closed, spans), *map(Rotary.half_open, spans)])),
        args=dict(feature_map=draw(st.sampled_from(FEATURE_MAPS)), normalizer=draw(st.sampled_from(NORMALIZERS)),
                  scale=draw(st.sampled_from([1.0, 0.3])), eps=draw(st.sampled_from([1e-6, 0.5]))),
        extras=draw(st.sets(st.sampled_from(["key_weight", "local", "gate"]))),
        seed=draw(st.integers(0, 999)),
    )


def outcome(case, backend, dtype):
    """out, the same by inference, and the gradients of all inputs, q and k as they lie in one projection."""
    generator = torch.Generator().manual_seed(case["seed"])
    *map_, heads, d = case["shape"]

    def random(*shape, **kwargs):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, **kwargs).to(dtype).requires_grad_()

    qk, v = random(*map_, 2, heads, d), random(*map_, heads, case["dv"])
    extras = {name: random(*map_, heads, case["dv"]) for name in ("local", "gate")}
    extras["key_weight"] = torch.rand(*map_, heads, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    extras = {name: extras[name] for name in sorted(case["extras"])}
    # As their features are, where there is no map: away from zero sums.
    q, k = qk.abs().add(0.1).unbind(3) if case["args"]["feature_map"] == "identity" else qk.unbind(3)
    with use(backend):
        args = dict(rotary=case["rotary"], **case["args"], **extras)
        out = linear_attention(q, k, v, **args)
        with torch.no_grad():
            inferred = linear_attention(q, k, v, **args)
        dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        return out, inferred, *torch.autograd.grad(out, [qk, v, *extras.values()], dout)


@given(cases(), st.sampled_from([1, 50, portable.CACHED]))
@settings(max_examples=150, deadline=None)
def test_portable_equals_reference(case, cached):
    with mock.patch.object(portable, "CACHED", cached):  # however many runs the tokens are taken in
        outcomes = outcome(case, "portable", torch.float64), outcome(case, "reference", torch.float64)
    assert all(out.is_contiguous() for out in outcomes[0][:2])  # as the fake implementation promises
    for got, want in zip(*outcomes):
        # A query without features ("relu") has a denominator of eps, and gradients by its inverse square.
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * max(1.0, want.abs().max().item()))


@given(cases())
@settings(max_examples=50, deadline=None)
def test_exported_form_equals_reference(case):
    with mock.patch.object(sys.modules[linear_attention.__module__], "exporting", return_value=True):
        got = outcome(case, "portable", torch.float64)
    for x, want in zip(got, outcome(case, "reference", torch.float64)):
        torch.testing.assert_close(x, want, rtol=1e-8, atol=1e-9 * max(1.0, want.abs().max().item()))


@given(cases(), st.sampled_from([(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)]))
@settings(max_examples=40, deadline=None)
def test_portable_precision(case, dtype_and_tolerance):
    dtype, tolerance = dtype_and_tolerance
    case["args"]["eps"] = 0.5
    exact = outcome(case, "reference", torch.float64)
    for got, want in zip(outcome(case, "portable", dtype), exact):
        # The inputs are rounded as well, so that the error is relative to the largest value of the result.
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1) * 8


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv_of(1, 3, 2, 2, 4))
    weight = torch.rand(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    local, gate = (torch.randn(1, 3, 2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for normalizer in NORMALIZERS:
        def f(q, k, v, weight, local, gate, normalizer=normalizer):
            return linear_attention(
                q, k, v, feature_map="elu", key_weight=weight, rotary=Rotary.closed(4), normalizer=normalizer,
                eps=4.0 if normalizer == "clamp" else 1e-3, local=local, gate=gate,
            )

        assert torch.autograd.gradcheck(f, (q, k, v, weight, local, gate))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_float16_holds_at_65536_tokens(normalizer, weighted):
    """Keys of 4: their sum, 262,144, is beyond float16, and the weights of 1.5e-5 are below its normal numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, 256, 2, 8, generator=generator) for _ in range(3))
    q, k, v = q.half(), (k * 0.1 + 4).half(), (v + 3).half()
    weight = torch.rand(1, 256, 256, 2, generator=generator) / 32768 if weighted else None
    eps = 1e5 if normalizer == "clamp" else 1e-6
    out = linear_attention(q, k, v, feature_map="elu", key_weight=weight, normalizer=normalizer, eps=eps)
    exact = linear_attention(
        q.double(), k.double(), v.double(), feature_map="elu", key_weight=None if weight is None else weight.double(),
        normalizer=normalizer, eps=eps,
    )
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


def test_features_may_be_wider_than_the_values():
    """Cubes of keys leave float16; the values and the result need not."""
    q, k, v = qkv_of(1, 4, 4, 1, 8, dtype=torch.float32)
    k = (k * 50) ** 3
    k = k.abs().requires_grad_()
    out = linear_attention(q.abs(), k, v.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), linear_attention(q.abs(), k, v), rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(out.float().sum(), k)[0].dtype == torch.float32


def test_tokens_without_features_give_no_nan():
    q, k, v = (x.requires_grad_() for x in torch.zeros(3, 1, 4, 4, 2, 8).unbind())
    for normalizer in NORMALIZERS:
        out = linear_attention(q, k, v, feature_map="relu", normalizer=normalizer)
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def tensors_of(**kwargs):
    q, k, v, local, gate = (torch.randn(2, 3, 4, 2, 8, requires_grad=True, **kwargs) for _ in range(5))
    return q, k, v, torch.rand(2, 3, 4, 2, requires_grad=True, **kwargs), local, gate


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_opcheck(normalizer, extras):
    q, k, v, *more = tensors_of()
    more = more if extras else [None] * 3
    form = ("elu", normalizer, 0.5, 1e-3, 8 if extras else 0, 0.1)
    torch.library.opcheck(torch.ops.visionbb.linear_attention.default, (q, k, v, *more, *form))


def test_compiles_in_one_graph():
    def f(q, k, v, weight, local, gate):
        return linear_attention(
            q.sin(), k, v, feature_map="elu", key_weight=weight, rotary=Rotary.closed(8), local=local, gate=gate
        ).cos()

    args = tensors_of()
    expected = f(*args)
    wanted = torch.autograd.grad(expected.sum(), args)
    torch._dynamo.reset()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.sum(), args), wanted):
        torch.testing.assert_close(got, want)


class _Attention(torch.nn.Module):
    def __init__(self, normalizer):
        super().__init__()
        self.args = dict(normalizer=normalizer, feature_map="elu", rotary=Rotary.closed(8), scale=0.5)

    def forward(self, q, k, v, weight, local, gate):
        return linear_attention(q, k, v, key_weight=weight, local=local, gate=gate, **self.args)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_exports_to_standard_operators(normalizer):
    """Of any batch and any map of at least 2x2."""
    module = _Attention(normalizer).eval()
    args = tuple(x.detach() for x in tensors_of())
    sizes = {i: torch.export.Dim(name, min=2, max=64) for i, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(module, args, dynamic_shapes=(sizes,) * 6)
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    more = tuple(torch.rand(5, 7, 6, *x.shape[3:]) for x in args)
    torch.testing.assert_close(program.module()(*more), module(*more), rtol=1e-4, atol=1e-4)


def test_scripted_module_calls_the_op():
    @torch.jit.script
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return torch.ops.visionbb.linear_attention(
            q, k, v, None, None, None, "elu", "div", 1.0, 1e-6, 0, 1.0)[0]

    q, k, v = qkv_of(1, 5, 5, 1, 4)
    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(q, k, v), linear_attention(q, k, v, feature_map="elu"))


def test_autocast_narrows_raw_inputs_and_keeps_features_and_weights():
    q, k, v, weight, local, gate = tensors_of()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(q, k, v, feature_map="elu", key_weight=weight, local=local, gate=gate)
        features = linear_attention(q.exp(), k.exp(), v)
    assert out.dtype == features.dtype == torch.bfloat16
    (out + features).float().sum().backward()
    assert weight.grad.dtype == torch.float32
    exact = linear_attention(q.exp(), k.exp(), v)
    assert (features - exact).abs().max() < (v.bfloat16() - v).abs().max() * 4  # only the values were rounded


def test_flops_forward_and_backward():
    q = torch.empty(2, 14, 14, 4, 16, device="meta", requires_grad=True)
    v = torch.empty(2, 14, 14, 4, 8, device="meta")
    with FlopCounterMode(display=False) as forward:
        out = linear_attention(q, q, v)
    assert forward.get_total_flops() == 2 * 14 * 14 * 4 * 2 * (2 * 16 * 8 + 16)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == forward.get_total_flops() * 5 // 2


# ---- Bad input ------------------------------------------------------------------------------------------------------

_X = torch.zeros(1, 4, 4, 2, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_X.long(), _X, _X), {}, TypeError, "q must be a floating-point tensor, got torch.int64"),
        ((_X[0], _X[0], _X[0]), {}, ValueError, r"q must be \(B, H, W, heads, d\), got shape \(4, 4, 2, 8\)"),
        ((_X[:, :0], _X[:, :0], _X[:, :0]), {}, ValueError, "at least one token, got a map of 0x4"),
        ((_X, _X[..., :4], _X), {}, ValueError, r"k must have shape \(1, 4, 4, 2, 8\), got \(1, 4, 4, 2, 4\)"),
        ((_X, _X, _X[:, :3]), {}, ValueError, "v must be .* on q's map"),
        ((_X, _X.half(), _X), {}, TypeError, "k must be torch.float32, with v in torch.float32, got torch.float16"),
        ((_X.half(), _X.half(), _X), {}, TypeError, "q must be torch.float32"),
        ((_X, _X, _X), dict(key_weight=_X), ValueError, r"key_weight must have shape \(1, 4, 4, 2\)"),
        ((_X, _X, _X), dict(local=_X.double()), TypeError, "local must be torch.float32"),
        ((_X, _X, _X), dict(gate=_X[..., 0]), ValueError, "gate must have shape"),
        ((_X, _X, _X), dict(feature_map="gelu"), ValueError, "identity, elu, relu, exp, got 'gelu'"),
        ((_X, _X, _X), dict(normalizer="softmax"), ValueError, "div, clamp, additive, none, got 'softmax'"),
        ((_X, _X, _X), dict(rotary=Rotary.closed(12)), ValueError, "divides heads \\* head_dim = 16, got 12"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        linear_attention(*args, **kwargs)
