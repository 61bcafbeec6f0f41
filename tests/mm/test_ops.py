"""The stand-ins for mmcv's compiled ops: equal to recordings of the originals, and to the papers' formulas."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import visionbb.mm
from visionbb.mm import ops

RECORDED = Path(__file__).parent / "mmcv_ops.safetensors"
with safe_open(RECORDED, "pt") as file:
    CASES = list(enumerate(json.loads(file.metadata()["cases"])))


def cases(op: str) -> list:
    ids = [f"{i}-{'-'.join(str(v) for v in case['args'].values())}" for i, case in CASES if case["op"] == op]
    return [pytest.param(i, case["args"], id=name) for (i, case), name in zip(_of(op), ids)]


def _of(op: str) -> list:
    return [(i, case) for i, case in CASES if case["op"] == op]


@pytest.fixture
def recorded():
    file = safe_open(RECORDED, "pt")
    return lambda case, name: file.get_tensor(f"{case}.{name}")


@pytest.mark.parametrize(("case", "args"), cases("nms"))
def test_nms_as_compiled(recorded, case, args):
    keep = ops.nms(recorded(case, "boxes"), recorded(case, "scores"), **args)
    assert torch.equal(keep, recorded(case, "out.keep"))


@pytest.mark.parametrize(("case", "args"), cases("softnms"))
def test_soft_nms_as_compiled(recorded, case, args):
    boxes, scores = recorded(case, "boxes"), recorded(case, "scores")
    dets = boxes.new_zeros(len(boxes), 5)
    kept = ops.softnms(boxes, scores, dets, **args)
    assert torch.equal(kept, recorded(case, "out.inds"))
    rtol = 1e-6 if args["method"] == 2 else 0  # the exponential of the C library and of torch differ in the last bit
    torch.testing.assert_close(dets[: len(kept)], recorded(case, "out.dets"), rtol=rtol, atol=0)


@pytest.mark.parametrize(("case", "args"), cases("roi_align"))
def test_roi_align_as_compiled(recorded, case, args):
    x, rois, grad = (recorded(case, name) for name in ("input", "rois", "grad_output"))
    output, grad_input, none = torch.zeros_like(grad), torch.zeros_like(x), x.new_zeros(0)
    ops.roi_align_forward(x, rois, output, none, none, **args)
    ops.roi_align_backward(grad, rois, none, none, grad_input, **args)
    assert torch.equal(output, recorded(case, "out.output"))
    assert torch.equal(grad_input, recorded(case, "out.grad_input"))


def test_mmcvs_own_functions_run_on_the_stand_ins():
    """mmcv.ops, as detection heads call it: boxes of different classes do not compete, gradients flow."""
    from mmcv.ops import batched_nms, nms, roi_align, soft_nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [1, 1, 10, 10], [30, 30, 40, 40]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    kept, index = batched_nms(boxes, scores, torch.tensor([0, 0, 1, 1]), dict(type="nms", iou_threshold=0.5))
    assert index.tolist() == [0, 2, 3]
    assert kept.shape == (3, 5)
    assert nms(boxes, scores, 0.5, max_num=1)[1].tolist() == [0]
    assert soft_nms(boxes, scores, 0.5, min_score=0.05)[1].tolist() == [0, 3, 1]  # 1 and 2 coincide
    maps = torch.randn(1, 2, 8, 8, requires_grad=True)
    roi_align(maps, torch.tensor([[0.0, 1, 1, 6, 6]]), (2, 2), 1.0, 0, "avg", True).sum().backward()
    assert maps.grad.abs().sum() > 0


def test_nothing_to_suppress():
    empty = torch.zeros(0, 4)
    assert ops.nms(empty, torch.zeros(0), 0.5, 0).shape == (0,)
    assert ops.softnms(empty, torch.zeros(0), torch.zeros(0, 5), 0.5, 0.5, 0.01, 1, 0).shape == (0,)


# ---- Focal loss: recordings would need a GPU, so the formula in float64 is the judge ---------------------------------


def sigmoid_focal(logits, target, gamma, alpha):
    """Lin et al., "Focal Loss for Dense Object Detection", equation 5, for each class on its own."""
    hot = F.one_hot(target, logits.shape[1] + 1)[:, :-1].double()
    p_t = torch.where(hot == 1, logits.sigmoid(), 1 - logits.sigmoid())
    alpha_t = hot * alpha + (1 - hot) * (1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * p_t.log()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), classes=st.integers(1, 5), gamma=st.sampled_from([1.5, 2.0, 3.0]),
    alpha=st.floats(0.05, 0.95), weighted=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_sigmoid_focal_loss(rows, classes, gamma, alpha, weighted, seed):
    torch.manual_seed(seed)
    logits = (3 * torch.randn(rows, classes)).double().requires_grad_()
    target = torch.randint(0, classes + (not weighted), (rows,))  # the last index says background
    weight = torch.rand(classes).double() if weighted else torch.empty(0).double()
    expected = sigmoid_focal(logits, target, gamma, alpha)
    expected = expected * weight[target][:, None] if weighted else expected
    (grad,) = torch.autograd.grad(expected.sum(), logits)

    out, out_grad = torch.zeros(rows, classes).double(), torch.zeros(rows, classes).double()
    ops.sigmoid_focal_loss_forward(logits.detach(), target, weight, out, gamma, alpha)
    ops.sigmoid_focal_loss_backward(logits.detach(), target, weight, out_grad, gamma, alpha)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out_grad, grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), classes=st.integers(2, 5), gamma=st.sampled_from([1.5, 2.0, 3.0]),
    alpha=st.floats(0.05, 0.95), seed=st.integers(0, 99),
)  # fmt: skip
def test_softmax_focal_loss(rows, classes, gamma, alpha, seed):
    """Through mmcv's function; a negative target counts nothing."""
    from mmcv.ops import softmax_focal_loss

    torch.manual_seed(seed)
    logits = (2 * torch.randn(rows, classes)).double().requires_grad_()
    target = torch.randint(-1, classes, (rows,))
    p_t = logits.softmax(1)[torch.arange(rows), target.clamp(min=0)]
    expected = torch.where(target >= 0, -alpha * (1 - p_t) ** gamma * p_t.log(), 0)
    (grad,) = torch.autograd.grad(expected.sum(), logits)

    loss = softmax_focal_loss(logits, target, gamma, alpha, None, "none")
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    loss = softmax_focal_loss(logits, target, gamma, alpha, None, "sum")
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad, rtol=1e-9, atol=1e-12)


def test_focal_loss_stays_finite():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    for target in (torch.tensor([0, 0]), torch.tensor([2, 1])):
        for op in (ops.sigmoid_focal_loss_forward, ops.sigmoid_focal_loss_backward):
            out = torch.zeros(2, 2)
            op(logits, target, torch.empty(0), out, 2.0, 0.25)
            assert out.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("case", "args"), [cases(op)[0].values for op in ("nms", "roi_align")])
def test_same_on_cuda(recorded, case, args):
    if "iou_threshold" in args:
        keep = ops.nms(recorded(case, "boxes").cuda(), recorded(case, "scores").cuda(), **args)
        assert torch.equal(keep.cpu(), recorded(case, "out.keep"))
    else:
        x, rois, out = (recorded(case, name).cuda() for name in ("input", "rois", "out.output"))
        got, none = torch.zeros_like(out), x.new_zeros(0)
        ops.roi_align_forward(x, rois, got, none, none, **args)
        torch.testing.assert_close(got, out)


# ---- What is not there ----------------------------------------------------------------------------------------------


def test_ops_without_a_stand_in_name_the_command():
    with pytest.raises(NotImplementedError, match=r"'deform_conv_forward'(.|\n)*pip install --no-build-isolation"):
        ops.deform_conv_forward(torch.zeros(1))
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        ops.roi_align_forward(x, torch.zeros(1, 5), x, x, x, 4, 4, 1.0, 0, 0, True)
    assert not hasattr(ops, "__wrapped__")


def test_compiled_ops_are_left_alone(monkeypatch):
    import sys
    import types

    compiled = types.ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert visionbb.mm.supply_ops() is False
    assert sys.modules["mmcv._ext"] is compiled
