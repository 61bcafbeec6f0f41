"""The Triton kernels of `token_merge` against its definition.

They run on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import token_merge, token_unmerge, use
from visionbb.kernels.token_merge import portable, reference
from visionbb.kernels.token_merge.limits import refuses

pytest.importorskip("triton")

from visionbb.kernels.token_merge import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest entry


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@st.composite
def cases(draw):
    return dict(
        shape=(draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 300))),
        used=draw(st.integers(1, 40)), weight=draw(st.sampled_from([None, "float32", "like x"])),
        dtype=draw(st.sampled_from(list(TOLERANCE))), seed=draw(st.integers(0, 999)),
    )


def arguments(case):
    """x a part of a wider tensor, its tokens spread over the first `used` destinations."""
    (B, N, M, C), dtype = case["shape"], case["dtype"]
    generator = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(B, N + 1, 2 * C, generator=generator).to(DEVICE, dtype)[:, 1:, C:]
    index = torch.randint(0, min(M, case["used"]), (B, N), generator=generator).to(DEVICE)
    weight = torch.rand(B, N, generator=generator) + 0.1
    weight *= torch.rand(B, N, generator=generator) > 0.1  # some are zero
    kind = {None: None, "float32": torch.float32, "like x": dtype}[case["weight"]]
    return x, index, M, None if kind is None else weight.to(DEVICE, kind)


def close(got, want, dtype):
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1)


@runs_kernels
@settings(max_examples=25, deadline=None)
@given(cases())
def test_forward_equals_reference(case):
    x, index, M, weight = arguments(case)
    merged, total = kernels.token_merge(x, index, M, weight)
    want, wanted_total = reference.token_merge(x.double(), index, M, None if weight is None else weight.double())
    assert merged.dtype == x.dtype
    assert total.dtype == torch.float32
    close(merged, want, x.dtype)
    close(total, wanted_total, torch.float32)


@runs_kernels
@settings(max_examples=25, deadline=None)
@given(cases(), st.booleans())
def test_backward_equals_portable(case, asked):
    """Which is tested against the definition in float64."""
    x, index, M, weight = arguments(case)
    merged, total = kernels.token_merge(x, index, M, weight)
    generator = torch.Generator().manual_seed(case["seed"])
    dmerged, dtotal = (torch.randn(t.shape, generator=generator).to(t) for t in (merged, total))
    kept = (x, merged) if asked and weight is not None else (None, None)
    args = dmerged, dtotal, kept[0], index, weight, kept[1], total
    got, want = kernels.token_merge_backward(*args), portable.token_merge_backward(*args)
    close(got[0], want[0], x.dtype)
    if kept[0] is None:
        assert got[1] is want[1] is None
    else:
        assert got[1].dtype == weight.dtype
        close(got[1], want[1], weight.dtype)


@runs_kernels
def test_the_ops_take_the_kernels():
    x, index = torch.randn(2, 20, 8, device=DEVICE, requires_grad=True), torch.randint(0, 7, (2, 20), device=DEVICE)
    weight = (torch.rand(2, 20, device=DEVICE) + 0.1).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with use(backend):
            merged, total = token_merge(x.transpose(1, 2).contiguous().transpose(1, 2), index, 7, weight)
            back = token_unmerge(merged, index)
            results.append(torch.autograd.grad(back.sin().sum() + total.square().sum(), (x, weight)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with use("triton"):
        assert token_merge(x[:0], index[:0], 7)[0].shape == (0, 7, 8)
        with pytest.raises(RuntimeError, match="float16 and bfloat16, got"):
            token_merge(x.double(), index, 7)


def test_reasons_to_refuse():
    assert refuses(torch.empty(1, 2, 3)) is None
    assert "got torch.float64" in refuses(torch.empty(1, 2, 3, dtype=torch.float64))
