"""SOFT: what it is made of, its class token, any image, training, export."""
from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from visionbb.mixers import GaussianAttention, SoftmaxAttention
from visionbb.models import soft

TINY = dict(dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2.0, pos_embed_size=(16, 16))
KINDS = ["soft_tiny", "soft_norm_tiny"]


def tiny(name: str, **kwargs) -> nn.Module:
    """Narrow and shallow, with weights that let every layer matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, "num_classes": 5, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.5)
    return model


def images(H, W):
    return torch.randn(2, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", soft.VARIANTS)
def test_three_stages_of_landmarks_and_one_of_softmax(name):
    stages = timm.create_model(name, device="meta").stages
    kinds = [{type(block.mixer) for block in stage.blocks} for stage in stages]
    assert kinds == [{GaussianAttention}, {GaussianAttention}, {GaussianAttention}, {SoftmaxAttention}]
    mixers = [stage.blocks[0].mixer for stage in stages[:3]]
    assert [m.ratio for m in mixers] == [8, 4, 2]
    assert [m.local.shape[-1] for m in mixers] == [9, 5, 3]
    assert [m.head_dim for m in mixers] == [32, 32, 32]
    assert {m.normalized for m in mixers} == {"norm" in name}


@pytest.mark.parametrize("name", KINDS)
def test_one_model_takes_any_image(name):
    model = tiny(name)
    first = model(images(64, 64))
    for H, W in ((97, 131), (33, 40), (4, 4)):
        final, maps = model.forward_intermediates(images(H, W))
        assert model.forward_head(final).isfinite().all()
        for info, x in zip(model.feature_info, maps, strict=True):
            assert x.shape == (2, info["num_chs"], math.ceil(H / info["reduction"]), math.ceil(W / info["reduction"]))
    torch.testing.assert_close(model(images(64, 64)), first, rtol=0, atol=0)


def test_class_token_and_map():
    model, x = tiny("soft_tiny"), images(64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 2 * 3, 16)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(last, tokens[:, 1:].unflatten(1, (2, 3)))
    torch.testing.assert_close(model(x), model.head.fc(tokens[:, 0]))
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model(x), model.head.fc(last.mean((1, 2))))


def test_the_class_token_is_of_all_tokens():
    """It attends to them and they to it: another class token, another map."""
    model, x = tiny("soft_tiny"), images(64, 64)
    before = model.forward_features(x)
    with torch.no_grad():
        model.stages[3].downsample.cls_token += torch.randn(16)
    after = model.forward_features(x)
    assert ((before - after).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("name", KINDS)
def test_trains(name):
    model = tiny(name, drop_path_rate=0.2, proj_drop_rate=0.1, drop_rate=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(64, 64)).float().square().mean()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_drop_path_drops_elements_before_the_last_stage():
    model = timm.create_model("soft_tiny", drop_path_rate=0.3, device="meta")
    assert [block.drop1.p for stage in model.stages[:3] for block in stage.blocks] == pytest.approx(
        [0.3 * i / 7 for i in range(6)]
    )
    assert model.stages[3].blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_authors_positions_are_resampled():
    model = tiny("soft_tiny", pos_embed_size=(8, 8))
    columns = torch.arange(16.0).expand(16, 16).reshape(1, 256, 1).expand(1, 256, 8)
    kept = soft.checkpoint_filter_fn({"state_dict_ema": {
        "pos_embed1": columns, "pos_embed4": torch.arange(50.0)[None, :, None].expand(1, 50, 16),
        "cls_token": torch.zeros(1, 1, 16),
    }}, model)
    torch.testing.assert_close(kept["stem.pos_embed.weight"][0, 3, :, 1], torch.arange(0.5, 16, 2))
    assert kept["stages.3.downsample.pos_embed.weight"].shape == (1, 1, 1, 16)
    assert (kept["stages.3.downsample.cls_pos"] == 0).all()
    assert kept["stages.3.downsample.cls_token"].shape == (1, 1, 16)


@pytest.mark.parametrize("name", KINDS)
def test_native_checkpoints_come_back_as_they_are(name, tmp_path):
    model = tiny(name)
    torch.save({"model_ema": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model(name, **TINY, num_classes=5, checkpoint_path=tmp_path / "own.pth").eval()
    torch.testing.assert_close(again(images(64, 64)), model(images(64, 64)), rtol=0, atol=0)


def test_onnxruntime_agrees_on_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny("soft_norm_tiny", depths=(1, 1, 1, 1))
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


@pytest.mark.parametrize(
    "kwargs", [dict(num_heads=(1, 2, 2)), dict(ratios=(8, 4, 2, 1)), dict(local_kernels=(9, 5))]
)
def test_errors(kwargs):
    with pytest.raises(ValueError, match=r"one entry a stage \(4\), ratios and local_kernels one less"):
        timm.create_model("soft_tiny", **{**TINY, **kwargs})
