import pytest
import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import dual_level
from torch.utils.flop_counter import FlopCounterMode

from visionbb.mixers import linear as module
from visionbb.mixers.linear import Linear, linear

onednn = pytest.mark.skipif(not module.HAS_ONEDNN, reason="PyTorch without oneDNN, or no x86 processor")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(module, "MIN_PRODUCTS", 1)
    monkeypatch.setattr(module, "MIN_TRAINED_PRODUCTS", 1)


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    made = []
    chosen = module._by_onednn
    monkeypatch.setattr(module, "_by_onednn", lambda *args: chosen(*args) and made.append(1) is None)
    return made


def tensors(shape=(2, 5, 7), out=9, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype), torch.randn(out, dtype=dtype)


@onednn
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 7), (2, 3, 4, 16), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_gives_the_same_product(shape, bias, calls):
    x, weight, b = tensors(shape)
    b = b if bias else None
    with torch.no_grad():
        got = linear(x, weight, b)
    assert bool(calls) == (x.numel() > 0)
    torch.testing.assert_close(got, F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


@onednn
def test_inference_is_onednns_whatever_the_mode(calls):
    x, weight, bias = tensors()
    linear(x, weight, bias)
    with torch.inference_mode():
        linear(x, weight, bias)
    linear(x, weight.requires_grad_().detach(), bias)
    assert len(calls) == 3


@onednn
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 7), (40, 2, 3)])  # the last: rows enough for oneDNN's gradient of x
@pytest.mark.parametrize("wants", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_are_pytorchs(shape, wants, contiguous, calls):
    x, weight, bias = (t.requires_grad_(bool(want)) for t, want in zip(tensors(shape), wants, strict=True))
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    dout = torch.randn(*shape[:-1], len(weight)) if contiguous else torch.randn(shape[0], *[1] * (len(shape) - 1))
    outs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert len(calls) == 1
    got, want = (torch.autograd.grad(out, inputs, dout.expand_as(out)) for out in outs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@onednn
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_what_is_trained_may_be_written_into(shape, calls):
    x, weight, bias = (t.requires_grad_() for t in tensors(shape))
    got, want = (torch.autograd.grad(f(x, weight, bias).relu_().sum(), (x, weight, bias)) for f in (linear, F.linear))
    assert len(calls) == 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@onednn
def test_second_gradients_are_pytorchs(calls):
    x, weight, bias = (t.requires_grad_() for t in tensors((64, 4)))
    seconds = []
    for f in (linear, F.linear):
        first = torch.autograd.grad(f(x, weight, bias).tanh().sum(), (x, weight, bias), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))
    assert len(calls) == 1
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@onednn
def test_gradients_of_many_results_at_once(calls):
    x, weight, bias = (t.requires_grad_() for t in tensors((64, 4)))
    douts = torch.randn(3, 64, len(weight))
    out = linear(x, weight, bias)
    assert calls
    at_once = torch.autograd.grad(out, (x, weight, bias), douts, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(out, (x, weight, bias), dout, retain_graph=True) for dout in douts]
    for a, b in zip(at_once, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_sum_is_the_sum_of_the_weights():
    x, weight, bias = tensors()
    linear(x.requires_grad_(), weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


def test_everything_else_is_pytorchs(calls):
    x, weight, bias = tensors()
    torch.testing.assert_close(torch.func.vmap(linear, (0, None, None))(x, weight, bias), F.linear(x, weight, bias))
    with dual_level():
        linear(x, weight, bias)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            linear(x, weight, bias)
        assert counter.get_total_flops() == 2 * x.numel() * len(weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        linear(x.double(), weight.double(), bias.double())
        linear(x.transpose(0, 1), weight, bias)
        linear(x, weight.T.contiguous().T, bias)
        with torch.backends.mkldnn.flags(enabled=False):
            linear(x, weight, bias)
        torch.jit.trace(linear, (x, weight, bias), check_trace=False)
        torch.compile(linear, fullgraph=True, backend="eager")(x, weight, bias)
    assert not calls


def test_layer_scripts_and_exports():
    layer, x = Linear(7, 9).eval(), torch.randn(2, 5, 7)
    want = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.jit.script(layer)(x), want)
    program = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)


def test_bad_shapes_are_refused_alike():
    x, weight, bias = tensors()
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(x[..., :-1].contiguous(), weight, bias)
