"""The Triton kernels of `ssd` against its definition, forward and backward.

The kernels run on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import ssd, use
from visionbb.kernels.ssd import reference
from visionbb.kernels.ssd.limits import refuses

pytest.importorskip("triton")

from visionbb.kernels.ssd import triton as kernels

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
NAMES = ("out", "x", "dt", "A", "B", "C", "D")


def tensors(L, *, batch=1, heads=2, P=8, groups=1, N=8, skip=True, dtype=torch.float32, steps=torch.float32):
    """x, dt, A, B, C, D; x, B and C as they lie in one projection, on tokens that are a part of more."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    projection = random(batch, L + 3, heads * P + 2 * groups * N, dtype=dtype)[:, 2:-1]
    x, B, C = projection.split([heads * P, groups * N, groups * N], -1)
    x, B, C = x.unflatten(-1, (heads, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (groups, N))
    dt, A = random(batch, L, heads).exp().to(steps), -random(heads).exp()
    return x, dt, A, B, C, random(heads) if skip else None


def expected(inputs, dout):
    inputs = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    out = reference.ssd(*inputs, causal=False)
    grads = iter(torch.autograd.grad(out, [t for t in inputs if t is not None], dout.double()))
    return out, *(t if t is None else next(grads) for t in inputs)


def check(L=35, **kwargs):
    inputs = tensors(L, **kwargs)
    x = inputs[0]
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = kernels.ssd(*inputs), *kernels.ssd_backward(dout, *inputs)
    assert found[0].dtype == torch.float32
    wanted = dict(zip(NAMES, expected(inputs, dout), strict=True))
    # A and D get sums over all tokens, which may cancel out: their errors are those of the terms.
    terms = {"A": inputs[1].double() * wanted["dt"] / inputs[2].double(), "D": (x.double() * dout).sum(-1)}
    for name, got, t in zip(NAMES, found, (x, *inputs), strict=True):
        want = wanted[name]
        assert (got is None) == (t is None)
        if got is not None:
            assert got.shape == t.shape, name
            size = terms[name].abs().sum((0, 1)) if name in terms else want.abs()
            error = (got.double() - want).abs().max() / size.max().clamp(min=1e-2)
            assert error < TOLERANCE[x.dtype], name  # False for NaN


@runs_kernels
@pytest.mark.parametrize(
    "case",
    [
        dict(L=1),
        dict(L=65),  # a tile and a token
        dict(L=31, batch=2, heads=6, groups=3),
        dict(P=24, N=48),  # parts of a block of rows and of channels
        dict(P=80, N=72),  # several blocks
        dict(P=5, N=3, skip=False),
        dict(dtype=torch.bfloat16, P=48, N=48),
        dict(dtype=torch.bfloat16, steps=torch.bfloat16, heads=4, groups=2),
        dict(dtype=torch.float16, N=20),
        dict(L=34, heads=1, P=13, N=4, skip=False, dtype=torch.bfloat16),  # the gradient of A cancels out
    ],
    ids=str,
)
def test_shape_and_dtype(case):
    check(**case)


@runs_kernels
@pytest.mark.parametrize("skip", [False, True])
def test_shares_of_the_sums(skip):
    """221 tokens are summed up in shares, whose last is not full."""
    inputs = tensors(221, skip=skip)
    assert len(kernels.sums_launch(inputs[3], inputs[0], None, torch.float32)[1]) > 1
    check(221, skip=skip)


@st.composite
def cases(draw):
    groups = draw(st.integers(1, 2))
    return dict(
        L=draw(st.integers(1, 80)), batch=draw(st.integers(1, 2)), groups=groups,
        heads=groups * draw(st.integers(1, 2)), P=draw(st.integers(1, 20)), N=draw(st.integers(1, 20)),
        skip=draw(st.booleans()), dtype=draw(st.sampled_from(list(TOLERANCE))),
    )


@runs_kernels
@settings(max_examples=10, deadline=None)
@given(cases())
def test_any_sizes(case):
    check(**case)


@runs_kernels
def test_states_beyond_float16():
    x, dt, A, B, C, D = tensors(300, dtype=torch.float16)
    inputs = (x.abs() * 50, dt + 5, A - 1, B.abs() * 20, C.abs(), D)
    out, wanted = kernels.ssd(*inputs), reference.ssd(*(t.double() for t in inputs), causal=False)
    assert wanted.max() > 65504
    assert (out - wanted).abs().max() < 1e-3 * wanted.abs().max()


@runs_kernels
def test_backward_is_deterministic():
    inputs = tensors(221, heads=4, groups=2)
    once, twice = (kernels.ssd_backward(torch.ones_like(inputs[0]), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@runs_kernels
def test_empty_batch():
    inputs = tensors(5, batch=0)
    assert kernels.ssd(*inputs).shape == inputs[0].shape
    for grad, t in zip(kernels.ssd_backward(inputs[0], *inputs), inputs, strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


# ---- Behind the public function -------------------------------------------------------------------------------------

@runs_kernels
@pytest.mark.parametrize("skip", [False, True])
def test_the_op_takes_the_kernels(skip):
    """On a map whose channels do not come last in memory."""
    x, dt, A, B, C, D = tensors(30, heads=3, skip=skip)
    x, dt, B, C = (t.unflatten(1, (5, 6)) for t in (x, dt, B, C))
    x, B = x.transpose(-1, -2).contiguous().transpose(-1, -2), B.transpose(1, -1).contiguous().transpose(1, -1)
    inputs = [t.detach().requires_grad_() for t in (x, dt, A, B, C, D) if t is not None]
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            out = ssd(*inputs)
            ramp = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
            results.append((out, *torch.autograd.grad((out * ramp).sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@runs_kernels
def test_what_the_kernels_refuse():
    x, dt, A, B, C, D = tensors(4)
    with use("triton"):
        with pytest.raises(RuntimeError, match=r"float16 and bfloat16, got torch.float64"):
            ssd(*(t.double() for t in (x, dt, A, B, C, D)))
        with pytest.raises(RuntimeError, match="causal form of ssd has no kernels"):
            ssd(x, dt, A, B, C, D, causal=True)


def test_reasons_to_refuse():
    x, B = torch.empty(1, 4, 2, 128), torch.empty(1, 4, 1, 256)
    assert refuses(x, B) is None
    assert "got torch.float64" in refuses(x.double(), B.double())
    assert "N up to 256 and P up to 128, got 257 and 128" in refuses(x, torch.empty(1, 4, 1, 257))
    assert "got 256 and 129" in refuses(torch.empty(1, 4, 2, 129), B)
