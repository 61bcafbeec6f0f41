"""Choosing the path of an op."""
from __future__ import annotations

import contextlib
import io
import threading

import pytest
import torch
from torch.autograd.forward_ad import dual_level
from torch.utils.flop_counter import FlopCounterMode

from visionbb.kernels import (
    _dispatch,
    attention_column_mean,
    dwconv2d,
    linear_attention,
    na2d_qkvpacked,
    token_match,
    token_merge,
    token_unmerge,
    use,
)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="one of auto, reference, portable, triton, got 'cuda'"), use("cuda"):
        pass


def test_triton_asked_for_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use("triton"), pytest.raises(RuntimeError, match=r"triton is not installed|need a GPU tensor"):
        na2d_qkvpacked(torch.zeros(1, 3, 3, 3, 1, 8), 3)


def test_choice_is_restored_after_an_error_and_reaches_other_threads():
    seen = []
    with pytest.raises(KeyError), use("reference"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.reference_chosen()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [True]
    assert not _dispatch.reference_chosen()


@pytest.mark.parametrize(("version", "serves"), [("3.2.0", False), ("3.4.0", True), ("3.10.1+git", True)])
def test_old_triton_is_none(monkeypatch, version, serves):
    monkeypatch.setattr(_dispatch.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: object())
    assert _dispatch.has_triton.__wrapped__() == serves


def test_without_triton_the_portable_path_serves(monkeypatch):
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    assert _dispatch.resolve(lambda x: None, torch.zeros(1)) == "portable"
    with use("triton"), pytest.raises(RuntimeError, match="not installed"):
        _dispatch.resolve(lambda x: None, torch.zeros(1))


def random(*shape):
    return torch.randn(shape, requires_grad=True)


CALLS = {
    "na2d_qkvpacked": lambda: na2d_qkvpacked(random(1, 5, 5, 3, 2, 4), 3, return_lse=True),
    "dwconv2d": lambda: dwconv2d(random(1, 5, 5, 4), random(4, 1, 3, 3)),
    "linear_attention": lambda: linear_attention(*(random(1, 3, 4, 2, 8) for _ in range(3)), feature_map="elu"),
    "token_match": lambda: token_match(random(2, 5, 8), random(2, 4, 8)),
    "token_merge": lambda: token_merge(random(2, 5, 8), torch.tensor([[0, 1, 2, 1, 0]] * 2), 3),
    "token_unmerge": lambda: token_unmerge(random(2, 3, 8), torch.tensor([[0, 1, 2, 1, 0]] * 2)),
    "attention_column_mean": lambda: attention_column_mean(random(1, 2, 6, 8), random(1, 2, 6, 8)),
}
WITHOUT_GRADIENT = {"token_match", "attention_column_mean"}
DIRECT = {"na2d_qkvpacked", "linear_attention", "dwconv2d"}


@pytest.mark.parametrize("name", CALLS)
def test_plain_inference_passes_the_dispatcher_by(name):
    def outcome(watch=contextlib.nullcontext):
        torch.manual_seed(0)
        with torch.autograd.profiler.profile() as profile, watch():
            result = CALLS[name]()
        return f"visionbb::{name}" in {event.name for event in profile.function_events}, result

    registered, expected = outcome()
    assert registered == (name not in WITHOUT_GRADIENT | DIRECT)
    with torch.no_grad():
        registered, result = outcome()
        assert not registered
        torch.testing.assert_close(result, expected)
        registered, result = outcome(lambda: FlopCounterMode(display=False))
        assert registered
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_training_passes_the_dispatcher_by(name):
    def outcome(watch):
        torch.manual_seed(0)
        with torch.autograd.profiler.profile() as profile, watch:
            result = sum(x.square().sum() for x in CALLS[name]())
            result.backward()
        ops = {event.name for event in profile.function_events}
        return {op for op in ops if op.startswith(f"visionbb::{name}")}, result

    ops, got = outcome(contextlib.nullcontext())
    assert not ops
    ops, want = outcome(FlopCounterMode(display=False))
    assert len(ops) == 2
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "op", [lambda x: na2d_qkvpacked(x, 3), lambda x: linear_attention(*x.unbind(3), feature_map="elu")],
    ids=["na2d_qkvpacked", "linear_attention"],
)
@pytest.mark.parametrize("watch", [contextlib.nullcontext, lambda: FlopCounterMode(display=False)])
def test_no_second_gradient_is_made_up(op, watch):
    x = torch.randn(1, 5, 5, 3, 2, 4, requires_grad=True)
    with watch():
        grad, = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="backward"):
            grad.sum().backward()


def test_what_counts_as_plain_inference():
    x = torch.zeros(2, requires_grad=True)
    assert _dispatch.eager_inference()
    assert _dispatch.eager_inference(x.detach(), None)
    assert not _dispatch.eager_inference(None, x)
    assert not _dispatch.eager_inference(x.detach().to("meta"))
    with dual_level():
        assert not _dispatch.eager_inference()
    seen = []
    torch.func.vmap(lambda y: seen.append(_dispatch.eager_inference(y)) or y)(x.detach())
    with torch.no_grad():
        compiled = torch.compile(lambda y: y + _dispatch.eager_inference(y), backend="eager", fullgraph=True)
        assert compiled(x).sum() == 0
    torch.jit.trace(lambda y: seen.append(_dispatch.eager_inference(y)) or y + 1, x.detach(), check_trace=False)
    with torch.no_grad():
        seen.append(not _dispatch.eager_inference(x))

        class Asks(torch.nn.Module):
            def forward(self, y):
                seen.append(_dispatch.eager_inference(y))
                return y + 1

        torch.export.export(Asks(), (x.detach(),), strict=False)
        torch.onnx.export(Asks(), (x.detach(),), io.BytesIO(), dynamo=False)
    assert len(seen) >= 5
    assert not any(seen)
