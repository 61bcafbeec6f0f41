"""`na2d`: the definition by hand, the portable path against the definition, registration, errors."""
from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import merge_attentions, na2d, na2d_qkvpacked, use
from visionbb.kernels.neighborhood import portable
from visionbb.kernels.neighborhood.window import Window, attended_pairs, axis_range


def keys_of(length, **geometry):
    """The key positions of every query of one axis, from the formula."""
    args = dict(kernel=3, dilation=1, stride=1, causal=False, disc=False) | geometry
    start, count = axis_range(length, **args)
    d = args["dilation"]
    return [[i % d + d * j for j in range(s, s + c)] for i, (s, c) in enumerate(zip(start.tolist(), count.tolist()))]


# ---- The geometry, checked against windows written out by hand ------------------------------------------------------

@pytest.mark.parametrize(
    ("length", "geometry", "expected"),
    [
        (5, {}, [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]),
        (5, {"kernel": 4}, [[0, 1, 2, 3]] * 3 + [[1, 2, 3, 4]] * 2),  # even: one more on the left
        (7, {"kernel": 2, "dilation": 3}, [[0, 3], [1, 4], [2, 5], [0, 3], [1, 4], [2, 5], [3, 6]]),  # ragged groups
        (6, {"stride": 3}, [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3),  # stride = kernel: blocked attention
        (4, {"causal": True}, [[0], [0, 1], [0, 1, 2], [1, 2, 3]]),
        (4, {"disc": True}, [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]),  # cut off, not shifted
        (2, {}, [[0, 1], [0, 1]]),  # clip: shorter than the kernel
    ],
)
def test_windows_by_hand(length, geometry, expected):
    assert keys_of(length, **geometry) == expected


def test_every_query_sees_kernel_keys_of_its_group():
    for length, kernel, dilation in [(12, 5, 2), (23, 7, 3), (9, 4, 2)]:
        for query, keys in enumerate(keys_of(length, kernel=kernel, dilation=dilation)):
            assert len(keys) == kernel
            assert keys[-1] < length
            assert all(key % dilation == query % dilation for key in keys)


def test_reference_is_the_average_of_the_window():
    """With zero queries the weights are uniform: the output is the mean of v over the window."""
    v = torch.randn(1, 5, 6, 1, 2, dtype=torch.float64)
    with use("reference"):
        out, lse = na2d(torch.zeros_like(v), v, v, (3, 2), return_lse=True)
    rows, cols = keys_of(5), keys_of(6, kernel=2)
    for i in range(5):
        for j in range(6):
            torch.testing.assert_close(out[0, i, j, 0], v[0, rows[i]][:, cols[j], 0].mean((0, 1)))
    torch.testing.assert_close(lse, torch.full_like(lse, 6.0).log())


def test_reference_bias_is_indexed_key_minus_query():
    """A bias that is large at one offset makes every query copy the key at that offset."""
    v = torch.arange(25.0).view(1, 5, 5, 1, 1)
    rpb = torch.zeros(1, 5, 5)
    rpb[0, 2 + 1, 2 - 1] = 1e4  # one row down, one column left
    with use("reference"):
        out = na2d(torch.zeros_like(v), v, v, 3, rpb=rpb)
    torch.testing.assert_close(out[:, :4, 1:], v[:, 1:, :4])


def test_window_covering_the_map_is_plain_attention():
    q, k, v = torch.randn(3, 2, 7, 5, 4, 8, dtype=torch.float64)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).view(q.shape)
    for backend in ("reference", "portable"):
        with use(backend):
            torch.testing.assert_close(na2d(q, k, v, (7, 5)), expected)


def test_disc_holds_the_papers_number_of_keys():
    # CLEAR: a radius of 8 leaves 193 keys to a query away from the borders.
    q = torch.zeros(1, 17, 17, 1, 1, dtype=torch.float64)
    with use("reference"):
        _, lse = na2d(q, q, q, 15, window="disc", return_lse=True)
    assert round(lse[0, 8, 8, 0].exp().item()) == 193


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3, 5]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_attended_pairs_counts_the_windows(H, W, kernel, dilation):
    q = torch.zeros(1, H, W, 1, 1, dtype=torch.float64)
    for name in ("square", "disc"):
        with use("reference"):
            _, lse = na2d(q, q, q, kernel, dilation, window=name, clip=True, return_lse=True)
        window = Window((kernel, kernel), (dilation, dilation), disc=name == "disc", clip=True)
        assert attended_pairs(H, W, window) == round(lse.exp().sum().item())


# ---- The portable path against the definition -----------------------------------------------------------------------

@st.composite
def cases(draw):
    """Any geometry that na2d takes, on maps from 1x1 up."""
    window = draw(st.sampled_from(["square", "square", "square", "disc"]))
    clip = draw(st.booleans())
    axis = {}
    for name in "hw":
        kernel, dilation = draw(st.integers(1, 8)), draw(st.integers(1, 4))
        stride = draw(st.one_of(st.just(1), st.integers(1, kernel)))
        axis[name] = [kernel, dilation, stride, draw(st.sampled_from([False, False, True]))]
    if window == "disc":
        kernel = draw(st.sampled_from([1, 3, 5, 7]))
        for a in axis.values():
            a[0], a[2], a[3] = kernel, 1, False
    size = [
        draw(st.integers(1, 9)) if clip else kernel * dilation + draw(st.integers(0, 9))
        for kernel, dilation, _, _ in axis.values()
    ]
    kernel, dilation, stride, causal = zip(*axis.values())
    return dict(
        shape=(draw(st.integers(1, 3)), *size, draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))),
        bias=not any(causal) and draw(st.booleans()),
        args=dict(kernel_size=kernel, dilation=dilation, stride=stride, causal=causal, window=window, clip=clip),
        packed=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def outcome(case, backend, dtype):
    """(out, lse, d_qkv[, d_rpb]) of a case."""
    generator = torch.Generator().manual_seed(case["seed"])
    B, H, W, heads, d = case["shape"]
    qkv = torch.randn(B, H, W, 3, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    kh, kw = case["args"]["kernel_size"]
    rpb = torch.randn(heads, 2 * kh - 1, 2 * kw - 1, generator=generator, dtype=torch.float64).to(dtype)
    rpb = rpb.requires_grad_() if case["bias"] else None
    with use(backend):
        if case["packed"]:
            out, lse = na2d_qkvpacked(qkv, rpb=rpb, return_lse=True, **case["args"])
        else:
            out, lse = na2d(*qkv.unbind(3), rpb=rpb, return_lse=True, **case["args"])
        dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
        inputs = [qkv] if rpb is None else [qkv, rpb]
        grads = torch.autograd.grad([out, lse], inputs, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return out, lse, *grads


@given(cases())
@settings(max_examples=120, deadline=None)
def test_portable_equals_reference(case):
    for got, want in zip(outcome(case, "portable", torch.float64), outcome(case, "reference", torch.float64)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(cases(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_inference_equals_reference(case, return_lse):
    """Without gradients, the packed form and maps of one strip have shorter ways, the more so without log-sum-exps."""
    B, H, W, heads, d = case["shape"]
    qkv = torch.randn(B, H, W, 3, heads, d, dtype=torch.float64)
    kh, kw = case["args"]["kernel_size"]
    rpb = torch.randn(heads, 2 * kh - 1, 2 * kw - 1, dtype=torch.float64) if case["bias"] else None
    args = dict(rpb=rpb, return_lse=return_lse, **case["args"])
    results = []
    for backend in ("portable", "reference"):
        with use(backend), torch.no_grad():
            results.append(na2d_qkvpacked(qkv, **args) if case["packed"] else na2d(*qkv.unbind(3), **args))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@given(cases(), st.sampled_from([(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)]))
@settings(max_examples=40, deadline=None)
def test_portable_precision(case, dtype_and_tolerance):
    dtype, tolerance = dtype_and_tolerance
    exact = outcome(case, "reference", torch.float64)
    for got, want in zip(outcome(case, "portable", dtype), exact):
        # The inputs are rounded as well, so that the error is relative to the largest value of the result.
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1) * 4


def test_chunks_of_images_do_not_show(monkeypatch):
    case = dict(shape=(5, 9, 9, 2, 4), bias=True, packed=True, seed=0,
                args=dict(kernel_size=(3, 3), dilation=(1, 1), stride=(1, 1), causal=(False,) * 2, window="square"))
    whole = outcome(case, "portable", torch.float64)
    monkeypatch.setattr(portable, "CHUNK", 1)
    monkeypatch.setattr(portable, "TILE_WIDTHS", range(2, 4))
    portable._tables.cache_clear(), portable._plan.cache_clear()
    for got, want in zip(outcome(case, "portable", torch.float64), whole):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    qkv = torch.randn(1, 5, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: na2d_qkvpacked(x, (3, 2), rpb=b, return_lse=True), (qkv, rpb))


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["na2d", "na2d_qkvpacked"])
def test_opcheck(name, bias):
    qkv = torch.randn(2, 6, 6, 3, 2, 4, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True) if bias else None
    tensors = (qkv,) if name == "na2d_qkvpacked" else [x.detach().requires_grad_() for x in qkv.unbind(3)]
    geometry = ((3, 3), (1, 2), (1, 1), (False, False), False, False, 0.5)
    torch.library.opcheck(getattr(torch.ops.visionbb, name).default, (*tensors, rpb, *geometry))


def test_compiles_in_one_graph():
    def f(qkv, rpb):
        return na2d_qkvpacked(qkv.sin(), 3, rpb=rpb).cos()

    args = torch.randn(1, 6, 6, 3, 2, 4, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    expected = f(*args)
    wanted = torch.autograd.grad(expected.sum(), args)
    torch._dynamo.reset()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.sum(), args), wanted):
        torch.testing.assert_close(got, want)


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rpb = torch.nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, qkv):
        return na2d_qkvpacked(qkv, 3, 2, rpb=self.rpb, return_lse=True)


def test_exports_to_standard_operators():
    module, qkv = _Attention().eval(), torch.randn(2, 9, 7, 3, 2, 4)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (qkv,), dynamic_shapes=({0: batch},))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    more = torch.randn(5, 9, 7, 3, 2, 4)
    torch.testing.assert_close(program.module()(more), module(more))
    torch.testing.assert_close(module(qkv), program.module()(qkv))  # nothing of the export stays in the cached tables


def test_scripted_module_calls_the_op():
    @torch.jit.script
    def f(qkv: torch.Tensor):
        return torch.ops.visionbb.na2d_qkvpacked(
            qkv, None, [3, 3], [1, 1], [1, 1], [0, 0], False, False, 0.5)[0]

    qkv = torch.randn(1, 5, 5, 3, 1, 4)
    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(qkv), na2d_qkvpacked(qkv, 3, scale=0.5))


def test_autocast_runs_in_bfloat16_and_keeps_the_bias():
    qkv, rpb = torch.randn(1, 7, 7, 3, 1, 8), torch.randn(1, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = na2d_qkvpacked(qkv, 3, rpb=rpb)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert rpb.grad.dtype == torch.float32


def test_flops_forward_and_backward():
    qkv = torch.empty(2, 14, 14, 3, 4, 8, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = na2d_qkvpacked(qkv, 7)
    assert forward.get_total_flops() == 2 * 2 * 2 * 14 * 14 * 49 * 4 * 8
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == forward.get_total_flops() * 5 // 2


@given(st.lists(st.booleans(), min_size=9, max_size=9).filter(lambda x: any(x) and not all(x)))
@settings(max_examples=20, deadline=None)
def test_merge_attentions_joins_key_sets(choice):
    """Attention over all keys of a 3x3 map equals the merge of attentions over a split of the keys."""
    q, k, v = torch.randn(3, 1, 3, 3, 2, 4, dtype=torch.float64)
    with use("reference"):
        whole = na2d(q, k, v, 3, return_lse=True)
    first = torch.tensor(choice)
    outs, lses = [], []
    for part in (first, ~first):
        scores = torch.einsum("bqhd,bkhd->bqhk", q.flatten(1, 2) / 2, k.flatten(1, 2)[:, part])
        outs.append(torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v.flatten(1, 2)[:, part]).view(q.shape))
        lses.append(scores.logsumexp(-1).view(q.shape[:-1]))
    for got, want in zip(merge_attentions(outs, lses), whole):
        torch.testing.assert_close(got, want)


# ---- Bad input ------------------------------------------------------------------------------------------------------

def qkv_of(H=9, W=9, **kwargs):
    return torch.zeros(1, H, W, 3, 2, 4, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: na2d_qkvpacked(torch.zeros(1, 9, 9, 2, 4), 3), ValueError, r"qkv must be \(B, H, W, 3"),
        (lambda: na2d(*torch.zeros(3, 9, 9, 2, 4), 3), ValueError, r"q must be \(B, H, W, heads, head_dim\)"),
        (lambda: na2d_qkvpacked(qkv_of(dtype=torch.long), 3), TypeError, "qkv must be a floating-point tensor"),
        (lambda: na2d(qkv_of()[:, :, :, 0], qkv_of()[:, :, :, 1].half(), qkv_of()[:, :, :, 2], 3), TypeError,
         "k must have q's dtype torch.float32, got torch.float16"),
        (lambda: na2d(qkv_of()[:, :, :, 0], qkv_of()[:, :8, :, 1], qkv_of()[:, :, :, 2], 3), ValueError,
         "k must have q's shape"),
        (lambda: na2d_qkvpacked(qkv_of(W=6), 7), ValueError, r"7 \* 1 > 6, its width"),
        (lambda: na2d_qkvpacked(qkv_of(), 3, (4, 1)), ValueError, r"3 \* 4 > 9, its height"),
        (lambda: na2d_qkvpacked(qkv_of(), 0), ValueError, "kernel_size must be at least 1"),
        (lambda: na2d_qkvpacked(qkv_of(), 3.5), TypeError, "kernel_size must be int or a pair"),
        (lambda: na2d_qkvpacked(qkv_of(), (3, 3, 3)), TypeError, "kernel_size must be int or a pair"),
        (lambda: na2d_qkvpacked(qkv_of(), 3, stride=4), ValueError, "stride must be at most kernel_size"),
        (lambda: na2d_qkvpacked(qkv_of(), 3, rpb=torch.zeros(2, 3, 3)), ValueError, r"\(2, 5, 5\), got \(2, 3, 3\)"),
        (lambda: na2d_qkvpacked(qkv_of(), 3, rpb=torch.zeros(2, 5, 5).double()), TypeError, "rpb must be"),
        (lambda: na2d_qkvpacked(qkv_of(), 3, rpb=torch.zeros(2, 5, 5), causal=True), ValueError, "causal"),
        (lambda: na2d_qkvpacked(qkv_of(), 4, window="disc"), ValueError, "one odd kernel_size"),
        (lambda: na2d_qkvpacked(qkv_of(), 3, window="circle"), ValueError, "'square' or 'disc', got 'circle'"),
        (lambda: merge_attentions([], []), ValueError, "at least one"),
        (lambda: merge_attentions([torch.zeros(1, 2)], [torch.zeros(2)]), ValueError, "do not match"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
