"""The Triton kernels of `na2d` against its definition, forward and backward.

The kernels run on a GPU, or under Triton's interpreter, which must be chosen before Triton is imported: without a GPU,
one test runs this file once more in a process of its own that has chosen it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels.neighborhood import reference
from visionbb.kernels.neighborhood.tiling import CHUNK, choose, spans
from visionbb.kernels.neighborhood.window import Window, attended_pairs, axis_range

triton = pytest.importorskip("triton")
tl = triton.language

from visionbb.kernels.neighborhood import triton as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


# ---- Forward and backward against the definition --------------------------------------------------------------------

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest entry


def check(
    H, W, kernel, *, B=1, heads=1, head_dim=8, dtype=torch.float32, bias=True, lse_gradient=True, packed=True,
    **geometry,
):
    window = Window((kernel, kernel) if isinstance(kernel, int) else kernel, **geometry)
    torch.manual_seed(0)
    qkv = torch.randn(B, H, W, 3, heads, head_dim).to(DEVICE, dtype)
    q, k, v = qkv.unbind(3) if packed else (x.contiguous() for x in qkv.unbind(3))
    rpb = torch.randn(heads, *(2 * k - 1 for k in window.kernel), device=DEVICE) if bias else None
    dout = torch.randn(q.shape).to(DEVICE, dtype)
    dlse = torch.randn(q.shape[:-1], device=DEVICE) if lse_gradient else None
    scale = head_dim**-0.5

    out, lse = kernels.forward(q, k, v, rpb, window, scale)
    dqkv = torch.full_like(qkv, float("nan"))
    drpb = kernels.backward(dout, dlse, q, k, v, rpb, out, lse, window, scale, *dqkv.unbind(3))
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (drpb is None) == (rpb is None)

    inputs = [None if x is None else x.double().requires_grad_() for x in (q, k, v, rpb)]
    expected = reference.na2d(*inputs, window, scale)
    inputs = [x for x in inputs if x is not None]
    gradients = [dout.double(), torch.zeros_like(expected[1]) if dlse is None else dlse.double()]
    expected += torch.autograd.grad(expected, inputs, gradients)
    for found, want in zip((out, lse, *dqkv.unbind(3), drpb), expected, strict=False):
        error = (found.double() - want).abs().max() / want.abs().max().clamp(min=1e-2)
        assert error < TOLERANCE[dtype]  # False for NaN


@runs_kernels
@pytest.mark.parametrize(
    "case",
    [
        dict(H=9, W=10, kernel=7, heads=2),
        dict(H=7, W=7, kernel=7, B=2),  # a window is the map
        dict(H=6, W=9, kernel=3, dilation=(2, 3)),  # ... or, for one axis, the group
        dict(H=7, W=9, kernel=2, dilation=(3, 2)),  # ragged groups
        dict(H=9, W=7, kernel=(4, 6)),
        dict(H=11, W=5, kernel=(5, 3), stride=(2, 3)),
        dict(H=9, W=12, kernel=(4, 5), dilation=(2, 1), causal=(True, False), bias=False),
        dict(H=9, W=12, kernel=(4, 5), dilation=(1, 2), stride=(3, 2), causal=(True, True), bias=False),
        dict(H=9, W=12, kernel=5, disc=True, bias=False),
        dict(H=7, W=9, kernel=7, dilation=(2, 1), disc=True),
        dict(H=5, W=7, kernel=7, dilation=(2, 3), clip=True),
        dict(H=1, W=1, kernel=7, dilation=(2, 3), clip=True),
        dict(H=5, W=22, kernel=(3, 7)),  # a tile of keys that 17 columns of queries see
        dict(H=3, W=20, kernel=(3, 17)),  # wider than a chunk
    ],
    ids=str,
)
def test_geometry(case):
    check(**case)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_head_dim_and_dtype(head_dim, dtype):
    check(5, 9, 3, head_dim=head_dim, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize("option", [dict(packed=False), dict(bias=False), dict(lse_gradient=False)], ids=str)
def test_options(option):
    check(9, 5, 3, head_dim=48, dtype=torch.float16, **option)


@runs_kernels
def test_programs_that_take_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "PARTIAL_PROGRAMS", 3)
    check(9, 9, 3, B=2, dtype=torch.bfloat16)


@runs_kernels
def test_channels_that_are_not_contiguous_are_copied():
    q, k, v = torch.randn(3, 1, 8, 5, 6, 1, device=DEVICE).transpose(2, -1)
    window = Window((3, 3), clip=True)
    out, _ = kernels.forward(q, k, v, None, window, 1.0)
    torch.testing.assert_close(out, reference.na2d(q, k, v, None, window, 1.0)[0])


@runs_kernels
def test_empty_batch():
    q = torch.randn(0, 5, 5, 2, 8, device=DEVICE)
    rpb, window = torch.randn(2, 5, 5, device=DEVICE), Window((3, 3))
    out, lse = kernels.forward(q, q, q, rpb, window, 1.0)
    assert out.shape == q.shape
    drpb = kernels.backward(out, lse, q, q, q, rpb, out, lse, window, 1.0, *(torch.empty_like(q) for _ in range(3)))
    assert torch.equal(drpb, torch.zeros_like(rpb))


@st.composite
def geometries(draw):
    pair = lambda strategy: tuple(draw(strategy) for _ in range(2))  # noqa: E731
    if draw(st.booleans()):
        kernel = 2 * draw(st.integers(1, 3)) + 1
        return Window((kernel, kernel), pair(st.integers(1, 2)), disc=True)
    kernel = pair(st.integers(1, 6))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    return Window(kernel, pair(st.integers(1, 3)), stride, pair(st.booleans()), clip=True)


@runs_kernels
@settings(max_examples=6, deadline=None)
@given(H=st.integers(1, 10), W=st.integers(1, 10), window=geometries())
def test_any_window_on_any_map(H, W, window):
    check(H, W, bias=not any(window.causal), **window._asdict())


# ---- Ranges and tilings ---------------------------------------------------------------------------------------------

@triton.jit
def ranges_kernel(found, length, dilation, AXIS: tl.constexpr, TILE: tl.constexpr):
    group, size, first = kernels._tile(tl.program_id(0), length, dilation, TILE)
    found += 7 * tl.program_id(0)
    tl.store(found, group)
    tl.store(found + 1, size)
    tl.store(found + 2, first)
    low, high = kernels._keys(first, size, AXIS, TILE)
    tl.store(found + 3, low)
    tl.store(found + 4, high)
    low, high = kernels._queries(first, size, AXIS, TILE)
    tl.store(found + 5, low)
    tl.store(found + 6, high)


@runs_kernels
@settings(max_examples=60 if INTERPRETED else 20, deadline=None)
@given(length=st.integers(1, 40), tile=st.sampled_from([4, 8]), window=geometries())
def test_ranges_of_a_tile(length, tile, window):
    """What a tile walks over is exactly what its windows touch, along both axes of `window`."""
    for axis in (0, 1):
        kernel, dilation, stride = window.kernel[axis], window.dilation[axis], window.stride[axis]
        programs = dilation * -(-length // (dilation * tile))
        found = torch.zeros(programs, 7, dtype=torch.int32, device=DEVICE)
        ranges_kernel[(programs,)](found, length, dilation, (kernel, stride, window.causal[axis], window.disc), tile)
        start, count = axis_range(length, kernel, dilation, stride, window.causal[axis], window.disc)
        counted = {inverse: [] for inverse in (False, True)}
        for group, size, first, *ranges in found.tolist():
            start_g, end_g = start[group::dilation], (start + count)[group::dilation]
            assert size == len(start_g)
            members = range(first, min(first + tile, size))
            keys = [j for j in range(size) if any(start_g[q] <= j < end_g[q] for q in members)]
            queries = [q for q in range(size) if any(start_g[q] <= j < end_g[q] for j in members)]
            for touched, (low, high) in ((keys, ranges[:2]), (queries, ranges[2:])):
                assert touched == list(range(low, high))
            if members:
                counted[False].append(len(keys))
                counted[True].append(len(queries))
        for inverse, numbers in counted.items():
            assert sorted(spans(length, window, axis, tile, inverse)) == sorted(numbers)


@given(
    H=st.integers(1, 40), W=st.integers(1, 40), window=geometries(),
    tensor_cores=st.booleans(), inverse=st.booleans(), toeplitz=st.booleans(),
)
@settings(deadline=None)
def test_any_choice_of_tiling_covers_the_work(H, W, window, tensor_cores, inverse, toeplitz):
    tiling = choose(H, W, window, tensor_cores=tensor_cores, inverse=inverse, toeplitz=toeplitz)
    assert tiling.executed(H, W, window, inverse) >= attended_pairs(H, W, window)
    if toeplitz:
        assert max(spans(W, window, 1, tiling.tile[1], inverse)) <= tiling.chunk[1]
        assert tiling.tile[0] * tiling.chunk[0] >= 16
    else:
        assert tiling.chunk[0] * tiling.chunk[1] == CHUNK


@pytest.mark.parametrize(
    ("side", "dilation", "most"), [(56, 1, 4.4), (28, 1, 4.9), (14, 1, 3.9), (7, 1, 1.75), (56, 8, 1.75), (96, 13, 1.6)]
)
def test_executed_over_useful_work(side, dilation, most):
    window = Window((7, 7), (dilation, dilation))
    assert choose(side, side, window, tensor_cores=True).work(side, side, window, inverse=False) < most
