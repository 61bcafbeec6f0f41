"""`ssd`: both forms against the recurrences they stand for, the portable path against the definition, errors."""
from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import selective_scan, ssd, use


def tensors_of(*, batch=2, map_=(3, 5), heads=4, P=3, groups=None, N=2, skip=True, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grouped = (N,) if groups is None else (groups, N)
    tensors = [
        random(batch, *map_, heads, P), random(batch, *map_, heads).exp(), -random(heads).exp(),
        random(batch, *map_, *grouped), random(batch, *map_, *grouped), random(heads) if skip else None,
    ]
    return [t if t is None else t.to(dtype).requires_grad_() for t in tensors]


def outcome(tensors, backend, **kwargs):
    inputs = [t for t in tensors if t is not None]
    with use(backend):
        out = ssd(*tensors, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_causal_form_is_the_selective_scan_with_one_decay_a_head(backend):
    x, dt, A, B, C, D = tensors_of(map_=(11,), heads=4, P=3, groups=2)
    wide = dt.repeat_interleave(3, 2), A.repeat_interleave(3)[:, None].expand(-1, 2)
    with use("reference"):
        expected = selective_scan(x.flatten(2), *wide, B, C, D.repeat_interleave(3))
    with use(backend):
        torch.testing.assert_close(ssd(x, dt, A, B, C, D, causal=True, chunk=4), expected.unflatten(2, (4, 3)))


def test_non_causal_form_is_the_hand_sum():
    x, dt, A, B, C, D = tensors_of(batch=1, map_=(2,), heads=1, P=1, N=1)
    state = sum(-A[0] * dt[0, s, 0] * B[0, s, 0] * x[0, s, 0, 0] for s in range(2))
    expected = torch.stack([C[0, t, 0] * state + D[0] * x[0, t, 0, 0] for t in range(2)])
    for backend in ("reference", "portable"):
        with use(backend):
            torch.testing.assert_close(ssd(x, dt, A, B, C, D).flatten(), expected)


def test_non_causal_form_knows_no_order():
    x, dt, A, B, C, D = tensors_of(map_=(4, 4))
    flipped = ssd(*(t.flip(1, 2) if t.ndim > 1 else t for t in (x, dt, A, B, C, D)))
    torch.testing.assert_close(flipped.flip(1, 2), ssd(x, dt, A, B, C, D))


@given(
    st.integers(1, 7), st.integers(1, 7), st.sampled_from([None, 1, 2, 4]), st.booleans(), st.booleans(),
    st.integers(1, 20), st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_portable_equals_reference(H, W, groups, skip, causal, chunk, seed):
    tensors = tensors_of(map_=(H, W), groups=groups, skip=skip, seed=seed)
    options = dict(causal=causal, chunk=chunk)
    for got, want in zip(outcome(tensors, "portable", **options), outcome(tensors, "reference", **options)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_at_65536_tokens(dtype, causal):
    """States of 65,536 terms of one sign are beyond float16's range."""
    tensors = [t.detach() for t in tensors_of(batch=1, map_=(256, 256), heads=2, P=2, dtype=torch.float32)]
    x, dt, A, B, C, D = tensors
    narrow = [x.abs().to(dtype), dt.to(dtype), A * 1e-4 if causal else A, B.abs().to(dtype), C.abs().to(dtype), D]
    out = ssd(*narrow, causal=causal)
    assert out.dtype == torch.float32
    assert out.max() > 65504
    exact = ssd(*(t.double() for t in narrow), causal=causal)
    assert (out - exact).abs().max() < 1e-4 * exact.abs().max()


def test_gradcheck():
    assert torch.autograd.gradcheck(ssd, tensors_of(map_=(2, 2), groups=2))


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

@pytest.mark.parametrize("skip", [False, True])
def test_opcheck(skip):
    torch.library.opcheck(torch.ops.visionbb.ssd.default, tensors_of(groups=2, skip=skip, dtype=torch.float32))


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_in_one_graph(causal):
    tensors = tensors_of(dtype=torch.float32)
    expected = ssd(*tensors, causal=causal, chunk=4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ssd(*t, causal=causal, chunk=4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_exports_to_standard_operators(causal):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return ssd(*tensors, causal=causal, chunk=4)

    tensors = [t.detach() for t in tensors_of(groups=2, dtype=torch.float32)]
    program = torch.export.export(Module(), tuple(tensors))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors), rtol=1e-5, atol=1e-5)


def test_scripted_module_calls_the_op():
    @torch.jit.script
    def f(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor):
        return torch.ops.visionbb.ssd(x, dt, A, B, C, D)

    tensors = tensors_of(groups=1)
    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(*tensors), ssd(*tensors))


def test_autocast_narrows_tokens_and_keeps_time_steps():
    tensors = tensors_of(dtype=torch.float32)
    x, dt, A, B, C, D = tensors
    with torch.autocast("cpu", torch.bfloat16):
        out = ssd(*tensors)
    torch.testing.assert_close(out, ssd(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D))
    out.sum().backward()
    assert {t.grad.dtype for t in tensors} == {torch.float32}


def test_flops_are_those_of_the_products():
    x, B = torch.empty(2, 7, 7, 4, 16, device="meta", requires_grad=True), torch.empty(2, 7, 7, 8, device="meta")
    dt, A = torch.empty(2, 7, 7, 4, device="meta"), torch.empty(4, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = ssd(x, dt, A, B, B)
    assert counter.get_total_flops() == 2 * 2 * 2 * 49 * 4 * 16 * 8
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 5 * 2 * 49 * 4 * 16 * 8


# ---- Bad input ------------------------------------------------------------------------------------------------------

_X, _DT, _A, _B = torch.zeros(1, 2, 3, 4, 5), torch.ones(1, 2, 3, 4), -torch.ones(4), torch.zeros(1, 2, 3, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_X.long(), _DT, _A, _B, _B), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((_X[0, 0], _DT, _A, _B, _B), {}, ValueError, r"got shape \(3, 4, 5\)"),
        ((_X[:, :0], _DT, _A, _B, _B), {}, ValueError, "at least one token"),
        ((_X, _DT[..., :2], _A, _B, _B), {}, ValueError, r"dt must have shape \(1, 2, 3, 4\), got \(1, 2, 3, 2\)"),
        ((_X, _DT, _A[:3], _B, _B), {}, ValueError, r"A must have shape \(4,\), got \(3,\)"),
        ((_X, _DT, _A, _B[..., :0], _B), {}, ValueError, r"B must be \(..., N\)"),
        ((_X, _DT, _A, _B[..., None, :].expand(-1, -1, -1, 3, -1), _B), {}, ValueError, "G a divisor of heads = 4"),
        ((_X, _DT, _A, _B, _B[..., :2]), {}, ValueError, r"C must have shape \(1, 2, 3, 1, 6\), got \(1, 2, 3, 1, 2\)"),
        ((_X, _DT, _A, _B.half(), _B), {}, TypeError, "B must be torch.float32 like x, got torch.float16"),
        ((_X, _DT, _A.double(), _B, _B), {}, TypeError, "A must be torch.float32 like x or float32, got torch.float64"),
        ((_X, _DT, _A, _B, _B), dict(D=_B), ValueError, "D must have shape"),
        ((_X, _DT, _A, _B, _B), dict(chunk=0), ValueError, "chunk must be at least 1, got 0"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ssd(*args, **kwargs)
