"""`bi_wkv`: the paper's recurrence, the portable path against the definition, exponents of any size, errors."""
from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import bi_wkv, use
from visionbb.kernels.wkv import portable


def tensors_of(*map_, batch=2, C=3, decay=0.3, keys=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        decay * torch.randn(C, generator=generator, dtype=torch.float64),
        torch.randn(C, generator=generator, dtype=torch.float64),
        keys * torch.randn(batch, *map_, C, generator=generator, dtype=torch.float64),
        torch.randn(batch, *map_, C, generator=generator, dtype=torch.float64),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


def outcome(tensors, backend, **kwargs):
    with use(backend):
        out = bi_wkv(*tensors, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, dout)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_is_the_papers_recurrence(backend):
    """Equations 8 and 9: running sums a, b of the past and c, d of the future."""
    w, u, k, v = (t.detach() for t in tensors_of(6, batch=1, decay=0.3))
    sums = torch.zeros(2, 8, 2, 3, dtype=torch.float64)
    for t in range(6):
        term = torch.stack([k[0, t].exp() * v[0, t], k[0, t].exp()])
        sums[0, t + 1] = (-w).exp() * sums[0, t] + term
    for t in range(5, -1, -1):
        term = torch.stack([k[0, t].exp() * v[0, t], k[0, t].exp()])
        sums[1, t] = (-w).exp() * sums[1, t + 1] + term
    own = (u + k[0]).exp()
    num, den = (sums[0, :6] + sums[1, 1:7]).unbind(1)
    with use(backend):
        torch.testing.assert_close(bi_wkv(w, u, k, v)[0], (num + own * v[0]) / (den + own + 1e-6))


def test_constant_values_are_their_own_mean():
    w, u, k, v = tensors_of(5, 7)
    torch.testing.assert_close(bi_wkv(w, u, k, torch.ones_like(v), eps=0), torch.ones_like(v))


@given(
    st.integers(1, 6), st.integers(1, 12), st.integers(1, 3), st.sampled_from([0.0, 0.1, 5.0]),
    st.sampled_from([0.1, 3.0, 100.0]), st.sampled_from([0, 1e-6, 0.5]), st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_portable_equals_reference(H, W, batch, decay, keys, eps, seed):
    tensors = tensors_of(H, W, batch=batch, decay=decay, keys=keys, seed=seed)
    for got, want in zip(outcome(tensors, "portable", eps=eps), outcome(tensors, "reference", eps=eps)):
        # Gradients are differences of weighted means.
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * max(1.0, want.abs().max().item()))


def test_float32_at_the_decays_of_trained_models():
    """|decay| up to 15 over the map, 1,024 tokens."""
    tensors = tensors_of(32, 32, batch=1, decay=15 / 1024, keys=2.0)
    exact = outcome(tensors, "portable")
    found = outcome([t.detach().float().requires_grad_() for t in tensors], "portable")
    for got, want in zip(found, exact):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("limit", [0, portable.MILD])
@pytest.mark.parametrize("share", [0.01, 0.99])
def test_both_forms_hold_where_decays_are_mild(limit, share, monkeypatch):
    """Running sums as they are, and those relative to a running maximum, in float32."""
    monkeypatch.setattr(portable, "MILD", limit)
    _, u, k, v = (t.detach().float() for t in tensors_of(9, 17, C=8, keys=4.0))
    w = torch.linspace(-1, 1, 8) * share * math.log(2) * 40 / 153
    exact = bi_wkv(w.double(), u.double(), k.double(), v.double())
    with use("reference"):
        torch.testing.assert_close(exact, bi_wkv(w.double(), u.double(), k.double(), v.double()))
    assert (bi_wkv(w, u, k, v) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_keys_beyond_the_exponentials_range():
    """Where a single maximum a channel would leave no weight to the tokens far below it."""
    w = torch.full((2,), 2.0)
    k = torch.linspace(-900, 900, 64)[None, :, None].expand(1, -1, 2).contiguous()
    v = torch.randn(1, 64, 2)
    k, v = (t.requires_grad_() for t in (k, v))
    out = bi_wkv(w, torch.zeros(2), k, v, eps=0)
    exact = bi_wkv(w.double(), torch.zeros(2).double(), k.double(), v.double(), eps=0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (k, v)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_at_65536_tokens(dtype):
    w, u, k, v = (t.detach().float() for t in tensors_of(256, 256, batch=1, C=2, decay=1e-4))
    k, v = k.to(dtype), (v + 3).to(dtype)
    out = bi_wkv(w, u, k, v)
    assert out.dtype == dtype
    exact = bi_wkv(w.double(), u.double(), k.double(), v.double())
    assert (out - exact).abs().max() < 2e-2


def test_gradcheck():
    assert torch.autograd.gradcheck(bi_wkv, tensors_of(2, 3))


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def test_opcheck():
    torch.library.opcheck(torch.ops.visionbb.bi_wkv.default, (*tensors_of(3, 4, dtype=torch.float32), 1e-6))


def test_compiles_in_one_graph():
    tensors = tensors_of(3, 4, dtype=torch.float32)
    expected = bi_wkv(*tensors)
    wanted = torch.autograd.grad(expected.sum(), tensors)
    torch._dynamo.reset()
    out = torch.compile(bi_wkv, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.sum(), tensors), wanted):
        torch.testing.assert_close(got, want)


def test_exports_to_standard_operators():
    """Of any batch and map."""
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return bi_wkv(*tensors)

    tensors = [t.detach() for t in tensors_of(3, 4, dtype=torch.float32)]
    sizes = {i: torch.export.Dim(name, min=2, max=64) for i, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=((None, None, sizes, sizes),))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    more = [t.detach() for t in tensors_of(5, 7, batch=3, dtype=torch.float32)]
    torch.testing.assert_close(program.module()(*more), Module()(*more), rtol=1e-4, atol=1e-5)


def test_scripted_module_calls_the_op():
    @torch.jit.script
    def f(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return torch.ops.visionbb.bi_wkv(w, u, k, v, 1e-6)

    buffer = io.BytesIO()
    torch.jit.save(f, buffer)
    buffer.seek(0)
    tensors = tensors_of(3, 4)
    torch.testing.assert_close(torch.jit.load(buffer)(*tensors), bi_wkv(*tensors))


def test_autocast_narrows_tokens_and_keeps_parameters():
    w, u, k, v = tensors_of(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = bi_wkv(w, u, k, v)
    torch.testing.assert_close(out, bi_wkv(w, u, k.bfloat16(), v.bfloat16()))
    out.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_flops_are_linear_in_the_map():
    def count(side):
        w, x = torch.empty(8, device="meta"), torch.empty(2, side, side, 8, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = bi_wkv(w, w, x, x)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * forward
        return forward

    assert count(14) == 4 * count(7) == 2 * 8 * 2 * 196 * 8


# ---- Bad input ------------------------------------------------------------------------------------------------------

_W, _X = torch.zeros(4), torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((_W, _W, _X, _X.long()), TypeError, "v must be a floating-point tensor, got torch.int64"),
        ((_W, _W, _X, _X[0, 0]), ValueError, r"v must be .* got shape \(3, 4\)"),
        ((_W, _W, _X, _X[:, :0]), ValueError, "at least one token"),
        ((_W, _W, _X[:, :1], _X), ValueError, r"k must have shape \(1, 2, 3, 4\), got \(1, 1, 3, 4\)"),
        ((_W, _W, _X.half(), _X), TypeError, "k must be torch.float32 with v, got torch.float16"),
        ((_W[:2], _W, _X, _X), ValueError, r"w must have shape \(4,\), got \(2,\)"),
        ((_W, _W.half(), _X, _X), TypeError, "u must be torch.float32 with v, got torch.float16"),
        ((_W, _W.to("meta"), _X, _X), ValueError, "u must be on v's device cpu, got meta"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        bi_wkv(*args)
