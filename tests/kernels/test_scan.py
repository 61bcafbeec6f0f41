"""The scans: what the papers state, the portable path against the definition, registration, errors."""
from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import linear_scan, scan_routes, selective_scan, ss2d, use
from visionbb.kernels.scan import portable
from visionbb.kernels.scan.routes import Layout


def generator_of(seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return random


# ---- The definition, checked against what the papers state ----------------------------------------------------------

def test_linear_scan_is_a_sum_of_decayed_inputs():
    random = generator_of(0)
    a, b, h0 = random(2, 9, 3).sigmoid(), random(2, 9, 3), random(2, 3)
    powers = a.cumprod(1)
    expected = powers * (h0[:, None] + (b / powers).cumsum(1))
    with use("reference"):
        torch.testing.assert_close(linear_scan(a, b, h0=h0), expected)
        flipped = linear_scan(a.flip(1), b.flip(1), h0=h0, reverse=True)
    torch.testing.assert_close(flipped.flip(1), expected)


def test_selective_scan_is_the_hidden_attention():
    """y_i = sum_j C_i exp(A sum_{j < k <= i} dt_k) dt_j B_j u_j: 'The Hidden Attention of Mamba Models', equation 8."""
    random = generator_of(1)
    L, D, N = 7, 3, 2
    u, delta, A, B, C = random(1, L, D), random(1, L, D), -random(D, N).exp(), random(1, L, N), random(1, L, N)
    skip, bias, z = random(D), random(D), random(1, L, D)
    dt = F.softplus(delta + bias)[0]
    time = dt.cumsum(0)
    decay = torch.exp(A * (time[:, None] - time[None, :])[..., None])  # (i, j, D, N)
    attention = torch.einsum("in,ijdn,jd,jn->dij", C[0], decay, dt, B[0]).tril()
    expected = torch.einsum("dij,jd->id", attention, u[0]) + skip * u[0]
    with use("reference"):
        out, state = selective_scan(u, delta, A, B, C, skip, z, bias, True, return_last_state=True)
    torch.testing.assert_close(out[0], expected * F.silu(z[0]))
    torch.testing.assert_close(state[0], torch.einsum("jdn,jd,jn,jd->dn", decay[-1], dt, B[0], u[0]))


def tensors_of_map(case, dtype=torch.float64):
    random = generator_of(case.get("seed", 0))
    routes = case["routes"] if isinstance(case["routes"], torch.Tensor) else scan_routes(case["routes"], *case["map"])
    K, D, N, R = len(routes), case["D"], case["N"], case["R"]
    G, P = 1 if case.get("share") else K, 1 if case.get("share_proj") else K
    tensors = [
        random(case["B"], *case["map"], D), random(case["B"], *case["map"], P * (R + 2 * N)), random(G, D, R),
        random(G, D) - 2 if case.get("bias", True) else None, -random(G, D, N).exp(),
        random(G, D) if case.get("skip", True) else None,
    ]
    return [None if x is None else x.to(dtype).requires_grad_() for x in tensors], routes


def test_ss2d_is_selective_scan_along_each_route():
    tensors, routes = tensors_of_map(dict(routes="cross", map=(3, 5), D=4, N=2, R=3, B=2))
    x, proj, weight, bias, A, D = tensors
    outs = []
    with use("reference"):
        for k, route in enumerate(routes.long()):
            low, B, C = proj.flatten(1, 2)[:, route].unflatten(2, (4, 7))[:, :, k].split([3, 2, 2], 2)
            y = selective_scan(x.flatten(1, 2)[:, route], low @ weight[k].T, A[k], B, C, D[k], None, bias[k], True)
            outs.append(torch.empty_like(y).index_copy(1, route, y).unflatten(1, (3, 5)))
        torch.testing.assert_close(ss2d(*tensors, routes), sum(outs))
        torch.testing.assert_close(ss2d(*tensors, routes, merge="stack"), torch.stack(outs, 3))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_pads_decay_the_state_and_neutral_steps_do_not(backend):
    tensors, _ = tensors_of_map(dict(routes="row", map=(2, 1), D=3, N=1, R=2, B=1))
    x, proj, weight, bias, A, D = (t.detach() for t in tensors)

    def first_to_second(*route):
        with use(backend):
            out = ss2d(x, proj, weight, bias, A, torch.zeros_like(D), torch.tensor([route], dtype=torch.int32))
            alone = ss2d(x * torch.tensor([0.0, 1.0])[:, None, None], proj, weight, bias, A, None,
                         torch.tensor([route], dtype=torch.int32))
        return (out - alone)[0, 1, 0]

    near = first_to_second(0, 1)
    torch.testing.assert_close(first_to_second(-2, 0, -2, -2, 1), near)
    decay = torch.exp(2 * A[0, :, 0] * F.softplus(bias[0]))
    torch.testing.assert_close(first_to_second(0, -1, -1, 1, -1), near * decay)


# ---- The portable path against the definition -----------------------------------------------------------------------

def outcome(f, tensors, backend, seed=5):
    """The outputs and the gradients of all tensors."""
    tensors = [x for x in tensors if x is not None]
    with use(backend):
        outs = f()
        outs = outs if isinstance(outs, tuple) else (outs,)
        random = generator_of(seed)
        douts = [random(*out.shape, dtype=out.dtype) for out in outs]
        return *outs, *torch.autograd.grad(outs, tensors, douts)


def assert_paths_agree(f, tensors, tolerance=1e-10):
    for got, want in zip(outcome(f, tensors, "portable"), outcome(f, tensors, "reference")):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))


@st.composite
def map_cases(draw):
    map_ = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    merge = draw(st.sampled_from(["sum", "stack", "scatter"]))
    permute = draw(st.sampled_from(["all", "u"]))
    if merge == "scatter":
        permute, routes = "all", "atrous2"
    elif draw(st.booleans()):
        routes = draw(st.sampled_from(["cross", "bidirectional", "snake", "column"]))
    else:
        names = ["row", "row_reversed", "column_reversed", "window3", "window3_column_reversed"]
        names = names if permute == "all" else names[:3]
        routes = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
    return dict(
        routes=routes, map=map_, merge=merge, permute=permute, B=draw(st.integers(1, 3)),
        D=draw(st.sampled_from([1, 3, 8])), N=draw(st.sampled_from([1, 2, 5])), R=draw(st.integers(1, 3)),
        share=draw(st.booleans()), share_proj=draw(st.booleans()), bias=draw(st.booleans()), skip=draw(st.booleans()),
        slab=draw(st.sampled_from([1, 60, 10**6])), seed=draw(st.integers(0, 999)),
    )


@given(map_cases())
@settings(max_examples=100, deadline=None)
def test_ss2d_portable_equals_reference(case):
    tensors, routes = tensors_of_map(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "SLAB", case["slab"])
        assert_paths_agree(lambda: ss2d(*tensors, routes, merge=case["merge"], permute=case["permute"]), tensors)


@given(
    st.integers(1, 40), st.sampled_from([(1, 1), (4, 2), (6, 3)]), st.sampled_from([1, 3]), st.booleans(),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_selective_scan_portable_equals_reference(L, channels, N, softplus, reverse, state, extras, seed):
    (D, G), random = channels, generator_of(seed)
    u, B, C = random(2, L, D), random(2, L, G, N), random(2, L, G, N)
    delta = random(2, L, D) if softplus else random(2, L, D).exp()
    more = (random(D), random(2, L, D), random(D) / 9) if extras else (None,) * 3
    tensors = [u, delta, -random(D, N).exp(), B, C, *more]
    tensors = [x if x is None else x.requires_grad_() for x in tensors]
    assert_paths_agree(lambda: selective_scan(*tensors, softplus, state, reverse=reverse), tensors)


@given(
    st.sampled_from([1, 2, 3, 8, 50, 197, 1025]), st.sampled_from([(1,), (5,), (2, 3), (2500,)]), st.booleans(),
    st.booleans(), st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_linear_scan_portable_equals_reference(L, channels, reverse, start, seed):
    random = generator_of(seed)
    L = min(L, 50) if channels == (2500,) else L
    a, b, h0 = random(2, L, *channels).tanh(), random(2, L, *channels), random(2, *channels) if start else None
    tensors = [x if x is None else x.requires_grad_() for x in (a, b, h0)]
    assert_paths_agree(lambda: linear_scan(a, b, h0=h0, reverse=reverse), tensors)


def test_both_kinds_of_line_are_tested():
    assert Layout.line(50, 2 * 2500).runs == 1
    assert Layout.line(50, 2 * 3).runs > 1


@pytest.mark.parametrize("name", ["cross", "snake", "window7"])
def test_long_sequences_in_float32(name):
    """3,136 tokens, both ways of moving them, to float32's precision of the largest entry."""
    case = dict(routes=name, map=(56, 56), D=6, N=1 if name == "cross" else 4, R=2, B=1)
    exact, routes = tensors_of_map(case)
    tensors, _ = tensors_of_map(case, torch.float32)
    found = outcome(lambda: ss2d(*tensors, routes), tensors, "portable")
    wanted = outcome(lambda: ss2d(*exact, routes), exact, "reference")
    for got, want in zip(found, wanted):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_at_65536_tokens(dtype):
    """The map of a 1024 x 1024 image: slow decays add up states beyond float16's range, which the result then has."""
    random = generator_of(0)
    tensors = [random(1, 256, 256, 4).abs() + 2, random(1, 256, 256, 2 * 4).abs() * 3, random(2, 4, 2) / 8]
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    parameters = [torch.full((2, 4), 1.0), -torch.full((2, 4, 1), 1e-4), torch.ones(2, 4)]
    routes = scan_routes(("row", "column_reversed"), 256, 256)
    out = ss2d(*tensors, *parameters, routes)
    assert out.dtype == torch.float32
    assert out.max() > 65504
    wide = [x.detach().double() for x in (*tensors, *parameters)]
    torch.testing.assert_close(out.double(), ss2d(*wide, routes), rtol=1e-4, atol=1)
    grads = torch.autograd.grad(out.mean(), tensors)
    assert all(grad.isfinite().all() and grad.dtype == dtype for grad in grads)


@pytest.mark.parametrize("bias", [30.0, 200.0])
def test_large_time_steps(bias):
    """Beyond softplus' threshold of 20, and beyond the largest power of two."""
    tensors, routes = tensors_of_map(dict(routes="cross", map=(3, 4), D=4, N=2, R=2, B=1), torch.float32)
    tensors[3] = (tensors[3] + bias).detach().requires_grad_()
    assert_paths_agree(lambda: ss2d(*tensors, routes), tensors, 2e-6)


def test_nan_is_not_swallowed():
    tensors, routes = tensors_of_map(dict(routes="row", map=(2, 3), D=2, N=1, R=1, B=1))
    tensors[1].data[0, 0, 1] = math.nan
    assert ss2d(*tensors, routes)[0].flatten(0, 1).isnan().any(1).tolist() == [False, True, True, True, True, True]


def test_gradcheck():
    tensors, routes = tensors_of_map(dict(routes=("column", "window2"), map=(3, 3), D=2, N=2, R=1, B=2))
    assert torch.autograd.gradcheck(lambda *t: ss2d(*t, routes), tensors)


@pytest.mark.parametrize("reverse", [False, True])
def test_unused_outputs_need_no_gradient(reverse):
    random = generator_of(3)
    shapes = (1, 5, 2), (1, 5, 2), (2, 3), (1, 5, 3), (1, 5, 3)
    u, delta, A, B, C = (random(*shape).requires_grad_() for shape in shapes)
    for i in range(2):
        def f(i=i):
            return selective_scan(u, delta, A, B, C, None, None, None, True, True, reverse=reverse)[i]

        tensors = [u, delta, A, B, *([C] if i == 0 else [])]  # the state knows nothing of C
        assert_paths_agree(f, tensors)


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def test_opcheck_linear_scan():
    a, b, h0 = (x.requires_grad_() for x in torch.rand(3, 2, 5, 3))
    for start in (None, h0[:, 0].detach().requires_grad_()):
        torch.library.opcheck(torch.ops.visionbb.linear_scan.default, (a, b, start, False))


@pytest.mark.parametrize("extras", [False, True])
def test_opcheck_selective_scan(extras):
    u, delta = (x.requires_grad_() for x in torch.rand(2, 2, 5, 4))
    B, C = (x.requires_grad_() for x in torch.rand(2, 2, 5, 2, 3))
    A, D, bias = torch.rand(4, 3).neg().requires_grad_(), torch.rand(4).requires_grad_(), torch.rand(4).requires_grad_()
    more = (D, bias) if extras else (None, None)
    torch.library.opcheck(torch.ops.visionbb.selective_scan.default, (u, delta, A, B, C, *more, True, extras))


@pytest.mark.parametrize("merge", ["sum", "stack", "scatter"])
def test_opcheck_ss2d(merge):
    routes = "atrous2" if merge == "scatter" else "snake"
    case = dict(routes=routes, map=(3, 4), D=3, N=2, R=2, B=2, bias=merge != "sum")
    tensors, routes = tensors_of_map(case, torch.float32)
    torch.library.opcheck(torch.ops.visionbb.ss2d.default, (*tensors, routes, merge, "all"))


class _Block(torch.nn.Module):
    def __init__(self, routes, merge="sum", permute="all"):
        super().__init__()
        self.routes, self.args = routes, dict(merge=merge, permute=permute)

    def forward(self, *tensors):
        routes = scan_routes(self.routes, *tensors[0].shape[1:3], device=tensors[0].device)
        return ss2d(*tensors, routes, **self.args)


def test_compiles_in_one_graph():
    tensors, _ = tensors_of_map(dict(routes="cross", map=(3, 4), D=3, N=2, R=2, B=2), torch.float32)
    module = _Block("cross")
    expected = module(*tensors)
    wanted = torch.autograd.grad(expected.sum(), tensors)
    torch._dynamo.reset()
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.sum(), tensors), wanted):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("routes", "merge", "permute"),
    [("cross", "sum", "all"), ("window2", "stack", "all"), ("snake", "sum", "u"), ("atrous2", "scatter", "all")],
)
def test_exports_to_standard_operators(routes, merge, permute):
    """Of any batch, on one map."""
    case = dict(routes=routes, map=(5, 3), D=3, N=2, R=2, B=2, share_proj=routes == "snake")
    tensors = [x.detach() for x in tensors_of_map(case, torch.float32)[0]]
    module = _Block(routes, merge, permute)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(module, tuple(tensors), dynamic_shapes=((batch, batch, *[None] * 4),))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    more = [x.detach() for x in tensors_of_map(case | dict(B=3), torch.float32)[0]]
    torch.testing.assert_close(program.module()(*more), module(*more), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_agrees(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case = dict(routes=("row", "column_reversed", "window2"), map=(5, 3), D=3, N=2, R=2, B=2)
    tensors = [x.detach() for x in tensors_of_map(case, torch.float32)[0]]
    module = _Block(case["routes"])
    torch.onnx.export(module, tuple(tensors), tmp_path / "scan.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "scan.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors)})
    torch.testing.assert_close(torch.from_numpy(found), module(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_sequences_export_to_standard_operators(reverse):
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, h0):
            y, state = selective_scan(u, delta, A, B, C, None, u, None, True, True, reverse=reverse)
            return y, state, linear_scan(delta.sigmoid(), u, reverse=reverse, h0=h0)

    random = generator_of(0)
    shapes = (2, 11, 4), (2, 11, 4), (4, 3), (2, 11, 2, 3), (2, 11, 2, 3), (2, 4)
    args = [random(*shape) for shape in shapes]
    program = torch.export.export(Scan(), tuple(args))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), Scan()(*args))


def test_scripted_module_calls_the_ops():
    @torch.jit.script
    def f(x: torch.Tensor, proj: torch.Tensor, weight: torch.Tensor, A: torch.Tensor):
        routes = torch.ops.visionbb.scan_routes(["cross"], x.shape[1], x.shape[2], device=x.device)
        return torch.ops.visionbb.ss2d(x, proj, weight, None, A, None, routes, "sum", "all")

    (x, proj, weight, _, A, _), routes = tensors_of_map(dict(routes="cross", map=(3, 4), D=3, N=2, R=2, B=2))
    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x, proj, weight, A), ss2d(x, proj, weight, None, A, None, routes))


def test_traced_module():
    module = _Block("cross")
    tensors, _ = tensors_of_map(dict(routes="cross", map=(3, 4), D=3, N=2, R=2, B=2), torch.float32)
    traced = torch.jit.trace(module, tuple(tensors))
    more, _ = tensors_of_map(dict(routes="cross", map=(3, 4), D=3, N=2, R=2, B=3, seed=1), torch.float32)
    torch.testing.assert_close(traced(*more), module(*more))


def test_triton_is_refused_by_name():
    with use("triton"), pytest.raises(RuntimeError, match="triton"):
        linear_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3))


def test_autocast_narrows_tokens_and_keeps_parameters():
    tensors, routes = tensors_of_map(dict(routes="cross", map=(4, 4), D=8, N=1, R=2, B=2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ss2d(*tensors, routes)
        u, ones = tensors[0].flatten(1, 2), torch.ones(2, 16, 1)
        y = selective_scan(u, u, tensors[4][0], ones, ones)
    assert out.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    narrow = [x.detach().bfloat16() for x in tensors[:2]] + tensors[2:]
    torch.testing.assert_close(out, ss2d(*narrow, routes))  # the scan itself is in float32
    out.sum().backward()
    assert tensors[4].grad.dtype == torch.float32


def test_views_and_inference_mode():
    tensors, routes = tensors_of_map(dict(routes="cross", map=(3, 4), D=4, N=2, R=2, B=2))
    tensors = [x.detach() for x in tensors]
    expected = ss2d(*tensors, routes)
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    assert not strided[0].is_contiguous()
    with torch.inference_mode():
        torch.testing.assert_close(ss2d(*strided, routes + 0), expected)


def test_activation_checkpointing():
    tensors, routes = tensors_of_map(dict(routes="cross", map=(3, 4), D=4, N=2, R=2, B=2))
    run = torch.utils.checkpoint.checkpoint
    outs = run(lambda *t: ss2d(*t, routes), *tensors, use_reentrant=False), ss2d(*tensors, routes)
    for got, want in zip(*(torch.autograd.grad(out.sum(), tensors) for out in outs)):
        torch.testing.assert_close(got, want)


def test_flops_are_the_papers():
    """9 B L D N + B L D multiply-adds a scan, and the time steps' projection."""
    with torch.device("meta"):
        tensors = [torch.empty(2, 14, 14, 8), torch.empty(2, 14, 14, 4 * 9), torch.empty(4, 8, 3), torch.empty(4, 8),
                   torch.empty(4, 8, 3), torch.empty(4, 8)]
        u, B = torch.empty(2, 50, 8, requires_grad=True), torch.empty(2, 50, 3)
    with FlopCounterMode(display=False) as counter:
        ss2d(*tensors, scan_routes("cross", 14, 14, device="meta"))
    assert counter.get_total_flops() == 2 * (4 * 2 * 196 * 8 * (9 * 3 + 1 + 3))
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(u, u, tensors[4][0], B, B)
    assert counter.get_total_flops() == 2 * 9 * 2 * 50 * 8 * 3
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 4 * 9 * 2 * 50 * 8 * 3


# ---- Bad input ------------------------------------------------------------------------------------------------------

_TENSORS = [x if x is None else x.detach().float() for x in tensors_of_map(
    dict(routes="cross", map=(3, 4), D=4, N=2, R=2, B=2))[0]]
_CROSS = scan_routes("cross", 3, 4)


def changed(**tensors):
    names = ("x", "proj", "dt_weight", "dt_bias", "A", "D", "routes")
    return [tensors.get(name, value) for name, value in zip(names, [*_TENSORS, _CROSS])]


def table_with(k, t, value):
    table = _CROSS.clone()
    table[k, t] = value
    return table


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (changed(x=_TENSORS[0].long()), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        (changed(x=_TENSORS[0][0, 0]), {}, ValueError, r"x must be .* got shape \(4, 4\)"),
        (changed(x=_TENSORS[0][:, :0]), {}, ValueError, "at least one token"),
        (changed(x=_TENSORS[0][:, :2]), {}, ValueError, r"proj must have shape \(2, 2, 4, 24\), got \(2, 3, 4, 24\)"),
        (changed(proj=_TENSORS[1].half()), {}, TypeError, "proj must be torch.float32, got torch.float16"),
        (changed(proj=_TENSORS[1][..., :12]), {}, ValueError, r"proj must have shape \(2, 3, 4, 24\)"),
        (changed(dt_weight=_TENSORS[2][:2]), {}, ValueError, r"dt_weight must be \(K or 1, D, R\), K = 4, D = 4, got"),
        (changed(dt_bias=_TENSORS[3].half()), {}, TypeError, "dt_bias must be torch.float32, got torch.float16"),
        (changed(A=_TENSORS[4][..., :0]), {}, ValueError, r"A must be \(K or 1, D, N\), K = 4, D = 4, got \(4, 4, 0\)"),
        (changed(A=_TENSORS[4].cfloat()), {}, TypeError, "A must be a floating-point tensor, got torch.complex64"),
        (changed(D=_TENSORS[5][0]), {}, ValueError, r"D must be \(K or 1, D\)"),
        (changed(routes=_CROSS.long()), {}, TypeError, "routes must be an int32 tensor, got torch.int64"),
        (changed(routes="cross"), {}, TypeError, "routes must be an int32 tensor, got str"),
        (changed(routes=_CROSS[0]), {}, ValueError, r"routes must be \(K, steps\), got shape \(12,\)"),
        (changed(routes=table_with(1, 2, 12)), {}, ValueError, "tokens 0 to 11, or -1 and -2 for pads, got 0 to 12"),
        (changed(routes=table_with(1, 2, -3)), {}, ValueError, "got -3 to 11"),
        (changed(routes=table_with(1, 0, 5)), {}, ValueError, r"merge='sum': .* routes\[1\] visits token 0 0 times"),
        (changed(routes=table_with(0, 3, -1)), {}, ValueError, r"routes\[0\] visits token 3 0 times"),
        (changed(), dict(merge="scatter"), ValueError, "merge='scatter': .* visit token 0 4 times"),
        (changed(), dict(merge="mean"), ValueError, "merge must be one of sum, scatter, stack, got 'mean'"),
        (changed(), dict(permute="x"), ValueError, "permute must be 'all' or 'u', got 'x'"),
        (changed(routes=F.pad(_CROSS, (0, 1), value=-1)), dict(permute="u"), ValueError, "12 steps, .* got 13"),
        (changed(routes=_CROSS.to("meta")), {}, ValueError, "routes must be on x's device cpu, got meta"),
    ],
)
def test_errors_of_ss2d(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ss2d(*args, **kwargs)


_U, _A, _B = torch.zeros(2, 5, 4), -torch.ones(4, 3), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_U.int(), _U, _A, _B, _B), {}, TypeError, "u must be a floating-point tensor, got torch.int32"),
        ((_U[0], _U, _A, _B, _B), {}, ValueError, r"u must be \(B, L, D\) .* got shape \(5, 4\)"),
        ((_U[:, :0], _U, _A, _B, _B), {}, ValueError, "at least one step"),
        ((_U, _U[:, :3], _A, _B, _B), {}, ValueError, r"delta must have shape \(2, 5, 4\), got \(2, 3, 4\)"),
        ((_U, _U, _A[:, :0], _B, _B), {}, ValueError, r"A must be \(D, N\) = \(4, N\) with N at least 1, got \(4, 0\)"),
        ((_U, _U, _A, _B[:, :, None].expand(-1, -1, 3, -1), _B), {}, ValueError, "G a divisor of D = 4"),
        ((_U, _U, _A, _B, _B[..., :2]), {}, ValueError, r"C must have shape \(2, 5, 1, 3\), got \(2, 5, 1, 2\)"),
        ((_U, _U, _A, _B, _B), dict(D=_A), ValueError, r"D must have shape \(4,\), got \(4, 3\)"),
        ((_U, _U, _A, _B, _B), dict(z=_U.half()), TypeError, "z must be torch.float32, got torch.float16"),
        ((_U, _U, _A, _B, _B), dict(delta_bias=_A[0]), ValueError, r"delta_bias must have shape \(4,\), got \(3,\)"),
    ],
)
def test_errors_of_selective_scan(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        selective_scan(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_U, _U.int()), {}, TypeError, "b must be a floating-point tensor"),
        ((_U, _U[:, :0]), {}, ValueError, r"b must be \(B, L, ...\) with at least one step, got shape \(2, 0, 4\)"),
        ((_U[:, :2], _U), {}, ValueError, r"a must have shape \(2, 5, 4\), got \(2, 2, 4\)"),
        ((_U, _U), dict(h0=_U), ValueError, r"h0 must have shape \(2, 4\), got \(2, 5, 4\)"),
    ],
)
def test_errors_of_linear_scan(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        linear_scan(*args, **kwargs)
