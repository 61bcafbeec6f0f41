"""The Triton kernels of `bi_wkv` against its definition, forward and backward.

The kernels run on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import bi_wkv, use
from visionbb.kernels.wkv import reference
from visionbb.kernels.wkv.limits import refuses

pytest.importorskip("triton")

from visionbb.kernels.wkv import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


# ---- Forward and backward against the definition --------------------------------------------------------------------

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest entry
NAMES = ("out", "w", "u", "k", "v")


def tensors(L, *, batch=1, C=3, decay=0.3, keys=1.0, dtype=torch.float32, seed=0):
    """w, u in float32; k, v as they lie in one projection, on tokens that are a part of more."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    k, v = random(batch, L + 3, 2 * C)[:, 2:-1].to(dtype).chunk(2, -1)
    return decay * random(C), random(C), keys * k, v


def expected(inputs, dout, eps):
    """The definition in logarithms, as its exponentials overflow; eps is the weight of one more token, of value 0."""
    w, u, k, v = inputs = [t.detach().double().requires_grad_() for t in inputs]
    t = torch.arange(k.shape[1], device=DEVICE)
    distance = (t[:, None] - t).abs()[..., None]
    exponents = torch.where(distance == 0, u, (1 - distance) * w) + k[:, None]
    last = torch.full_like(exponents[:, :, :1], eps).log()
    weights = torch.cat([exponents, last], 2).softmax(2)[:, :, :-1]
    out = (weights * v[:, None]).sum(2)
    return out, *torch.autograd.grad(out, inputs, dout.double())


@runs_kernels
def test_expectations_are_the_definition():
    inputs = [t.double() for t in tensors(9)]
    torch.testing.assert_close(expected(inputs, inputs[3], 0.5)[0], reference.bi_wkv(*inputs, 0.5))


def check(L, *, eps=1e-6, **kwargs):
    inputs = tensors(L, **kwargs)
    v = inputs[3]
    dout = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, v.dtype)
    found = kernels.bi_wkv(*inputs, eps), *kernels.bi_wkv_backward(dout, *inputs, eps)
    assert found[0].dtype == v.dtype
    exponents = (inputs[2].abs().max() + L * inputs[0].abs().max()).item()
    for name, got, want, t in zip(NAMES, found, expected(inputs, dout, eps), (v, *inputs), strict=True):
        assert got.shape == t.shape, name
        # Gradients are differences of weighted means, whose terms are of the size of 1; w's, times the distance.
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=L if name == "w" else 1)
        assert error < TOLERANCE[v.dtype] + 1e-6 * exponents, name  # False for NaN


@runs_kernels
@pytest.mark.parametrize(
    "case",
    [
        dict(L=1),
        dict(L=kernels.CHUNK + 1, batch=2),
        dict(L=9, C=kernels.BLOCK_C + 1),
        dict(L=17, decay=30.0, eps=0),
        dict(L=17, keys=300.0, decay=5.0, eps=0),
        dict(L=13, dtype=torch.bfloat16),
        dict(L=13, dtype=torch.float16, eps=0.5),
    ],
    ids=str,
)
def test_shape_dtype_and_decay(case):
    check(**case)


@st.composite
def cases(draw):
    return dict(
        L=draw(st.integers(1, 2 * kernels.CHUNK + 1)), C=draw(st.integers(1, 3)),
        decay=draw(st.sampled_from([0.0, 0.1, 5.0, 50.0])), keys=draw(st.sampled_from([0.1, 3.0, 100.0])),
        eps=draw(st.sampled_from([0, 1e-6, 0.5])), dtype=draw(st.sampled_from(list(TOLERANCE))),
        seed=draw(st.integers(0, 999)),
    )


@runs_kernels
@settings(max_examples=3, deadline=None)
@given(cases())
def test_any_sizes_and_exponents(case):
    check(**case)


@runs_kernels
@pytest.mark.parametrize("level", [-900.0, 900.0])
def test_keys_beyond_the_exponentials_range(level):
    """All of them far below 0 or above, and far apart."""
    w, u, k, v = tensors(11, C=2)
    inputs = w, u, k + level + torch.linspace(-200, 200, 11, device=DEVICE)[:, None], v
    wanted = expected(inputs, torch.ones_like(v), 0.0)
    found = kernels.bi_wkv(*inputs, 0.0), *kernels.bi_wkv_backward(torch.ones_like(v), *inputs, 0.0)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)


@runs_kernels
def test_backward_is_deterministic():
    inputs = tensors(9)
    once, twice = (kernels.bi_wkv_backward(torch.ones_like(inputs[3]), *inputs, 1e-6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@runs_kernels
def test_empty_batch():
    inputs = tensors(5, batch=0)
    assert kernels.bi_wkv(*inputs, 1e-6).shape == inputs[3].shape
    for grad, t in zip(kernels.bi_wkv_backward(inputs[3], *inputs, 1e-6), inputs, strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


# ---- Behind the public function -------------------------------------------------------------------------------------

@runs_kernels
def test_the_op_takes_the_kernels():
    w, u, k, v = tensors(12)
    k, v = k.unflatten(1, (3, 4)), v.unflatten(1, (3, 4)).transpose(1, -1).contiguous().transpose(1, -1)
    inputs = [t.detach().requires_grad_() for t in (w, u, k, v)]
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            out = bi_wkv(*inputs)
            results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@runs_kernels
def test_what_the_kernels_refuse():
    w, u, k, v = tensors(4)
    with use("triton"), pytest.raises(RuntimeError, match=r"float16 and bfloat16, got torch.float64"):
        bi_wkv(*(t.double() for t in (w, u, k, v)))


def test_reasons_to_refuse():
    v = torch.empty(1, 4, 2)
    assert refuses(v, 0.0) is None
    assert "got torch.float64" in refuses(v.double(), 1e-6)
    assert "not negative, got -0.5" in refuses(v, -0.5)
