"""The Triton kernels of `attention_column_mean` against its definition.

They run on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import attention_column_mean, use
from visionbb.kernels.column_mean import reference
from visionbb.kernels.column_mean.limits import refuses

pytest.importorskip("triton")

from visionbb.kernels.column_mean import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@st.composite
def cases(draw):
    return dict(
        shape=(draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 80))),
        queries=draw(st.integers(1, 140)), keys=draw(st.integers(1, 140)), bias=draw(st.sampled_from([None, 0.0, 0.4])),
        weight=draw(st.booleans()), dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 999)),
    )


@runs_kernels
@settings(max_examples=20, deadline=None)
@given(cases())
def test_kernels_equal_reference(case):
    (B, heads, d), dtype = case["shape"], case["dtype"]
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, k = (random(B, n, 2, heads, d)[:, :, 0].transpose(1, 2) for n in (case["queries"], case["keys"]))
    bias = None if case["bias"] is None else random(B, case["keys"])
    if case["bias"]:  # a key of every tile may lie at -inf, and whole tiles
        taken = torch.rand(B, case["keys"], generator=generator) < case["bias"]
        taken[:, :70] = True
        taken[:, -1] = False
        bias = bias.masked_fill(taken.to(DEVICE), float("-inf"))
    weight = random(B, heads, case["queries"]) if case["weight"] else None
    got = kernels.attention_column_mean(q, k, bias, weight, d**-0.5)
    assert got.dtype == torch.float32
    bias, weight = (None if x is None else x.double() for x in (bias, weight))
    want = reference.attention_column_mean(q.double(), k.double(), bias, weight, d**-0.5)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))


@runs_kernels
def test_the_op_takes_the_kernels():
    q, k = torch.randn(2, 2, 2, 8, 20, device=DEVICE).transpose(-2, -1)
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            results.append(attention_column_mean(q, k, scale=0.3))
    torch.testing.assert_close(*results)
    with use("triton"):
        assert attention_column_mean(q[:0], k[:0]).shape == (0, 2, 20)
        with pytest.raises(RuntimeError, match="float16 and bfloat16, got"):
            attention_column_mean(q.double(), k.double())


def test_reasons_to_refuse():
    assert refuses(torch.empty(1, 2, 3, 4)) is None
    assert "got torch.float64" in refuses(torch.empty(1, 2, 3, 4, dtype=torch.float64))
