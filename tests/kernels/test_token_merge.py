"""`token_merge` and `token_unmerge`: by hand, the portable path against the definition, registration, errors."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import token_merge, token_unmerge, use

# ---- The definition -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_means_by_hand(backend):
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [7.0, 70.0]]])
    index, weight = torch.tensor([[0, 3, 0, 2]]), torch.tensor([[1.0, 5.0, 2.0, 0.0]])
    with use(backend):
        merged, total = token_merge(x, index, 4)
        torch.testing.assert_close(merged, torch.tensor([[[2.5, 25.0], [0.0, 0.0], [7.0, 70.0], [2.0, 20.0]]]))
        torch.testing.assert_close(total, torch.tensor([[2.0, 0.0, 1.0, 1.0]]))
        merged, total = token_merge(x, index, 4, weight)
        torch.testing.assert_close(merged, torch.tensor([[[3.0, 30.0], [0.0, 0.0], [0.0, 0.0], [2.0, 20.0]]]))
        torch.testing.assert_close(total, torch.tensor([[3.0, 0.0, 0.0, 5.0]]))
        assert torch.equal(token_unmerge(merged, index), merged[:, index[0]])


# ---- The portable path against the definition -----------------------------------------------------------------------

@st.composite
def cases(draw):
    return dict(
        shape=(draw(st.integers(1, 3)), draw(st.integers(0, 30)), draw(st.integers(1, 20)), draw(st.integers(1, 9))),
        weight=draw(st.booleans()), seed=draw(st.integers(0, 999)),
    )


def outcome(case, backend, dtype):
    """merged, total, what is copied back, and the gradients of all inputs; x is a part of a wider tensor."""
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    B, N, M, C = case["shape"]
    wide = random(B, N + 1, 2 * C).requires_grad_()
    index = torch.randint(0, M, (B, N), generator=generator)
    weight = (random(B, N).abs() + 0.1).requires_grad_() if case["weight"] else None
    with use(backend):
        merged, total = token_merge(wide[:, 1:, C:], index, M, weight)
        copied = token_unmerge(merged, index)
    out = merged, total, copied
    assert total.requires_grad == case["weight"]
    inputs, outputs = ((wide, weight), out) if case["weight"] else ((wide,), (merged, copied))
    return *out, *torch.autograd.grad(outputs, inputs, [random(*x.shape).to(x.dtype) for x in outputs])


@given(cases())
@settings(max_examples=80, deadline=None)
def test_portable_equals_reference(case):
    torch.testing.assert_close(outcome(case, "portable", torch.float64), outcome(case, "reference", torch.float64))


@given(cases(), st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)]))
@settings(max_examples=30, deadline=None)
def test_portable_precision(case, dtype_and_tolerance):
    dtype, tolerance = dtype_and_tolerance
    got = outcome(case, "portable", dtype)
    assert got[1].dtype == torch.float32
    for x, want in zip(got, outcome(case, "reference", dtype)):
        assert x.dtype == want.dtype
        if x.numel():
            assert (x.double() - want.double()).abs().max() <= tolerance * want.abs().max().clamp(min=1)


def test_sums_are_wide():
    """Of 4096 tokens of one, in a type that cannot count beyond 256; a size that it cannot hold."""
    merged, total = token_merge(torch.ones(1, 4096, 2).bfloat16(), torch.zeros(1, 4096, dtype=torch.long), 1)
    assert merged.tolist() == [[[1, 1]]]
    assert total.tolist() == [[4096]]
    merged, total = token_merge(merged, torch.zeros(1, 1, dtype=torch.long), 1, torch.tensor([[257.0]]))
    assert total.tolist() == [[257]]
    assert merged.tolist() == [[[1, 1]]]


def test_what_was_constant_comes_back():
    index = torch.randint(0, 7, (2, 30))
    y = torch.randn(2, 7, 5)
    merged, total = token_merge(token_unmerge(y, index), index, 7, torch.rand(2, 30) + 0.1)
    torch.testing.assert_close(merged, y * (total > 0)[..., None])


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(weighted):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64) + 0.1
    index = torch.randint(0, 6, (2, 9), generator=generator)
    inputs = (x.requires_grad_(), weight.requires_grad_()) if weighted else (x.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x, w=None: token_merge(x, index, 6, w), inputs)
    assert torch.autograd.gradcheck(lambda x: token_unmerge(x, index % 9), x)


def test_no_gradient_where_there_is_no_weight():
    x, index = torch.randn(1, 3, 2, requires_grad=True), torch.tensor([[0, 0, 1]])
    weight = torch.tensor([[0.0, 0.0, 2.0]], requires_grad=True)
    merged, total = token_merge(x, index, 3, weight)
    (merged.sum() + total.sum()).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]]))
    torch.testing.assert_close(weight.grad, torch.ones(1, 3))


def test_the_tokens_are_kept_only_for_the_gradient_of_the_weight():
    x, index, weight = torch.randn(1, 5, 3, requires_grad=True), torch.zeros(1, 5, dtype=torch.long), torch.rand(1, 5)
    for asked in (False, True):
        kept = set()

        def keep(tensor, kept=kept):
            kept.add(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            token_merge(x, index, 2, weight.requires_grad_(asked))
        assert (x.shape in kept) == asked


# ---- A good citizen of PyTorch --------------------------------------------------------------------------------------

def test_opcheck():
    x, weight = torch.randn(2, 7, 3, requires_grad=True), torch.rand(2, 7, requires_grad=True)
    index = torch.randint(0, 4, (2, 7))
    for w in (None, weight):
        torch.library.opcheck(torch.ops.visionbb.token_merge.default, (x, index, 4, w))
    torch.library.opcheck(torch.ops.visionbb.token_unmerge.default, (x, index))


@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck_of_the_gradient(weighted):
    index, total, merged = torch.randint(0, 4, (2, 7)), torch.rand(2, 4), torch.randn(2, 4, 3)
    x, weight = (torch.randn(2, 7, 3), torch.rand(2, 7)) if weighted else (None, None)
    args = merged, total, x, index, weight, merged if weighted else None, total
    torch.library.opcheck(torch.ops.visionbb.token_merge_backward.default, args)


class Merge(torch.nn.Module):
    def forward(self, x, index, weight):
        M = x.shape[1] - 2
        merged, total = token_merge(x, index, M, weight)
        return merged, total, token_unmerge(merged, index)


def example(B, N):
    return torch.randn(B, N, 4), torch.randint(0, N - 2, (B, N)), torch.rand(B, N) + 0.1


def test_compiles_in_one_graph():
    x, index, weight = example(2, 9)
    tensors = x.requires_grad_(), weight.requires_grad_()
    torch._dynamo.reset()
    got, want = (
        f(x, index, weight) for f in (torch.compile(Merge(), fullgraph=True, backend="aot_eager"), Merge())
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(sum(t.sin().sum() for t in out), tensors) for out in (got, want)))


def test_exports_without_scattering():
    """TensorRT knows no scatter with a reduction."""
    batch, N = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("N", min=4, max=64)
    sizes = ({0: batch, 1: N},) * 3
    program = torch.export.export(Merge(), example(2, 9), dynamic_shapes=sizes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any(word in target for target in targets for word in ("visionbb", "scatter", "index_add", "bag"))
    other = example(3, 14)
    torch.testing.assert_close(program.module()(*other), Merge()(*other))


def test_traces():
    """Of any batch; M is a constant of the trace."""
    traced, other = torch.jit.trace(Merge(), example(2, 9)), example(3, 9)
    torch.testing.assert_close(traced(*other), Merge()(*other))


def test_autocast_changes_nothing():
    x, index, weight = example(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got = Merge()(x, index, weight)
    torch.testing.assert_close(got, Merge()(x, index, weight), rtol=0, atol=0)


def test_flops():
    x = torch.empty(2, 9, 4, device="meta", requires_grad=True)
    index = torch.empty(2, 9, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        merged, total = token_merge(x, index, 5)
    assert counter.get_total_flops() == 2 * 2 * 9 * 4
    assert merged.shape == (2, 5, 4)
    assert total.shape == (2, 5)
    with FlopCounterMode(display=False) as counter:
        merged.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 4


# ---- Bad input ------------------------------------------------------------------------------------------------------

_X, _I, _W = torch.zeros(2, 4, 6), torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((_X.long(), _I, 3), TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((_X[0], _I, 3), ValueError, r"x must be \(B, N, C\), got shape \(4, 6\)"),
        ((_X, _W, 3), TypeError, "index must be an int64 tensor, got torch.float32"),
        ((_X, [0], 3), TypeError, "index must be an int64 tensor, got list"),
        ((_X, _I[:, 1:], 3), ValueError, r"index must be \(B, N\) = \(2, 4\) with x, got shape \(2, 3\)"),
        ((_X, _I.to("meta"), 3), ValueError, "index must be on x's device cpu, got meta"),
        ((_X, _I, 3.0), TypeError, "M must be int, got 3.0"),
        ((_X, _I, 0), ValueError, "M must be at least 1, got 0"),
        ((_X, _I + 3, 3), ValueError, r"index must lie in \[0, 3\), got values from 3 to 3"),
        ((_X, _I - 1, 3), ValueError, r"index must lie in \[0, 3\), got values from -1 to -1"),
        ((_X, _I, 3, _W[:1]), ValueError, r"weight must be \(B, N\) = \(2, 4\) with x, got shape \(1, 4\)"),
        ((_X, _I, 3, _I), TypeError, "weight must be a floating-point tensor, got torch.int64"),
        ((_X, _I, 3, _W.half()), TypeError, "weight must be torch.float32 like x, or float32, got torch.float16"),
        ((_X, _I, 3, _W.to("meta")), ValueError, "weight must be on x's device cpu, got meta"),
    ],
)
def test_errors_of_merging(args, error, message):
    with pytest.raises(error, match=message):
        token_merge(*args)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((_X[0], _I), ValueError, r"y must be \(B, M, C\), got shape \(4, 6\)"),
        ((_X, _I[0]), ValueError, r"index must be \(B, N\) with y's B = 2, got shape \(4,\)"),
        ((_X, _I[:1]), ValueError, r"index must be \(B, N\) with y's B = 2, got shape \(1, 4\)"),
        ((_X, _I + 4), ValueError, r"index must lie in \[0, 4\), got values from 4 to 4"),
    ],
)
def test_errors_of_copying_back(args, error, message):
    with pytest.raises(error, match=message):
        token_unmerge(*args)
