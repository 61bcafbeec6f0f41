"""The Triton kernels of `linear_attention` against its definition, forward and backward.

The kernels run on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import Rotary, linear_attention, use
from visionbb.kernels._launch import PROGRAMS
from visionbb.kernels.linear_attention import reference
from visionbb.kernels.linear_attention.form import FEATURE_MAPS, NORMALIZERS, Form
from visionbb.kernels.linear_attention.limits import refuses

pytest.importorskip("triton")

from visionbb.kernels.linear_attention import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


# ---- Forward and backward against the definition --------------------------------------------------------------------

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest entry
EXTRAS = ("key_weight", "local", "gate")
NAMES = ("out", "q", "k", "v", *EXTRAS)


def tensors(H, W, *, B=1, heads=1, d=8, dv=8, dtype=torch.float32, features=None, positive=False, extras=EXTRAS):
    """q, k, v, key_weight, local, gate as they lie in projections, on a map that is a part of a larger one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.randn(B, H + 1, W + 2, *shape, generator=generator).to(DEVICE, dtype)[:, 1:, 1:-1]

    qk, vlg = random(2, heads, d, dtype=features or dtype), random(3, heads, dv)
    q, k = (qk.abs() + 0.1 if positive else qk).unbind(3)
    v, local, gate = vlg.unbind(3)
    given = dict(key_weight=random(heads, dtype=torch.float32).abs(), local=local, gate=gate)
    return q, k, v, *(given[name] if name in extras else None for name in EXTRAS)


def outcome(inputs, form: Form, dout):
    """out and the gradients of all inputs, by the kernels."""
    q, k, v, weight, local, gate = inputs
    out, state = kernels.forward(q, k, v, weight, local, gate, form)
    # As autograd calls it: a local term without a gate has no gradient of its own.
    local = None if gate is None else local
    return out, *kernels.backward(dout, q, k, v, weight, local, gate, state, form)


def expected(inputs, form: Form, dout):
    inputs = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    out = reference.linear_attention(*inputs, form)
    grads = iter(torch.autograd.grad(out, [x for x in inputs if x is not None], dout.double()))
    return out, *(x if x is None else next(grads) for x in inputs)


def check(H=5, W=7, *, feature_map="elu", normalizer="div", rotary=None, scale=0.5, eps=0.5, **kwargs):
    form = Form(feature_map, normalizer, scale, eps, rotary)
    inputs = tensors(H, W, positive=feature_map == "identity", **kwargs)
    dout = torch.randn(inputs[2].shape).to(DEVICE, inputs[2].dtype)
    found, wanted = outcome(inputs, form, dout), expected(inputs, form, dout)
    assert found[0].is_contiguous()
    for name, got, want, x in zip(NAMES, found, wanted, (inputs[2], *inputs)):
        assert (got is None) == (x is None or (name == "local" and inputs[5] is None))
        if got is not None:
            assert (got.shape, got.dtype) == (x.shape, x.dtype), name
            error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-2)
            assert error < TOLERANCE[inputs[2].dtype], name  # False for NaN


@runs_kernels
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_map_and_normalizer(feature_map, normalizer):
    i, j = FEATURE_MAPS.index(feature_map), NORMALIZERS.index(normalizer)
    check(
        feature_map=feature_map, normalizer=normalizer, eps=20.0 if normalizer == "clamp" else 0.5,
        rotary=(None, Rotary.closed(8), Rotary.half_open(8))[(i + j) % 3],
        extras=((), ("key_weight", "local"), ("gate",), EXTRAS)[(i + 2 * j) % 4],
    )


@runs_kernels
@pytest.mark.parametrize(
    "case",
    [
        dict(H=1, W=1),
        dict(H=9, W=8),  # more than a tile
        dict(B=2, heads=3, rotary=Rotary.half_open(24)),  # a head that sees rows and columns
        dict(d=48, dv=24, rotary=Rotary.closed(48)),  # several blocks of channels, a part of a block
        dict(d=5, dv=3),
        dict(d=24, dv=80, rotary=Rotary.closed(12)),  # spans that are parts of a head
        dict(heads=2, d=20, dtype=torch.bfloat16, rotary=Rotary.half_open(40), normalizer="additive"),
        dict(d=72, dv=68, dtype=torch.bfloat16),
        dict(dtype=torch.float16, rotary=Rotary.closed(8), normalizer="clamp", eps=30.0),
        dict(dtype=torch.float16, features=torch.float32, feature_map="identity"),
        dict(dtype=torch.bfloat16, features=torch.float32, d=16, feature_map="identity", rotary=Rotary.closed(8)),
    ],
    ids=str,
)
def test_shape_and_dtype(case):
    check(**case)


@runs_kernels
@pytest.mark.parametrize("normalizer", ["div", "additive"])
@pytest.mark.parametrize("extras", [(), EXTRAS], ids=str)
def test_shares_of_the_sums(normalizer, extras):
    """221 tokens are summed up in shares of 64, whose last is not full."""
    check(13, 17, normalizer=normalizer, extras=extras)


@st.composite
def cases(draw):
    heads, d = draw(st.integers(1, 2)), draw(st.integers(1, 20))
    rotary = [None]
    if d % 4 == 0:
        rotary += [Rotary.closed(d), Rotary.half_open(d * heads)]
    return dict(
        H=draw(st.integers(1, 9)), W=draw(st.integers(1, 9)), heads=heads, d=d, dv=draw(st.integers(1, 20)),
        feature_map=draw(st.sampled_from(FEATURE_MAPS)), normalizer=draw(st.sampled_from(NORMALIZERS)),
        rotary=draw(st.sampled_from(rotary)), scale=draw(st.sampled_from([1.0, 0.3])),
        eps=draw(st.sampled_from([0.5, 30.0])), extras=draw(st.sets(st.sampled_from(EXTRAS))),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
    )


@runs_kernels
@settings(max_examples=10, deadline=None)
@given(cases())
def test_any_form_on_any_map(case):
    check(**case)


@runs_kernels
def test_float16_does_not_overflow():
    """Features, their sums and the state are far beyond float16; inputs and results are not."""
    for feature_map, normalizer in (("relu", "div"), ("exp", "clamp"), ("relu", "additive")):
        q, k, v, _, _, gate = tensors(10, 20, dtype=torch.float16, extras=("gate",))
        q, k, v = (q * 0.01, k * 0.1 + 14, v + 3) if feature_map == "exp" else (q.abs(), k * 100 + 5000, v * 100)
        form = Form(feature_map, normalizer, 1.0, 1e-6, None)
        inputs, dout = (q, k, v, None, None, gate), torch.randn(v.shape).to(DEVICE, v.dtype)
        for name, got, want in zip(NAMES, outcome(inputs, form, dout), expected(inputs, form, dout)):
            if got is not None and want.abs().max() < 6e4:
                error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-2)
                assert error < 1e-2, (feature_map, name)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_without_features_give_no_nan(dtype):
    inputs = [torch.zeros(1, 4, 4, 2, 8, device=DEVICE, dtype=dtype) for _ in range(3)]
    for normalizer in NORMALIZERS:
        form = Form("relu", normalizer, 1.0, 1e-6, None)
        found = outcome((*inputs, None, None, None), form, torch.ones_like(inputs[2]))
        assert all(x.isfinite().all() for x in found if x is not None)


@runs_kernels
def test_channels_that_are_not_contiguous_are_copied():
    q, k, v = torch.randn(3, 1, 8, 5, 6, 1, device=DEVICE).transpose(2, -1)
    form = Form("elu", "div", 1.0, 1e-6, None)
    gate = torch.rand(1, 1, 5, 6, 1, device=DEVICE).transpose(1, -1).expand_as(v)
    out, _ = kernels.forward(q, k, v, None, None, gate, form)
    torch.testing.assert_close(out, reference.linear_attention(q, k, v, None, None, gate, form))


@runs_kernels
def test_empty_batch():
    q = torch.randn(0, 5, 5, 2, 8, device=DEVICE)
    found = outcome((q, q, q, None, None, None), Form("elu", "additive", 1.0, 1e-6, None), q)
    assert all(x.shape == q.shape for x in found[:4])


# ---- Behind the public function -------------------------------------------------------------------------------------

@runs_kernels
@pytest.mark.parametrize("gated", [False, True])
def test_the_op_takes_the_kernels(gated):
    q, k, v, weight, local, gate = (
        x.detach().requires_grad_() for x in tensors(5, 6, heads=2, d=4, dv=6, dtype=torch.float32)
    )
    used = dict(key_weight=weight, local=local) | (dict(gate=gate) if gated else {})
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            out = linear_attention(q, k, v, feature_map="exp", rotary=Rotary.closed(4), **used)
            results.append((out, *torch.autograd.grad(out.sin().sum(), [q, k, v, *used.values()])))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@runs_kernels
def test_what_the_kernels_refuse():
    q = torch.randn(1, 2, 2, 1, 4, device=DEVICE, dtype=torch.float64)
    with use("triton"), pytest.raises(RuntimeError, match="float16 and bfloat16, got q in"):
        linear_attention(q, q, q)


def test_reasons_to_refuse():
    form = Form("elu", "div", 1.0, 1e-6, None)
    q = torch.empty(1, 2, 2, 4, 8)
    assert refuses(q, q, form) is None
    assert "got q in torch.float64" in refuses(q.double(), q.double(), form)
    assert "d up to 256 and dv up to 128, got 8 and 129" in refuses(q, torch.empty(1, 2, 2, 4, 129), form)
    odd = torch.empty(1, 2, 2, 4, 3)
    assert refuses(odd, q, form) is None
    assert "head_dim of 3" in refuses(odd, q, form._replace(rotary=Rotary.half_open(12)))


# ---- Launches -------------------------------------------------------------------------------------------------------

@given(
    B=st.integers(1, 300), H=st.integers(1, 400), W=st.integers(1, 400), heads=st.integers(1, 24),
    d=st.sampled_from([8, 24, 32, 64, 96, 192]),
)
@settings(deadline=None)
def test_shares_cover_the_tokens_and_keep_the_gpu_busy(B, H, W, heads, d):
    x = torch.empty(B, H, W, heads, d, device="meta", dtype=torch.bfloat16)
    y = torch.empty(B, H, W, heads, min(d, 96), device="meta", dtype=torch.bfloat16)
    launch, partial = kernels.sums_launch(x, y, None, (None, None, None), 1.0, Form("elu", "div", 1.0, 1e-6, None))
    splits, share = launch.arguments["splits"], launch.arguments["share"]
    assert (splits - 1) * share < H * W <= splits * share
    assert len(partial) == splits
    assert launch.programs >= min(PROGRAMS // 2, B * heads * (H * W // (16 * d)))
    assert splits == 1 or partial.numel() * 4 <= (x.numel() + y.numel()) * 2 / 7


def test_one_head_of_a_large_map_is_enough_work():
    x = torch.empty(2, 256, 256, 1, 64, device="meta", dtype=torch.bfloat16)
    launch, _ = kernels.sums_launch(x, x, None, (None, None, None), 1.0, Form("elu", "div", 1.0, 1e-6, None))
    assert launch.programs == 256
