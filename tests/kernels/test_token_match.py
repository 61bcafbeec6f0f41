"""`token_match`: affinities by hand, the portable path against the definition, registration, errors."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import token_match, use
from visionbb.kernels.token_match import portable

from .token_match_cases import arguments, cases, check

CASES = cases(images=3, tokens=(0, 40), channels=20)

# ---- The definition -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_affinities_by_hand(backend):
    src = torch.tensor([[[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]]])
    dst = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]])
    weight = torch.tensor([[1.0, 0.5, 2.0]])
    mask = torch.tensor([[True, False, True]])
    with use(backend):
        for kwargs, score, index in (
            ({}, [0.8, 0.0, 0.0], [1, 0, 0]),  # of equals the first, and nothing is similar to nothing
            ({"dst_weight": weight}, [0.6, 0.0, 0.0], [0, 0, 0]),
            ({"dst_mask": mask}, [0.6, 0.0, 0.0], [0, 0, 0]),
            ({"affinity": "shifted"}, [0.9, 0.5, 0.5], [1, 0, 0]),
            ({"affinity": "shifted", "dst_weight": weight}, [0.8, 1.0, 1.0], [0, 2, 2]),
            ({"dst_mask": torch.zeros_like(mask)}, [-float("inf")] * 3, [0, 0, 0]),
        ):
            got = token_match(src, dst, **kwargs)
            torch.testing.assert_close(got, (torch.tensor([score]), torch.tensor([index])))


# ---- The portable path against the definition -----------------------------------------------------------------------

@given(CASES, st.sampled_from([1, 50, 1 << 18]))
@settings(max_examples=80, deadline=None)
def test_portable_equals_reference(case, chunk):
    args, kwargs = arguments(case, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "CHUNK", chunk)
        got = token_match(*args, **kwargs)
    check(got, args, kwargs, 1e-12)
    assert all(x.is_contiguous() for x in got)


@given(CASES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None)
def test_low_precision_rounds_nothing_but_the_inputs(case, dtype):
    args, kwargs = arguments(case, dtype)
    got = token_match(*args, **kwargs)
    assert [x.dtype for x in got] == [torch.float32, torch.int64]
    check(got, args, kwargs, 1e-5)


def test_of_equals_the_first():
    dst = torch.eye(16).repeat(1, 9, 1)
    for backend in ("reference", "portable"):
        with use(backend):
            _, index = token_match(torch.eye(16)[None].repeat(1, 5, 1), dst)
        assert torch.equal(index[0], torch.arange(16).repeat(5))


def test_lengths_do_not_matter():
    src, dst = torch.randn(2, 30, 8), torch.randn(2, 20, 8)
    score, index = token_match(src, dst)
    scaled = token_match(src * torch.logspace(-9, 9, 30)[:, None], dst * torch.logspace(-9, 9, 20)[:, None])
    torch.testing.assert_close(scaled, (score, index), rtol=1e-5, atol=1e-6)


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def test_opcheck():
    src, dst = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    for weight, mask in ((None, None), (torch.rand(2, 3), torch.rand(2, 3) > 0.5)):
        torch.library.opcheck(torch.ops.visionbb.token_match.default, (src, dst, weight, mask, "shifted"))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_nothing_is_differentiable(backend):
    tensors = torch.randn(1, 4, 3), torch.randn(1, 2, 3), torch.rand(1, 2)
    src, dst, weight = (x.requires_grad_() for x in tensors)
    with use(backend):
        assert not any(x.requires_grad for x in token_match(src, dst, dst_weight=weight))


class Match(torch.nn.Module):
    def forward(self, src, dst):
        return token_match(src, dst, dst_weight=dst[..., 0], affinity="shifted")


def test_compiles_exports_and_traces():
    module = Match()
    tokens, others = ((torch.randn(B, N, 4), torch.randn(B, M, 4)) for B, N, M in ((2, 9, 6), (3, 5, 14)))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*tokens), module(*tokens))
    batch, N, M = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "N", "M"))
    program = torch.export.export(module, tokens, dynamic_shapes=({0: batch, 1: N}, {0: batch, 1: M}))
    assert not any("visionbb" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*others), module(*others))
    torch.testing.assert_close(torch.jit.trace(module, tokens)(*others), module(*others))


def test_autocast():
    src, dst = torch.randn(1, 40, 8), torch.randn(1, 30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_match(src, dst)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, token_match(src.bfloat16(), dst.bfloat16()))


def test_flops():
    with FlopCounterMode(display=False) as counter:
        token_match(torch.empty(2, 7, 16, device="meta"), torch.empty(2, 5, 16, device="meta"))
    assert counter.get_total_flops() == 2 * 2 * 7 * 5 * 16


# ---- Bad input ------------------------------------------------------------------------------------------------------

_X = torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((_X.long(), _X), {}, TypeError, "src must be a floating-point tensor, got torch.int64"),
        ((_X, [0.0]), {}, TypeError, "dst must be a floating-point tensor, got list"),
        ((_X[0], _X), {}, ValueError, r"src must be \(B, N, D\), got shape \(4, 6\)"),
        ((_X, _X[:1]), {}, ValueError, r"dst must be \(B, M, D\) = \(2, M, 6\) like src.*got shape \(1, 4, 6\)"),
        ((_X, _X[..., 1:]), {}, ValueError, r"got shape \(2, 4, 5\)"),
        ((_X, _X[:, :0]), {}, ValueError, "with M at least 1"),
        ((_X, _X.half()), {}, TypeError, "dst must be torch.float32, with src in torch.float32, got torch.float16"),
        ((_X, _X), {"dst_weight": _X}, ValueError, r"dst_weight must be \(B, M\) = \(2, 4\) with dst, got"),
        ((_X, _X), {"dst_weight": _X[..., 0].half()}, TypeError, "dst_weight must be torch.float32, with src in"),
        ((_X, _X), {"dst_mask": _X[..., 0]}, TypeError, "dst_mask must be torch.bool, with src in"),
        ((_X, _X), {"dst_mask": _X[:1, :, 0] > 0}, ValueError, r"dst_mask must be \(B, M\)"),
        ((_X, _X.to("meta")), {}, ValueError, "dst must be on src's device cpu, got meta"),
        ((_X, _X), {"affinity": "dot"}, ValueError, "affinity must be one of cosine, shifted, got 'dot'"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        token_match(*args, **kwargs)
