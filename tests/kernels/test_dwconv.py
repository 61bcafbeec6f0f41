"""`dwconv2d`: the definition, the portable path against it, registration, errors."""
from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import dwconv2d, use
from visionbb.kernels.dwconv import portable


def conv2d(x, weight, bias, dilation):
    padding = [k // 2 * dilation for k in weight.shape[2:]]
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, dilation=dilation, groups=x.shape[-1])
    return out.permute(0, 2, 3, 1)


# ---- The definition -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (7, 1)])
def test_reference_is_conv2d(kernel, dilation):
    x, weight = torch.randn(2, 5, 6, 3, dtype=torch.float64), torch.randn(3, 1, *kernel, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    expected = conv2d(x, weight, bias, dilation)
    with use("reference"):
        torch.testing.assert_close(dwconv2d(x, weight, bias, dilation=dilation), expected)
        torch.testing.assert_close(dwconv2d(x, weight, bias, dilation=dilation, residual=True), x + expected)


def test_taps_by_hand():
    """One pixel shows the kernel, turned by 180 degrees: outputs gather, they do not scatter."""
    x = torch.zeros(1, 5, 7, 1)
    x[0, 2, 3] = 1
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    for backend in ("reference", "portable"):
        with use(backend):
            out = dwconv2d(x, weight, dilation=2)[0, :, :, 0]
        torch.testing.assert_close(out[::2, 1:6:2], weight[0, 0].flip(0, 1))
        assert out.count_nonzero() == 9


# ---- The portable path against the definition -----------------------------------------------------------------------

@st.composite
def cases(draw):
    odd = st.sampled_from([1, 3, 5, 7, 9, 11])
    return dict(
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 14)), draw(st.integers(1, 20))),
        kernel=(draw(odd), draw(odd)),
        dilation=draw(st.integers(1, 4)),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        fold=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def outcome(case, backend, dtype):
    """out and the gradients of all inputs; x a part of a wider projection, or with its channels apart."""
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    B, H, W, C = case["shape"]
    wide = random(B, H, W, 2 * C) if case["channels_last"] else random(B, 2 * C, H, W)
    weight, bias = random(C, 1, *case["kernel"]), random(C)
    x = (wide if case["channels_last"] else wide.permute(0, 2, 3, 1))[..., C:]
    inputs = (wide, weight, bias) if case["bias"] else (wide, weight)
    with use(backend):
        out = dwconv2d(
            x, weight, bias if case["bias"] else None, dilation=case["dilation"], residual=case["residual"]
        )
        dout = random(*out.shape).detach()
        return out, *torch.autograd.grad(out, inputs, dout)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_portable_equals_reference(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "FOLD_FROM", 0 if case["fold"] else 1 << 60)
        portable_outcome = outcome(case, "portable", torch.float64)
    for got, want in zip(portable_outcome, outcome(case, "reference", torch.float64)):
        torch.testing.assert_close(got, want)
    assert portable_outcome[0].is_contiguous()


@given(cases(), st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]))
@settings(max_examples=30, deadline=None)
def test_portable_precision(case, dtype_and_tolerance):
    dtype, tolerance = dtype_and_tolerance
    exact = outcome(case, "reference", torch.float64)
    for got, want in zip(outcome(case, "portable", dtype), exact):
        # The inputs are rounded as well, so that the error is relative to the largest value of the result.
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "channels", "kernel", "dilation"), [
    (56, 64, 3, 2),  # whose gradient by oneDNN's generic kernel is wrong in bfloat16
    (56, 16, 7, 3),
    (7, 64, 9, 1),
    (14, 32, 5, 1),
])
def test_layers_of_models(side, channels, kernel, dilation, dtype):
    case = dict(
        shape=(2, side, side, channels), kernel=(kernel, kernel), dilation=dilation, residual=True, bias=True,
        channels_last=True, seed=0,
    )
    for got, want in zip(outcome(case, "portable", dtype), outcome(case, "reference", torch.float64)):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_large_maps_fold_the_residual_into_the_weights():
    x, weight = torch.randn(8, 16, 64, 64), torch.randn(64, 1, 3, 3)
    assert x.numel() >= portable.FOLD_FROM
    before = weight.clone()
    torch.testing.assert_close(dwconv2d(x, weight, residual=True), x + conv2d(x, weight, None, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight, before)


def test_half_precision_keeps_the_digits_of_weights_beside_the_residual():
    """1.3 has fewer bfloat16 digits behind the point than 0.3: outputs may be rounded, but not all to one side."""
    x = torch.randn(64, 32, 32, 4).bfloat16()
    weight = torch.full((4, 1, 1, 1), 0.3).bfloat16()
    assert x.numel() >= portable.FOLD_FROM
    out, wide = dwconv2d(x, weight, residual=True).float(), x.float()
    gain = (out * wide).sum() / (wide * wide).sum()
    assert gain == pytest.approx(1 + weight[0].item(), abs=2e-4)
    assert abs((1 + weight[0].item()) - (1 + weight[0]).bfloat16().item()) > 2e-3


def test_differentiable_twice():
    x, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 3, 2), (2, 1, 3, 5), (2,))
    )

    def f(x, weight, bias):
        return dwconv2d(x, weight, bias, dilation=2, residual=True)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


def test_gradients_that_nobody_asked_for_cost_nothing():
    x, weight = torch.randn(1, 8, 8, 4), torch.randn(4, 1, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        dwconv2d(x, weight).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 8 * 8 * 4 * 9)  # forward, and the weight's


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def tensors_of(*shape, kernel=(3, 5), **kwargs):
    C = shape[-1]
    return tuple(torch.randn(*s, requires_grad=True, **kwargs) for s in (shape, (C, 1, *kernel), (C,)))


@pytest.mark.parametrize(("bias", "dilation", "residual"), [(True, 1, True), (False, 2, False)])
def test_opcheck(bias, dilation, residual):
    x, weight, b = tensors_of(2, 5, 6, 3)
    torch.library.opcheck(torch.ops.visionbb.dwconv2d.default, (x, weight, b if bias else None, dilation, residual))


def test_opcheck_of_the_gradient():
    dout, x = torch.randn(2, 2, 5, 6, 3).unbind()
    args = (dout.requires_grad_(), x.requires_grad_(), [3, 5], 2)
    torch.library.opcheck(torch.ops.visionbb.dwconv2d_weight_gradient.default, args)


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_in_one_graph(grad):
    def f(x, weight, bias):
        return dwconv2d(x.sin(), weight, bias, dilation=2, residual=True).cos()

    args = tensors_of(2, 7, 9, 4)
    expected = f(*args)
    wanted = torch.autograd.grad(expected.sum(), args)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        out = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(out, expected)
    if grad:
        for got, want in zip(torch.autograd.grad(out.sum(), args), wanted):
            torch.testing.assert_close(got, want)


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, self.weight, self.bias = (torch.nn.Parameter(t.detach()) for t in tensors_of(1, 1, 1, 4))

    def forward(self, x):
        return dwconv2d(x, self.weight, self.bias, dilation=3, residual=True)


def test_export_records_a_plain_convolution():
    """Of any batch and map."""
    sizes = {i: torch.export.Dim(name, min=2, max=64) for i, name in enumerate(("batch", "height", "width"))}
    module = Conv().eval()
    program = torch.export.export(module, (torch.randn(2, 7, 6, 4),), dynamic_shapes=(sizes,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv2d" in target for target in targets) == 1
    assert not any("visionbb" in target or "pad" in target for target in targets)
    x = torch.randn(5, 12, 4, 4)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_traces(grad):
    module, x = Conv(), torch.randn(2, 7, 6, 4)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, x)
        other = torch.randn(3, 9, 5, 4)
        torch.testing.assert_close(traced(other), module(other))


def test_scripted_module_calls_the_op():
    @torch.jit.script
    def f(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        return torch.ops.visionbb.dwconv2d(x, weight, bias, 2, True)

    x, weight, bias = tensors_of(1, 5, 5, 2)
    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    expected = dwconv2d(x, weight, bias, dilation=2, residual=True)
    torch.testing.assert_close(torch.jit.load(buffer)(x, weight, bias), expected)


def test_autocast():
    x, weight, bias = tensors_of(1, 5, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, stream = dwconv2d(x, weight, bias), dwconv2d(x, weight, bias, residual=True)
        narrow = dwconv2d(x.bfloat16(), weight, bias, residual=True)
        assert dwconv2d(x.double(), weight.double()).dtype == torch.float64
    assert out.dtype == narrow.dtype == torch.bfloat16
    assert stream.dtype == torch.float32
    torch.testing.assert_close(stream, x + out)
    torch.testing.assert_close(out.float(), dwconv2d(x, weight, bias), rtol=5e-2, atol=0.1)
    (out.float() + stream).sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
def test_flops(grad):
    """The same from our formula, where gradients are asked for, and from PyTorch's own."""
    macs = 2 * 14 * 12 * 8 * 3 * 5
    x, weight, bias = tensors_of(2, 14, 12, 8, device="meta")
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as forward:
        out = dwconv2d(x, weight, bias, dilation=2)
    assert forward.get_total_flops() == 2 * macs
    if grad:
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert backward.get_total_flops() == 4 * macs


# ---- Bad input ------------------------------------------------------------------------------------------------------

_X, _W = torch.zeros(1, 4, 4, 6), torch.zeros(6, 1, 3, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_X.long(), _W), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((_X, [1.0]), {}, TypeError, "weight must be a floating-point tensor, got list"),
        ((_X[0], _W), {}, ValueError, r"x must be \(B, H, W, C\), got shape \(4, 4, 6\)"),
        ((_X, _W[:5]), {}, ValueError, r"weight must be \(C, 1, kh, kw\) with x's C = 6, got \(5, 1, 3, 3\)"),
        ((_X, _W[:, :, :2]), {}, ValueError, r"odd kh and kw up to 11, got \(2, 3\)"),
        ((_X, torch.zeros(6, 1, 1, 13)), {}, ValueError, r"odd kh and kw up to 11, got \(1, 13\)"),
        ((_X, _W.half()), {}, TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
        ((_X, _W, torch.zeros(5)), {}, ValueError, r"bias must be \(C,\) = \(6,\), got \(5,\)"),
        ((_X, _W, torch.zeros(6).double()), {}, TypeError, "bias must have x's dtype torch.float32, got torch.float64"),
        ((_X, _W.to("meta")), {}, ValueError, "weight must be on x's device cpu, got meta"),
        ((_X, _W), dict(dilation=0), ValueError, "dilation must be at least 1, got 0"),
        ((_X, _W), dict(dilation=(1, 2)), TypeError, r"dilation must be int, got \(1, 2\)"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        dwconv2d(*args, **kwargs)


def test_triton_is_refused_by_name_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), use("triton"), pytest.raises(RuntimeError, match="need a GPU tensor"):
            dwconv2d(_X, _W.clone().requires_grad_())
