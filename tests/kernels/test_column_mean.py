"""`attention_column_mean`: by hand, the portable path against the definition, registration, errors."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import attention_column_mean, use
from visionbb.kernels.column_mean import portable

# ---- The definition -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_columns_by_hand(backend):
    """One query sees the first of two keys three times as well as the second, the other sees both alike."""
    q = torch.tensor([[[[math.log(3.0), 0.0], [0.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    with use(backend):
        torch.testing.assert_close(attention_column_mean(q, k, scale=1.0), torch.tensor([[[0.625, 0.375]]]))
        weight = torch.tensor([[[2.0, 4.0]]])
        torch.testing.assert_close(attention_column_mean(q, k, scale=1.0, weight=weight), torch.tensor([[[3.5, 2.5]]]))
        sizes = torch.tensor([[1.0, 3.0]]).log()
        got = attention_column_mean(q, k, scale=1.0, key_bias=sizes)
        torch.testing.assert_close(got, torch.tensor([[[0.375, 0.625]]]))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_is_what_scaled_dot_product_attention_weighs_by(backend):
    q, k = torch.randn(2, 2, 3, 9, 8, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, 9)).double()
    identity = torch.eye(9, dtype=torch.float64).expand(2, 3, 9, 9)
    attention = F.scaled_dot_product_attention(q, k, identity, sizes.log()[:, None, None])
    with use(backend):
        torch.testing.assert_close(attention_column_mean(q, k, key_bias=sizes.log()), attention.mean(2))


def test_a_merged_token_gets_the_attention_of_its_parts():
    q, k = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 5, 4)
    twice = attention_column_mean(q, torch.cat((k, k[:, :, :1]), 2))
    sizes = torch.tensor([[2.0, 1, 1, 1, 1]])
    torch.testing.assert_close(
        attention_column_mean(q, k, key_bias=sizes.log()),
        torch.cat((twice[..., :1] + twice[..., 5:], twice[..., 1:5]), -1),
    )


# ---- The portable path against the definition -----------------------------------------------------------------------

@st.composite
def cases(draw):
    return dict(
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))),
        queries=draw(st.integers(1, 30)), keys=draw(st.integers(1, 30)), bias=draw(st.booleans()),
        weight=draw(st.booleans()), scale=draw(st.sampled_from([None, 0.3])), seed=draw(st.integers(0, 999)),
    )


def outcome(case, backend, dtype):
    """q and k as they lie in a projection."""
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    B, heads, d = case["shape"]
    q, k = (random(B, n, 2, heads, d)[:, :, 0].transpose(1, 2) for n in (case["queries"], case["keys"]))
    bias = random(B, case["keys"]) if case["bias"] else None
    weight = random(B, heads, case["queries"]) if case["weight"] else None
    with use(backend):
        return attention_column_mean(q, k, scale=case["scale"], key_bias=bias, weight=weight)


@given(cases(), st.sampled_from([1, 40, 1 << 18]))
@settings(max_examples=80, deadline=None)
def test_portable_equals_reference(case, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "CHUNK", chunk)
        got = outcome(case, "portable", torch.float64)
    torch.testing.assert_close(got, outcome(case, "reference", torch.float64))
    if not case["weight"]:
        torch.testing.assert_close(got.sum(-1), torch.ones(case["shape"][:2], dtype=torch.float64))


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None)
def test_low_precision_rounds_nothing_but_the_inputs(case, dtype):
    got = outcome(case, "portable", dtype)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, outcome(case, "reference", dtype), rtol=1e-5, atol=1e-5)


def test_a_bias_of_minus_infinity_takes_a_key_away():
    q, k = torch.randn(2, 2, 2, 5, 4)
    bias = torch.zeros(2, 5)
    bias[:, 3:] = float("-inf")
    got = attention_column_mean(q, k, key_bias=bias)
    assert not got[..., 3:].any()
    torch.testing.assert_close(got[..., :3], attention_column_mean(q, k[:, :, :3]))


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def test_opcheck():
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4)
    for bias, weight in ((None, None), (torch.randn(2, 6), torch.rand(2, 3, 5))):
        torch.library.opcheck(torch.ops.visionbb.attention_column_mean.default, (q, k, bias, weight, 0.5))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_is_not_differentiable(backend):
    q, k = (torch.randn(1, 1, 4, 3).requires_grad_() for _ in range(2))
    bias, weight = torch.zeros(1, 4, requires_grad=True), torch.rand(1, 1, 4, requires_grad=True)
    with use(backend):
        assert not attention_column_mean(q, k, key_bias=bias, weight=weight).requires_grad


class ColumnMean(torch.nn.Module):
    def forward(self, q, k):
        return attention_column_mean(q, k, key_bias=k[:, 0, :, 0], weight=q[..., 1])


def test_compiles_exports_and_traces():
    module = ColumnMean()
    tokens, others = ((torch.randn(B, 2, N, 4), torch.randn(B, 2, M, 4)) for B, N, M in ((2, 9, 6), (3, 5, 14)))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*tokens), module(*tokens))
    batch, N, M = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "N", "M"))
    program = torch.export.export(module, tokens, dynamic_shapes=({0: batch, 2: N}, {0: batch, 2: M}))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*others), module(*others))
    torch.testing.assert_close(torch.jit.trace(module, tokens)(*others), module(*others))


def test_autocast():
    q, k = torch.randn(2, 1, 2, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_column_mean(q, k)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, attention_column_mean(q.bfloat16(), k.bfloat16()))


def test_flops():
    q, k = torch.empty(2, 3, 7, 16, device="meta"), torch.empty(2, 3, 5, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        assert attention_column_mean(q, k).shape == (2, 3, 5)
    assert counter.get_total_flops() == 2 * 2 * 3 * 7 * 5 * (16 + 1)


# ---- Bad input ------------------------------------------------------------------------------------------------------

_X = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_X.long(), _X), {}, TypeError, "q must be a floating-point tensor, got torch.int64"),
        ((_X[0], _X), {}, ValueError, r"q must be \(B, heads, N, head_dim\) with N at least 1, got shape \(3, 4, 6\)"),
        ((_X[:, :, :0], _X), {}, ValueError, "with N at least 1"),
        ((_X, _X[:1]), {}, ValueError, r"k must be \(B, heads, M, head_dim\) = \(2, 3, M, 6\) like q"),
        ((_X, _X[..., 1:]), {}, ValueError, r"got shape \(2, 3, 4, 5\)"),
        ((_X, _X[:, :, :0]), {}, ValueError, "with M at least 1"),
        ((_X, _X.half()), {}, TypeError, "k must be torch.float32, with q in torch.float32, got torch.float16"),
        ((_X, _X.to("meta")), {}, ValueError, "k must be on q's device cpu, got meta"),
        ((_X, _X), {"key_bias": _X}, ValueError, r"key_bias must have shape \(2, 4\), got \(2, 3, 4, 6\)"),
        ((_X, _X), {"key_bias": _X[:, 0, :, 0].half()}, TypeError, "key_bias must be torch.float32, with q in"),
        ((_X, _X), {"weight": _X[..., :2, 0]}, ValueError, r"weight must have shape \(2, 3, 4\), got \(2, 3, 2\)"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        attention_column_mean(*args, **kwargs)
