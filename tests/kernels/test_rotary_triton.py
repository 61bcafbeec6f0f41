"""The Triton kernel of `rotary2d` against its definition.

It runs on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import Rotary, rotary2d, use
from visionbb.kernels.rotary import reference
from visionbb.kernels.rotary.limits import refuses

pytest.importorskip("triton")

from visionbb.kernels.rotary import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest entry


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel runs in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@st.composite
def cases(draw):
    heads, head_dim = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 12))
    spans = [span for span in range(4, heads * head_dim + 1, 4) if heads * head_dim % span == 0]
    span = draw(st.sampled_from(spans or [None]))
    if span is None:  # one head of one pair, or of an odd number of pairs
        heads, span = 2 * heads, 2 * heads * head_dim
    return dict(
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 40)), heads, head_dim),
        rotary=draw(st.sampled_from([Rotary.closed, Rotary.half_open]))(span),
        inverse=draw(st.booleans()), dtype=draw(st.sampled_from(list(TOLERANCE))),
    )


@runs_kernels
@settings(max_examples=40, deadline=None)
@given(cases())
def test_kernel_equals_reference(case):
    shape, rotary, inverse, dtype = case.values()
    packed = torch.randn(shape[0], shape[1] + 1, shape[2] + 1, 3, *shape[3:]).to(DEVICE, dtype)
    x = packed[:, 1:, :-1, 1]  # as it lies in a projection, of a part of a map
    out = kernels.rotary2d(x, rotary, inverse)
    assert out.is_contiguous()
    assert out.dtype == dtype
    want = reference.rotary2d(x.double(), rotary, inverse)
    assert (out.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@runs_kernels
def test_angles_hold_far_out():
    x = torch.randn(1, 2, 700, 1, 8, device=DEVICE)
    out = kernels.rotary2d(x, Rotary.closed(8), False)
    torch.testing.assert_close(out.double(), reference.rotary2d(x.double(), Rotary.closed(8)), rtol=1e-5, atol=1e-6)


@runs_kernels
def test_channels_that_are_not_contiguous_are_copied():
    x = torch.randn(1, 8, 5, 6, 2, device=DEVICE).transpose(1, -1)
    torch.testing.assert_close(
        kernels.rotary2d(x, Rotary.closed(8), True), reference.rotary2d(x, Rotary.closed(8), True)
    )


@runs_kernels
def test_empty_batch():
    assert kernels.rotary2d(torch.randn(0, 3, 3, 1, 8, device=DEVICE), Rotary.closed(8), False).shape[0] == 0


@runs_kernels
def test_the_op_takes_the_kernel():
    x = torch.randn(2, 3, 4, 2, 8, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            out = rotary2d(x, Rotary.half_open(16))
            results.append((out, *torch.autograd.grad(out.sin().sum(), x)))
    torch.testing.assert_close(*results)
    with use("triton"), pytest.raises(RuntimeError, match="float16 and bfloat16, got"):
        rotary2d(x.double(), Rotary.closed(8))


def test_reasons_to_refuse():
    x = torch.empty(1, 2, 2, 4, 8)
    assert refuses(x) is None
    assert "got torch.float64" in refuses(x.double())
    assert "up to 1024, got 1026" in refuses(torch.empty(1, 2, 2, 4, 1026))
    assert "head_dim of 3" in refuses(x[..., :3])
