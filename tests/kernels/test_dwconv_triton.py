"""The Triton kernels of `dwconv2d` against its definition, forward and backward.

The kernels run on a GPU, or under Triton's interpreter, which must be chosen before Triton is imported: without a GPU,
one test runs this file once more in a process of its own that has chosen it.
"""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import dwconv2d, use
from visionbb.kernels.dwconv import reference

pytest.importorskip("triton")

from visionbb.kernels.dwconv import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "passed" in run.stdout


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest entry


def check(B, H, W, C, kernel, dilation=1, *, residual=False, bias=True, dtype=torch.float32, part=False):
    """All three gradients too; with `part`, of a map inside a wider one, whose gradient has other strides again."""
    torch.manual_seed(0)
    wide = torch.randn(B, H, W, 3 * C if part else C).to(DEVICE, dtype)
    x = wide[..., C : 2 * C] if part else wide
    weight, b = torch.randn(C, 1, *kernel).to(DEVICE, dtype), torch.randn(C).to(DEVICE, dtype) if bias else None
    dout = torch.randn(B, H, W, 2 * C if part else C).to(DEVICE, dtype)[..., :C]

    out = kernels.forward(x, weight, b, dilation, residual)
    dx = kernels.forward(dout, weight.flip(2, 3), None, dilation, residual)
    dweight, dbias = kernels.weight_gradient(dout, x, kernel, dilation)
    assert out.is_contiguous()
    assert {t.dtype for t in (out, dx, dweight, dbias)} == {dtype}

    exact = [t.double().requires_grad_() for t in (x, weight, torch.zeros(C, device=DEVICE) if b is None else b)]
    expected = reference.dwconv2d(*exact, dilation, residual)
    expected = expected, *torch.autograd.grad(expected, exact, dout.double())
    for found, want in zip((out, dx, dweight, dbias), expected, strict=True):
        error = (found.double() - want).abs().max() / want.abs().max().clamp(min=1e-2)
        assert error < TOLERANCE[dtype]  # False for NaN


@runs_kernels
@pytest.mark.parametrize(
    "case",
    [
        dict(B=2, H=7, W=7, C=40, kernel=(3, 3), residual=True),  # two blocks of channels, the second not full
        dict(B=1, H=9, W=17, C=8, kernel=(3, 5)),  # two tiles a side
        dict(B=1, H=3, W=4, C=3, kernel=(7, 7), dilation=2, bias=False),  # larger than the map
        dict(B=1, H=10, W=5, C=4, kernel=(3, 3), dilation=3, residual=True),  # ragged dilation groups
        dict(B=1, H=2, W=1, C=4, kernel=(3, 1), dilation=5),  # groups without a row
        dict(B=1, H=5, W=3, C=4, kernel=(11, 1)),
        dict(B=1, H=2, W=12, C=4, kernel=(1, 11), part=True),
    ],
    ids=str,
)
def test_geometry(case):
    check(**case)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(1, 4, 5, 12, (3, 3), residual=True, dtype=dtype, part=True)


@runs_kernels
def test_programs_that_take_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "WEIGHT_PROGRAMS", 6)
    check(3, 9, 3, 4, (3, 3))  # 6 tiles, of 2 shares


@runs_kernels
def test_channels_that_are_not_contiguous_are_copied():
    x, weight = torch.randn(1, 4, 3, 5, device=DEVICE).permute(0, 2, 3, 1), torch.randn(4, 1, 3, 3, device=DEVICE)
    out = kernels.forward(x, weight, None, 1, False)
    torch.testing.assert_close(out, reference.dwconv2d(x, weight, None, 1, False))


@runs_kernels
def test_empty_batch():
    x, weight = torch.randn(0, 5, 5, 4, device=DEVICE), torch.randn(4, 1, 3, 3, device=DEVICE)
    assert kernels.forward(x, weight, None, 1, True).shape == x.shape
    dweight, dbias = kernels.weight_gradient(x, x, (3, 3), 1)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros(4, device=DEVICE))


@runs_kernels
def test_the_public_op_reaches_them(monkeypatch):
    calls = []
    for name in ("forward", "weight_gradient"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1])
    x, weight = torch.randn(1, 3, 4, 4, device=DEVICE), torch.randn(4, 1, 3, 3, device=DEVICE, requires_grad=True)
    with use("triton"):
        with torch.no_grad():
            dwconv2d(x, weight)
        dwconv2d(x.requires_grad_(), weight).sum().backward()
    assert calls == ["forward", "forward", "forward", "weight_gradient"]


@runs_kernels
@settings(max_examples=6, deadline=None)
@given(
    H=st.integers(1, 10), W=st.integers(1, 10), C=st.integers(1, 8), dilation=st.integers(1, 3),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 2), residual=st.booleans(),
)
def test_any_map(H, W, C, dilation, kernel, residual):
    check(1, H, W, C, kernel, dilation, residual=residual)
