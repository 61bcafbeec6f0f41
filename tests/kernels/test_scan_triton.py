"""The Triton kernels of the scans against their definition, forward and backward.

The kernels run on a GPU, or under Triton's interpreter: without a GPU, one test runs this file once more under it.
"""
from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionbb.kernels import linear_scan, scan_routes, selective_scan, ss2d, use
from visionbb.kernels.scan import reference
from visionbb.kernels.scan.limits import VALUES, refuses, refuses_lines

pytest.importorskip("triton")

from visionbb.kernels.scan import triton as kernels
from visionbb.kernels.scan.triton import STEPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in the process of test_under_the_interpreter"
)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest entry


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


def random_of(seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    return random


def assert_agree(op, tensors, tolerance, seed=1):
    """Outputs and gradients by the kernels, against the definition in float64."""
    def outcome(tensors, backend):
        tensors = [x if x is None else x.detach().requires_grad_() for x in tensors]
        with use(backend):
            outs = op(*tensors)
            outs = outs if isinstance(outs, tuple) else (outs,)
            random = random_of(seed)
            douts = [random(*out.shape).to(out.dtype) for out in outs]
            return *outs, *torch.autograd.grad(outs, [x for x in tensors if x is not None], douts)

    found = outcome(tensors, "triton")
    wanted = outcome([x if x is None else x.double() for x in tensors], "reference")
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-2)
        assert error < tolerance  # False for NaN


# ---- ss2d -----------------------------------------------------------------------------------------------------------

def tensors_of_map(H, W, K, *, B=1, D=4, N=1, R=2, dtype=torch.float32, bias=True, skip=True, share=False, shift=0.0):
    random, G = random_of(0), 1 if share else K
    return [
        random(B, H, W, D, dtype=dtype), random(B, H, W, G * (R + 2 * N), dtype=dtype), random(G, D, R),
        random(G, D) - 1 + shift if bias else None, -random(G, D, N).exp(), random(G, D) if skip else None,
    ]


def check(routes, H=3, W=5, *, merge="sum", permute="all", strided=False, slack=1, **sizes):
    table = routes.to(DEVICE) if isinstance(routes, torch.Tensor) else scan_routes(routes, H, W, device=DEVICE)
    tensors = tensors_of_map(H, W, len(table), **sizes)
    if strided:
        tensors = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    tolerance = slack * TOLERANCE[sizes.get("dtype", torch.float32)]
    assert_agree(lambda *t: ss2d(*t, table, merge=merge, permute=permute), tensors, tolerance)


@runs_kernels
@pytest.mark.parametrize(
    "case",
    [
        dict(routes="cross", H=3, W=7, B=2),  # a tile and a part of one
        dict(routes="cross", H=1, W=1, N=2),
        dict(routes="cross", H=1, W=STEPS + 1, D=35, R=1),  # two blocks of channels, the second not full
        dict(routes="bidirectional", H=4, W=4, N=3, R=17, bias=False, skip=False),  # two blocks of ranks
        dict(routes=("column", "window2"), H=3, W=3, N=8, merge="stack"),  # zeros that decay the state
        dict(routes=("row", "window2_column_reversed"), H=4, W=3, N=16, share=True),
        dict(routes="atrous2", H=5, W=3, N=2, merge="scatter"),
        dict(routes="snake", H=3, W=4, N=2, permute="u", share=True),
        dict(routes=torch.tensor([[-2, 0, -1, 3, -2, 1, -1, 2]], dtype=torch.int32), H=2, W=2, N=2),
        dict(routes="bidirectional", H=2, W=4, strided=True),
    ],
    ids=str,
)
def test_ss2d(case):
    check(**case)


@runs_kernels
@pytest.mark.parametrize(("programs", "chunks"), [(1, 1), (2, 2), (9, 5)])
def test_chunks(monkeypatch, programs, chunks):
    """Of one tile and one of several, the last one with a part of a tile."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    monkeypatch.setattr(kernels, "LEAST_TILES", 1)
    lines = kernels.of_routes(*tensors_of_map(5, 13, 1), scan_routes("row", 5, 13, device=DEVICE), "all")
    assert kernels.Grid.of(lines, True).chunks == chunks
    check("row", 5, 13, N=2)


@runs_kernels
@pytest.mark.parametrize(("routes", "merge"), [("column", "sum"), ("window2", "stack"), ("halves", "scatter")])
def test_long_sequences(monkeypatch, routes, merge):
    """More chunks than the pass that carries states from one to the next takes at once."""
    monkeypatch.setattr(kernels, "LEAST_TILES", 1)
    H, W = 17, 17 if merge != "scatter" else 32
    if routes == "halves":
        table = torch.arange(H * W, dtype=torch.int32, device=DEVICE).view(2, -1)
    else:
        table = scan_routes(routes, H, W, device=DEVICE)
    tensors = tensors_of_map(H, W, len(table), D=3)
    lines = kernels.of_routes(*tensors, table, "all")
    assert kernels.Grid.of(lines, merge == "sum").chunks > STEPS
    assert_agree(lambda *t: ss2d(*t, table, merge=merge), tensors, TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(("row", "column_reversed"), 3, 6, N=2, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize("shift", [30.0, 200.0, -15.0])
def test_time_steps_beyond_the_softplus(shift):
    """Beyond its threshold of 20, beyond the largest power of two, and where only its relative precision counts."""
    check("bidirectional", 2, 9, N=2, shift=shift)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_time_steps_in_half_precision(dtype):
    u, B, C = (random_of(i)(1, 18, size, dtype=dtype) for i, size in enumerate((4, 2, 2)))
    delta, A = (random_of(4)(1, 18, 4) * 30).to(dtype), -random_of(5)(4, 2).exp()
    assert delta.abs().max() > 40
    assert_agree(lambda *t: selective_scan(*t, delta_softplus=True), [u, delta, A, B, C], TOLERANCE[dtype])


@runs_kernels
def test_half_precision_holds_states_beyond_its_range():
    x, proj = torch.full((1, 4, 9, 2), 100.0), torch.full((1, 4, 9, 3), 10.0)
    A, weight = torch.full((1, 2, 1), -1e-4), torch.ones(1, 2, 1)
    tensors = [t.to(DEVICE, torch.float16) for t in (x, proj)] + [t.to(DEVICE) for t in (weight, A)]
    routes = scan_routes("row", 4, 9, device=DEVICE)
    with use("triton"):
        out = ss2d(*tensors[:3], None, tensors[3], None, routes)
    assert out.max() > 65504
    x, proj, weight, A = (t.double() for t in tensors)
    expected = reference.ss2d(x, proj, weight, None, A, None, routes, "sum", "all")
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)


@runs_kernels
def test_nan_is_not_swallowed():
    tensors = tensors_of_map(2, 3, 1)
    tensors[1][0, 0, 1] = torch.nan
    with use("triton"):
        out = ss2d(*tensors, scan_routes("row", 2, 3, device=DEVICE))
    assert out[0].flatten(0, 1).isnan().any(1).tolist() == [False, True, True, True, True, True]


@runs_kernels
def test_every_run_gives_the_same_bits():
    routes = scan_routes("cross", 3, 6, device=DEVICE)
    tensors = [x.requires_grad_() for x in tensors_of_map(3, 6, 4)]
    with use("triton"):
        runs = [torch.autograd.grad(ss2d(*tensors, routes).square().sum(), tensors) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))


@runs_kernels
def test_bad_routes_are_refused():
    routes = torch.tensor([[0, 0, 1]], dtype=torch.int32, device=DEVICE)
    with use("triton"), pytest.raises(ValueError, match=r"routes\[0\] visits token 0 2 times"):
        ss2d(*tensors_of_map(1, 3, 1), routes)


@runs_kernels
@settings(max_examples=5, deadline=None)
@given(
    H=st.integers(1, 5), W=st.integers(1, 5), D=st.sampled_from([1, 5]), N=st.integers(1, 3), R=st.integers(1, 3),
    merge=st.sampled_from(["sum", "stack"]), permute=st.sampled_from(["all", "u"]), share=st.booleans(),
)
def test_any_map(merge, **sizes):
    # The sum over a whole map that is the gradient of a lone parameter may cancel.
    check(("row", "column_reversed"), merge=merge, slack=10, **sizes)


# ---- selective_scan and linear_scan ---------------------------------------------------------------------------------

@runs_kernels
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (16, 6, 3, 1), (17, 2, 1, 16), (33, 4, 2, 3)], ids=str)
def test_selective_scan(monkeypatch, shape, reverse):
    """All inputs, and the last state; the longest one in chunks."""
    L, D, G, N = shape
    monkeypatch.setattr(kernels, "LEAST_TILES", 1 if L > 2 * STEPS else 4)
    random = random_of(L)
    u, delta, z = random(2, L, D), random(2, L, D), random(2, L, D)
    B, C = random(2, L, G, N), random(2, L, G, N)
    tensors = [u, delta, -random(D, N).exp(), B, C, random(D), z, random(D) / 9]
    assert_agree(lambda *t: selective_scan(*t, True, True, reverse=reverse), tensors, TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.parametrize("output", [0, 1])
def test_selective_scan_without_softplus_or_extras(output):
    """Time steps as they are, each output alone, and inputs that are not contiguous."""
    random = random_of(0)
    u, delta = random(2, 3, 20).transpose(1, 2), random(2, 20, 6)[..., ::2].abs() / 2
    B, C = random(2, 20, 8).split(4, 2)
    A = -random(4, 3).exp().T

    def scan(u, delta, A, B, C=C):  # the state knows nothing of C
        return selective_scan(u, delta, A, B, C.to(u.dtype), return_last_state=True)[output]

    assert_agree(scan, [u, delta, A, B, C][: 5 - output], TOLERANCE[torch.float32])


@runs_kernels
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_linear_scan(start, reverse):
    random = random_of(0)
    for L, shape in ((1, (3,)), (STEPS + 3, (35,)), (20, (2, 3))):
        a, b, h0 = random(2, L, *shape).tanh(), random(2, L, *shape), random(2, *shape) if start else None
        assert_agree(
            lambda a, b, h0: linear_scan(a, b, h0=h0, reverse=reverse), [a, b, h0], TOLERANCE[torch.float32]
        )


@runs_kernels
def test_linear_scan_in_half_precision():
    a, b = (random_of(i)(1, 9, 4, dtype=torch.bfloat16) for i in range(2))
    assert_agree(lambda a, b: linear_scan(a.tanh(), b), [a, b], 2e-2)


# ---- Which path ------------------------------------------------------------------------------------------------------

@runs_kernels
def test_the_public_ops_reach_them(monkeypatch):
    names = [op + part for op in ("ss2d", "selective_scan", "linear_scan") for part in ("", "_backward")]
    calls = []
    for name in names:
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1])
    tensors = [x.requires_grad_() for x in tensors_of_map(2, 2, 1)]
    u, A = tensors[0].flatten(1, 2), tensors[4][0]
    with use("triton"):
        ss2d(*tensors, scan_routes("row", 2, 2, device=DEVICE)).sum().backward()
        selective_scan(u, u, A, u[..., :1], u[..., :1]).sum().backward()
        linear_scan(u, u).sum().backward()
    assert calls == names


def test_limits():
    x = torch.empty(2, 8, 8, 4, device="meta")
    assert refuses(x) is None
    assert refuses_lines(x, 4, 64, 16, 6) is None
    for dtype in (torch.float16, torch.bfloat16):
        assert refuses(x.to(dtype)) is None
    assert "float64" in refuses(x.double())
    assert "float64" in refuses_lines(x.double(), 4, 64, 16, 6)
    large = torch.empty(1, 2**15, 2**14, 4, device="meta")
    assert f"less than {VALUES} values" in refuses(large)
    assert "values an image" in refuses_lines(large, 1, 2**29, 1, 1)
    assert "values an image" in refuses_lines(x, 2**10, 2**20, 1, 4)


@runs_kernels
def test_what_is_refused_is_so_by_name():
    x = torch.ones(1, 2, 3, dtype=torch.float64, device=DEVICE)
    with use("triton"), pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        linear_scan(x, x)


@runs_kernels
def test_empty_batch():
    tensors = [x.requires_grad_() for x in tensors_of_map(2, 2, 1, B=0)]
    with use("triton"):
        out = ss2d(*tensors, scan_routes("row", 2, 2, device=DEVICE))
        grads = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == (0, 2, 2, 4)
    assert all(not grad.any() for grad in grads)
