"""CARE: what it is made of, its two heads, any image, training, export."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import LinearAttention
from visionbb.models import care

TINY = dict(dims=(16, 16, 32, 32), depths=(1, 2, 1, 2), ratios=((1, 2), (1, 2), (2, 1), (2, 2)), head_dims=(0, 0, 4, 8))


def tiny(**kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("care_s0", **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", care.VARIANTS)
def test_strips_in_the_first_half_and_linear_attention_in_the_second(name):
    stages = timm.create_model(name, device="meta").stages
    kinds = [{type(block.attn) for block in stage.blocks} for stage in stages]
    assert kinds == [{care.CrossConv}, {care.CrossConv}, {LinearAttention}, {LinearAttention}]
    assert [stages[i].blocks[0].attn.head_dim for i in (2, 3)] == [16, 32]
    for stage in stages:
        assert len(set(stage.blocks[0].splits)) == 1  # memory is a group as wide as the others


def test_memory_sees_the_groups_in_the_second_interaction_alone():
    block = tiny().stages[0].blocks[0]
    with torch.no_grad():
        block.inter2.fc2.weight.zero_()
        block.inter2.fc2.bias.zero_()
        block.ls.gamma.fill_(1.0)
    x = torch.randn(1, 6, 5, 16)
    torch.testing.assert_close(block(x)[..., :4], 2 * x[..., :4])
    assert not torch.allclose(block(x)[..., 4:], 2 * x[..., 4:])


def test_the_last_block_widens():
    model = tiny()
    assert model.num_features == model.feature_info[-1]["num_chs"] == model.head_hidden_size == 64
    assert [m.ls is None for stage in model.stages for m in stage.blocks] == [False] * 5 + [True]
    assert timm.create_model("care_s2", device="meta").num_features == 1536


def test_predictions_come_apart_in_distilled_training_alone():
    model, x = tiny(), images(64, 64)
    features = model.forward_features(x)
    labels, teacher = (classifier(model.forward_head(features, pre_logits=True)) for classifier in model.head.fc)
    assert not torch.allclose(labels, teacher)
    torch.testing.assert_close(model(x), (labels + teacher) / 2)
    model.set_distilled_training()
    torch.testing.assert_close(model(x), (labels + teacher) / 2)
    model.head.train()
    for got, want in zip(model(x), (labels, teacher), strict=True):
        torch.testing.assert_close(got, want)
    model.set_distilled_training(False)
    assert model(x).shape == (2, 5)


def test_one_model_takes_any_image():
    model = tiny()
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)


def test_trains():
    model = tiny(drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_pruning_takes_both_heads_along():
    model = tiny()
    taps = model.forward_intermediates(images(64, 64), indices=[1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert not any(key.startswith("head.") for key in model.state_dict())
    torch.testing.assert_close(model(images(64, 64)).permute(0, 3, 1, 2), taps[0])


def test_native_checkpoints_come_back_as_they_are(tmp_path):
    model = tiny()
    torch.save({"model_ema": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("care_s0", **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    torch.testing.assert_close(again(images(64, 64)), model(images(64, 64)), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny()
    batch = torch.export.Dim("batch", min=2, max=16)
    torch.onnx.export(
        model, (images(64, 56),), tmp_path / "model.onnx", dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    x = torch.cat((images(64, 56), images(64, 56).flip(3)))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-3, atol=1e-3)


def test_compiles_in_one_graph():
    model, x = tiny(), images(64, 64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(ratios=((1, 2), (1, 2))), r"ratios and head_dims must have one entry a stage \(4\)"),
        (dict(head_dims=(0, 8)), r"ratios and head_dims must have one entry a stage \(4\)"),
        (dict(dims=(16, 16, 32, 30)), r"dims must be multiples of 4 .*, got \(16, 16, 32, 30\)"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("care_s0", **{**TINY, **kwargs})
